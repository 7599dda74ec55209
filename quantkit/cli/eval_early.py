"""``quantkit eval --stop-early BASELINE``: the rule that each suite stops by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantkit.evals.early import EarlyStop
    from quantkit.evals.suite import Suite
    from quantkit.gate import Policy


def early_stops(
    suites: Sequence[Suite],
    baseline: Path,
    policy: Policy | None,
    *,
    max_items: int | None,
    seed: int,
) -> dict[str, EarlyStop]:
    """A stopping rule for each suite that the policy gates; the others run to their end.

    Raises:
        UsageError: a subset is asked for too, a gate has a floor, or there is nothing to stop.
        NotComparableError: the baseline has no results of a suite, or of another file, is of
            another seed, or stopped early itself.
    """
    from quantkit.errors import NotComparableError, UsageError
    from quantkit.evals.early import EarlyStop
    from quantkit.gate.early import stopping_rule
    from quantkit.gate.policy import DEFAULT_MARGIN, TaskGate
    from quantkit.results import Results

    if max_items is not None:
        raise UsageError("--stop-early draws its own items", remedy="drop --max-items")
    scored = Results.load(baseline)
    if scored.fingerprint.get("seed") != seed:
        raise NotComparableError(
            f"{baseline}: seed {scored.fingerprint.get('seed')} is not {seed}",
            remedy="give the baseline's --seed, or score the original with this one",
        )
    gates = None if policy is None else {(gate.task, gate.metric): gate for gate in policy.tasks}
    rules = {}
    for suite in suites:
        metric = suite.score_name
        default = TaskGate(suite.name, metric, DEFAULT_MARGIN)
        gate = default if gates is None else gates.get((suite.name, metric))
        if gate is None:
            continue
        task = scored.tasks.get(suite.name)
        if task is None or task.hash != suite.hash or task.metric != metric:
            what = "no results of" if task is None else "other files or another metric for"
            raise NotComparableError(
                f"{baseline}: has {what} suite {suite.name}",
                remedy="score the original on the same files with `quantkit eval`",
            )
        if task.early is not None:
            raise NotComparableError(
                f"{baseline}: suite {suite.name} was scored with --stop-early, so its items are "
                "a choice",
                remedy="score the original without --stop-early",
            )
        order, decided = stopping_rule(gate, task, seed)
        rules[suite.name] = EarlyStop(seed, order, decided)
    if not rules:
        raise UsageError(
            "--stop-early has no suite to stop: the policy gates none that is scored",
            remedy="give --suite, and a --policy with its margin",
        )
    return rules
