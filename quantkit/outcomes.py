"""How a run ended, and the folder ``OUT.run`` that it leaves beside the checkpoint ``OUT``.

The folder holds everything a person or `quantkit report` may want to read::

    run.json       times, dates, machine, peak memory: all that may differ between two runs
    results.json   the checkpoint's scores, a row an item
    baseline.json  the original's scores on the same items
    gate.json      the verdict
    flips.jsonl    items whose answer changed
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from quantkit import gate
from quantkit.job import Prepared, data_sources
from quantkit.ops import kernel_status
from quantkit.results import Results, Verdict, write_json, write_text


@dataclass(frozen=True)
class Outcomes:
    """How a run ended: where the checkpoint is, what it scored, the verdict."""

    folder: Path
    verdict: Verdict | None
    candidate: Results | None
    baseline: Results | None
    manifest: dict[str, Any]
    seconds: dict[str, float]
    peak_rss_bytes: int
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.folder),
            "verdict": str(self.verdict.outcome) if self.verdict else None,
            "checks": self.verdict.to_json()["checks"] if self.verdict else [],
            "size_bytes": self.manifest["size_bytes"],
            "bits_per_weight": self.manifest["bits_per_weight"],
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "results": self.candidate.summary() if self.candidate else None,
            "baseline": self.baseline.summary() if self.baseline else None,
            "warnings": list(self.warnings),
        }


def _absolute(source: str) -> str:
    """A path that holds from any folder; a hub id as it is."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def write_run(outcomes: Outcomes, prepared: Prepared) -> None:
    """Write ``OUT.run``, for an accepted and a rejected checkpoint alike."""
    job = prepared.job
    folder = job.beside("run")
    folder.mkdir(parents=True, exist_ok=True)
    for half in folder.glob(".*.tmp"):  # of a run that was killed while it wrote
        half.unlink(missing_ok=True)
    document = {
        **outcomes.to_json(),
        "model": job.source,
        "recipe": str(job.recipe.file) if job.recipe.file else None,
        # Where a rebuild looks first; the manifest's hashes decide.
        "paths": {
            "model": _absolute(job.source),
            "data": [_absolute(source.path) for source in data_sources(job.recipe)],
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            # What sums are added up in: the checkpoint's bytes depend on these three.
            "threads": torch.get_num_threads(),
            "kernels' instruction set": kernel_status()["cpu"]["isa"],
            "torch's instruction set": torch.backends.cpu.get_cpu_capability(),
        },
        "manifest": outcomes.manifest,
        "plan": prepared.plan.to_json(),
    }
    write_json(folder / "run.json", document)
    if outcomes.candidate is None or outcomes.baseline is None or outcomes.verdict is None:
        return
    outcomes.candidate.save(folder / "results.json")
    outcomes.baseline.save(folder / "baseline.json")
    assert prepared.policy is not None
    # Files are named as this folder holds them, so that it may be moved.
    sides = [
        {**gate.provenance(folder / name, results), "source": name}
        for name, results in (
            ("results.json", outcomes.candidate),
            ("baseline.json", outcomes.baseline),
        )
    ]
    document = gate.document(outcomes.verdict, prepared.policy, *sides)
    write_json(folder / "gate.json", document)
    flips = gate.flips(outcomes.candidate, outcomes.baseline, prepared.policy)
    write_text(folder / "flips.jsonl", gate.flips_jsonl(flips))
