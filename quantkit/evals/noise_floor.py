"""The noise floor of a model: scored once more, with other kernels and in other batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from quantkit.evals.evaluate import evaluate
from quantkit.evals.scorers import NONE_ALLOWED, Factory
from quantkit.evals.suite import Suite
from quantkit.models.runtime import Runtime
from quantkit.noise import NoiseFloor, TaskNoise
from quantkit.progress import Progress, silent
from quantkit.results import Results

#: Budget of the second run, for each kind of device: at most a quarter of the first run's.
OTHER_BUDGETS = {"cpu": 64, "cuda": 1024}


def with_noise_floor(
    results: Results,
    runtime: Runtime,
    again: Runtime,
    *,
    suites: Sequence[Suite] = (),
    text: str | None = None,
    seq_len: int = 1024,
    max_tokens: int | None = None,
    max_items: int | None = None,
    seed: int = 0,
    scorers: Mapping[str, Factory] = NONE_ALLOWED,
    progress: Progress = silent,
) -> Results:
    """Results with what changed in a second run of the same weights on the same items.

    Args:
        results: of the first run.
        runtime: what it ran in.
        again: the same weights, usually in other kernels.
        suites, text, seq_len, max_tokens, max_items, seed, scorers: as in the first run.
        progress: told of finished windows and requests.

    Raises:
        QuantkitError: see `quantkit.evals.evaluate.evaluate`.
    """
    second = evaluate(
        again,
        reference=None if text is None else runtime,
        suites=suites,
        text=text,
        seq_len=seq_len,
        max_tokens=max_tokens,
        max_items=max_items,
        seed=seed,
        scorers=scorers,
        budget=OTHER_BUDGETS[runtime.device.type],
        progress=progress,
    )
    tasks = {}
    for name, task in results.tasks.items():
        before = {row.id: row.score for row in task.rows}
        moved = {row.id: row.score - before[row.id] for row in second.tasks[name].rows}
        tasks[name] = TaskNoise(task.n, {key: d for key, d in moved.items() if d != 0})
    kl = None if second.text is None else second.text.kl_mean
    kernels = str(second.fingerprint.get("kernels"))
    return replace(results, noise=NoiseFloor(kernels, tasks, kl))
