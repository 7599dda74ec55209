"""Everything one model scores: suites, held-out text, size; with the facts of the run."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit.errors import UsageError
from quantkit.evals.divergence import measure_text
from quantkit.evals.scorers import NONE_ALLOWED, Factory
from quantkit.evals.suite import Suite
from quantkit.models.runtime import Runtime
from quantkit.progress import Progress, silent
from quantkit.results import Results

if TYPE_CHECKING:
    from quantkit.evals.early import EarlyStop


def evaluate(
    runtime: Runtime,
    *,
    reference: Runtime | None = None,
    suites: Sequence[Suite] = (),
    text: str | None = None,
    seq_len: int = 1024,
    max_tokens: int | None = None,
    max_items: int | None = None,
    seed: int = 0,
    canary: bool = False,
    budget: int | None = None,
    early: Mapping[str, EarlyStop] | None = None,
    scorers: Mapping[str, Factory] = NONE_ALLOWED,
    progress: Progress = silent,
) -> Results:
    """Score a model.

    Args:
        runtime: the model.
        reference: the model it is held against on ``text``.
        suites: see `quantkit.evals.suites.load_suites`.
        text: held-out text for perplexity and divergence.
        seq_len, max_tokens: see `quantkit.evals.divergence.measure_text`.
        canary: first check that the model's probabilities mean anything.
        max_items, seed, budget, early, scorers: see `quantkit.evals.run_suite.run_suites`.
        progress: told of finished windows and requests.

    Raises:
        UsageError: nothing to score, or a reference and no text to compare it on.
        QuantkitError: NaN, a failing canary or an error inside lm-eval.
    """
    if not suites and text is None:
        raise UsageError("nothing to score", remedy="give a suite or a text")
    if reference is not None and text is None:
        raise UsageError(
            "a reference is compared on text and there is none", remedy="give --text FILE"
        )
    if canary:
        from quantkit.evals.canary import check_canaries
        from quantkit.evals.language_model import QuantkitLM

        check_canaries(QuantkitLM(runtime, budget=budget))
    measured = None
    if text is not None:
        measured = measure_text(
            runtime, reference, text, seq_len=seq_len, max_tokens=max_tokens, progress=progress
        )
    tasks = {}
    if suites:
        # lm-eval takes seconds to import, and text alone does not need it.
        from quantkit.evals.run_suite import run_suites

        tasks = run_suites(
            runtime,
            suites,
            max_items=max_items,
            seed=seed,
            budget=budget,
            early=early,
            scorers=scorers,
            progress=progress,
        )
    cost: dict[str, Any] = {
        "size_bytes": runtime.size_bytes,
        "bits_per_weight": runtime.bits_per_weight,
    }
    if reference is not None:
        cost["reference_size_bytes"] = reference.size_bytes
    return Results(
        fingerprint=fingerprint(runtime, seed=seed), tasks=tasks, text=measured, cost=cost
    )


def fingerprint(runtime: Runtime, *, seed: int) -> dict[str, Any]:
    """The facts that identify the system that scored, for a results file.

    ``host`` may differ between runs that are compared; what must be equal is in
    `quantkit.results.COMPARABLE_KEYS`.
    """
    return {
        **runtime.fingerprint,
        **harness(seed),
        "host": {
            "machine": platform.machine(),
            "cpu": cpu_model(),
            "threads": torch.get_num_threads(),
        },
    }


def harness(seed: int = 0) -> dict[str, Any]:
    """The part of a fingerprint that is known before any model is loaded."""
    return {
        "lm_eval": version("lm_eval"),
        "transformers": version("transformers"),
        "torch": torch.__version__,
        "seed": seed,
    }


def cpu_model() -> str:
    """The processor's own name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
