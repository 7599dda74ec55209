"""Named baselines: results that a person accepted as the reference to hold.

A baseline is one JSON document, its manifest and its per-item rows::

    {"schema": 1, "name": "main",
     "manifest": {"results_sha256": ..., "fingerprint": {...}, "cost": {...},
                  "text": {"hash": ..., "seq_len": ...} or null,
                  "tasks": {"support_intent": {"metric": "acc", "n": 420, "value": 0.62,
                                               "hash": ...}}},
     "results": the results document}

``NAME.pending.json`` is what was recorded, ``NAME.json`` what was accepted. Accepting is one
rename, and recording again leaves the accepted one in force until then.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError, UsageError
from quantkit.results import SCHEMA, Results, read_json, write_json

DEFAULT_DIR = Path(".quantkit/baselines")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Baseline:
    """One stored baseline. ``pending`` until it is accepted.

    ``manifest`` is what the module docstring shows, as the rows give it.
    """

    name: str
    path: Path
    pending: bool
    manifest: Mapping[str, Any]
    results: Results


def is_name(text: str) -> bool:
    """Whether ``text`` can name a baseline: letters, digits, ``-`` and ``_``, so that a path
    or a file name never can."""
    return _NAME.fullmatch(text) is not None


def paths(name: str, folder: Path) -> tuple[Path, Path]:
    """The accepted and the pending file of a name.

    Raises:
        UsageError: not a name.
    """
    if not is_name(name):
        raise UsageError(
            f"{name!r} cannot name a baseline", remedy="use letters, digits, '-' and '_'"
        )
    return folder / f"{name}.json", folder / f"{name}.pending.json"


def _sha256(results_doc: Any) -> str:
    canonical = json.dumps(results_doc, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _manifest(results: Results, sha256: str) -> dict[str, Any]:
    text = results.text
    return {
        "results_sha256": sha256,
        "fingerprint": dict(results.fingerprint),
        "cost": dict(results.cost),
        "text": None if text is None else {"hash": text.hash, "seq_len": text.seq_len},
        "tasks": {
            task: {"metric": t.metric, "n": t.n, "value": t.value, "hash": t.hash}
            for task, t in results.tasks.items()
        },
    }


def record(results: Results, name: str, folder: Path = DEFAULT_DIR) -> Baseline:
    """Write results as the pending baseline ``name``, over an earlier pending one.

    Raises:
        UsageError: not a name, or the folder cannot be written.
    """
    _, pending = paths(name, folder)
    doc = results.to_json()
    manifest = _manifest(results, _sha256(doc))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"{folder}: cannot be made ({e.strerror or e})") from e
    write_json(pending, {"schema": SCHEMA, "name": name, "manifest": manifest, "results": doc})
    return _read(name, pending, pending=True)


def accept(name: str, folder: Path = DEFAULT_DIR) -> Baseline:
    """Put the pending baseline in force.

    Raises:
        UsageError: nothing is pending.
        QuantkitError: the file was edited or is incomplete.
    """
    accepted, pending = paths(name, folder)
    if not pending.is_file():
        raise UsageError(
            f"baseline {name!r} has nothing pending in {folder}",
            remedy=f"run `quantkit baseline record RESULTS --name {name}` first",
        )
    _read(name, pending, pending=True)
    try:
        os.replace(pending, accepted)
    except OSError as e:
        raise UsageError(f"{accepted}: cannot be written ({e.strerror or e})") from e
    return _read(name, accepted, pending=False)


def load(name: str, folder: Path = DEFAULT_DIR) -> Baseline:
    """The accepted baseline ``name``.

    Raises:
        UsageError: there is none, or only a pending one.
        QuantkitError: the file was edited or is incomplete.
    """
    accepted, pending = paths(name, folder)
    if accepted.is_file():
        return _read(name, accepted, pending=False)
    if pending.is_file():
        raise UsageError(
            f"baseline {name!r} is pending and not accepted",
            remedy=f"look at it with `quantkit baseline show {name}`, then run "
            f"`quantkit baseline accept {name}`",
        )
    raise UsageError(
        f"no baseline {name!r} in {folder}",
        remedy=f"run `quantkit baseline record RESULTS --name {name}`",
    )


def stored(folder: Path = DEFAULT_DIR, name: str | None = None) -> list[Baseline]:
    """All baselines, or those of one name: accepted before pending, by name.

    Raises:
        UsageError: nothing is stored under the name.
        QuantkitError: a file was edited or is incomplete.
    """
    if name is not None:
        accepted, pending = paths(name, folder)
        found = [
            _read(name, path, pending=path == pending)
            for path in (accepted, pending)
            if path.is_file()
        ]
        if not found:
            load(name, folder)
        return found
    names = {
        path.name.removesuffix(".json").removesuffix(".pending")
        for path in folder.glob("*.json")
        if path.is_file()
    }
    return [b for known in sorted(names) if is_name(known) for b in stored(folder, known)]


def resolve(reference: str, candidate: Results, folder: Path = DEFAULT_DIR) -> tuple[Results, str]:
    """``--baseline``: a results file, or the name of an accepted baseline.

    The first run with a new name records the candidate as pending and fails: nothing has
    been compared, and nobody has looked at it.

    Returns:
        The results, and where they came from (a path).

    Raises:
        UsageError: no such file, or no accepted baseline of that name.
    """
    if Path(reference).is_file() or not is_name(reference):
        return Results.load(reference), reference
    if not any(path.is_file() for path in paths(reference, folder)):
        made = record(candidate, reference, folder)
        raise UsageError(
            f"no baseline {reference!r} yet: these results were recorded in {made.path}",
            remedy=f"run `quantkit baseline accept {reference}` if they are the reference, or "
            f"`quantkit baseline record RESULTS --name {reference}` with the original model's",
        )
    found = load(reference, folder)
    return found.results, str(found.path)


def _read(name: str, path: Path, *, pending: bool) -> Baseline:
    doc = read_json(path)
    if not isinstance(doc, Mapping) or doc.get("schema") != SCHEMA or "results" not in doc:
        raise UsageError(
            f"{path}: not a baseline of schema {SCHEMA}",
            remedy=f"run `quantkit baseline record RESULTS --name {name}`",
        )
    manifest = doc.get("manifest")
    recorded = manifest.get("results_sha256") if isinstance(manifest, Mapping) else None
    found = _sha256(doc["results"])
    if recorded != found:
        raise QuantkitError(
            f"{path}: its rows are not those that its manifest names",
            remedy=f"run `quantkit baseline record RESULTS --name {name}` again",
        )
    results = Results.from_json(doc["results"], source=str(path))
    # Of the manifest only the hash is believed: what is shown is what the rows say.
    return Baseline(name, path, pending, _manifest(results, found), results)
