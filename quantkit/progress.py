"""The one shape of progress that long work reports, so that it needs no terminal."""

from __future__ import annotations

from collections.abc import Callable

#: Called as ``progress(done, total, label)``; ``done`` never decreases within one piece of work.
Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, label: str) -> None:
    """A `Progress` that says nothing."""
