"""The card of a model or data set: what its README says of name and licence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

#: Said plainly where nothing is known.
UNKNOWN = "unknown"

_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        license: an identifier such as ``apache-2.0``, or `UNKNOWN`.
        license_from: the file that says so; None when none does.
    """

    license: str = UNKNOWN
    license_from: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"license": self.license, "license_from": self.license_from}


def read_card(folder: Path) -> Card:
    """The card of a local folder: the metadata in front of its README.md, as on the hub.

    Args:
        folder: of a model or data set; one without a card, or with one that cannot be read, has
            an unknown licence.
    """
    try:
        text = (folder / "README.md").read_text(encoding="utf-8-sig")
        found = _FRONT_MATTER.match(text)
        metadata = yaml.safe_load(found[1]) if found else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return Card()
    if not isinstance(metadata, dict):
        return Card()
    named = metadata.get("license")
    if named == "other":
        named = metadata.get("license_name", named)
    if isinstance(named, list):
        named = " AND ".join(str(part) for part in named)
    return Card(str(named), "README.md") if named else Card()


def source_name(source: str) -> str:
    """A hub id as it is; of a path only the last part: nothing of this machine."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source
