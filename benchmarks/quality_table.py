"""What `benchmarks.vs_peers_quality` measured, as one table; and how far seeds are apart.

    python -m benchmarks.quality_table benchmarks/results/quality*.json

A line a row and text, each row named after its file. Files that were measured with the same inputs
but for the seed of their calibration windows are put together below: mean and spread (largest less
smallest) of KL, for rows that all seeds have; of peers, those of one version.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Rows = Mapping[str, Mapping[str, Any]]

#: What may differ between files that are put together: the seed, what follows from it, and peers.
SEEDED = ("seed", "rows", "sensitivity_run", "peer_versions")


@dataclass(frozen=True)
class Spread:
    """KL of one row on one text over seeds, nats a token."""

    name: str
    text: str
    mean: float
    spread: float
    seeds: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="result files of vs_peers_quality")
    files = {path.stem: read(path) for path in parser.parse_args().files}
    print(
        table(
            {f"{stem}: {name}": row for stem, d in files.items() for name, row in d["rows"].items()}
        )
    )
    for stems in groups(files):
        print(f"\nover seeds: {', '.join(stems)}")
        print(spread_table(spreads([files[stem] for stem in stems])))


def read(path: Path) -> dict[str, Any]:
    """SystemExit for what is not a result file."""
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        document["rows"], document["calibration"]["tokens_sha256"]
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise SystemExit(f"{path}: is no result file of vs_peers_quality ({e!r})") from e
    return document


def table(rows: Rows) -> str:
    """One line a row and text."""
    width = max(map(len, rows), default=0)
    lines = [
        f"{'system':{width}} {'s':>6} {'GB':>5} {'bits':>5} {'text':16} {'KL':>15} "
        f"{'ppl':>7} {'top-1':>6}"
    ]
    for name, row in rows.items():
        seconds, peak = row["seconds"], row["peak_rss_bytes"]
        cost = f"{_shown(seconds, '.0f'):>6} {_shown(peak and peak / 1e9, '.2f'):>5}"
        for text, score in row["texts"].items():
            lines.append(
                f"{name:{width}} {cost} {row['bits']:5.2f} {text:16} "
                f"{score['kl']:.4f} ± {score['kl_error']:.4f} "
                f"{score['ppl']:7.2f} {score['top1']:6.1%}"
            )
    return "\n".join(lines)


def _shown(value: float | None, form: str) -> str:
    """A file that was quantized elsewhere says neither time nor memory."""
    return "-" if value is None else f"{value:{form}}"


def groups(files: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Names of files that differ in the seed only, two seeds or more."""
    found: dict[str, list[str]] = {}
    for stem, document in files.items():
        found.setdefault(_inputs(document), []).append(stem)
    return [
        stems
        for stems in found.values()
        if len({files[stem]["calibration"]["tokens_sha256"] for stem in stems}) > 1
    ]


def _inputs(document: Mapping[str, Any]) -> str:
    """Everything that a file was measured with, without its seed."""
    facts = {key: value for key, value in document.items() if key not in SEEDED}
    windows = {k: v for k, v in document["calibration"].items() if k != "tokens_sha256"}
    return json.dumps(facts | {"calibration": windows}, sort_keys=True)


def spreads(documents: Sequence[Mapping[str, Any]]) -> list[Spread]:
    """Of every row and text that all seeds have. Files of one seed are one file."""
    seeds: dict[str, dict[str, Any]] = {}
    for document in documents:
        tokens = document["calibration"]["tokens_sha256"]
        for name, row in document["rows"].items():
            versions = "" if name.startswith("quantkit ") else document.get("peer_versions")
            seeds.setdefault(tokens, {})[name] = (json.dumps(versions, sort_keys=True), row)
    first, *others = seeds.values()
    found = []
    for name, (versions, row) in first.items():
        if all(name in other and other[name][0] == versions for other in others):
            for text in row["texts"]:
                kls = [rows[name][1]["texts"][text]["kl"] for rows in seeds.values()]
                mean, spread = statistics.fmean(kls), max(kls) - min(kls)
                found.append(Spread(name, text, mean, spread, len(kls)))
    return found


def spread_table(found: Sequence[Spread]) -> str:
    width = max((len(s.name) for s in found), default=6)
    lines = [f"{'system':{width}} {'text':16} {'seeds':>5} {'KL':>8} {'spread':>8}"]
    lines += [
        f"{s.name:{width}} {s.text:16} {s.seeds:5} {s.mean:8.4f} {s.spread:8.4f}" for s in found
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
