"""Fields of JSON that other programs wrote: each of its type, or an error that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.errors import UsageError
from quantkit.results import read_json


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        UsageError: it is absent, cannot be read, is not JSON, or holds something else.
    """
    return as_object(read_json(path), str(path))


def as_object(value: Any, name: str) -> dict[str, Any]:
    """The value, if it is an object. Raises UsageError, with its name, if it is not."""
    if not isinstance(value, dict):
        raise UsageError(f"{name}: {_short(value)} where an object of keys and values belongs")
    return value


def as_integer(value: Any, name: str) -> int:
    """The value as an integer: 4, 4.0 and "4" are. Raises UsageError, with its name, if it is
    none."""
    try:
        number = int(value)
        if isinstance(value, bool) or (isinstance(value, float) and number != value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{name}: {_short(value)} is not an integer") from None
    return number


def as_flag(value: Any, name: str) -> bool | None:
    """The value if it is true, false or absent (None). Raises UsageError, with its name, if it is
    anything else: "false" would be true."""
    if value is None or isinstance(value, bool):
        return value
    raise UsageError(f"{name}: {_short(value)} is not true or false")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
