"""The reloaded checkpoint and the original, scored on the same suites and held-out text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantkit.evals.evaluate import evaluate
from quantkit.job import Prepared
from quantkit.models.load import load_runtime
from quantkit.models.runtime import Runtime
from quantkit.progress import Reporter
from quantkit.results import Results


def score(prepared: Prepared, runtime: Runtime, reporter: Reporter) -> tuple[Results, Results]:
    """Results of the checkpoint and of the original.

    Args:
        prepared: holds the suites, the text and the baseline, if there is one to reuse.
        runtime: the reloaded checkpoint.
        reporter: told of each of the two evaluations.
    """
    job, text = prepared.job, prepared.text
    original = load_runtime(job.source, device=job.device)
    with reporter("evaluate") as progress:
        candidate = evaluate(
            runtime,
            reference=original if text is not None else None,
            suites=job.suites,
            text=text,
            seq_len=job.seq_len,
            max_tokens=job.max_tokens,
            progress=progress,
        )
    candidate = replace(
        candidate, cost={**candidate.cost, "reference_size_bytes": original.size_bytes}
    )
    if prepared.baseline is not None:
        return candidate, prepared.baseline
    with reporter("evaluate the original") as progress:
        baseline = evaluate(
            original,
            suites=job.suites,
            text=text,
            seq_len=job.seq_len,
            max_tokens=job.max_tokens,
            progress=progress,
        )
    return candidate, baseline


def evidence(candidate: Results, baseline: Results) -> dict[str, Any]:
    """The scores without anything that differs between machines of one type."""

    def clean(results: Results) -> dict[str, Any]:
        summary = results.summary()
        summary["fingerprint"] = {
            k: v for k, v in summary["fingerprint"].items() if k not in ("host", "model")
        }
        return summary

    return {"candidate": clean(candidate), "baseline": clean(baseline)}
