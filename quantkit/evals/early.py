"""Scoring a suite in a given order until someone has seen enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from quantkit.errors import NotComparableError
from quantkit.evals.suite import Suite
from quantkit.results import ItemRow, TaskResult

#: Items scored between two looks: few enough to stop soon, enough to fill batches.
STEP = 32


@dataclass(frozen=True)
class EarlyStop:
    """When one suite's run may end.

    Attributes:
        seed: gave the order; goes into the results.
        order: clusters of item ids in the order to score them; every item once.
        decided: takes the scores so far by id, says whether they are enough.
    """

    seed: int
    order: Sequence[Sequence[str]]
    decided: Callable[[Mapping[str, float]], bool]


def run_until_decided(
    score: Callable[[list[int]], TaskResult], suite: Suite, stop: EarlyStop
) -> TaskResult:
    """Score a suite's items in order, some 32 at a time, until they decide or run out.

    Args:
        score: takes sorted positions of items, gives their rows.
        suite: what is scored.
        stop: in which order, and until when.

    Raises:
        NotComparableError: the order names other items than the suite's.
    """
    position = {suite.item_id(i): i for i in range(suite.n)}
    named = {name for group in stop.order for name in group}
    if named != position.keys():
        differing = sorted(named ^ position.keys())[0]
        raise NotComparableError(
            f"suite {suite.name}: its items are not those of the baseline ({differing!r} is on "
            "one side only)",
            remedy="score the baseline again on this suite",
        )
    rows: list[ItemRow] = []
    metric = ""
    waiting: list[int] = []
    for number, group in enumerate(stop.order, start=1):
        waiting += [position[name] for name in group]
        if len(waiting) < STEP and number < len(stop.order):
            continue
        part = score(sorted(waiting))
        rows, metric, waiting = [*rows, *part.rows], part.metric, []
        if stop.decided({row.id: row.score for row in rows}):
            break
    rows.sort(key=lambda row: position[row.id])
    return TaskResult(metric, tuple(rows), suite.hash, stop.seed, suite.provenance)
