"""Task gates of runs that could stop early, judged by their e-process and by nothing else.

Such a run looked at its items one after another. Bounds that hold for a single look would
give it a second chance, so a run that was not decided is INCONCLUSIVE even where all of its
items were scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from quantkit.errors import NotComparableError, UsageError
from quantkit.gate.compare import Pair
from quantkit.gate.policy import TaskGate
from quantkit.gate.sequential import Decision, bet_order, bets, decide
from quantkit.gate.statistics import ALPHA
from quantkit.gate.words import POINTS
from quantkit.results import GateCheck, Outcome, Results, TaskResult


def stopping_rule(
    gate: TaskGate, baseline: TaskResult, seed: int
) -> tuple[list[list[str]], Callable[[Mapping[str, float]], bool]]:
    """What a run that may stop early needs to know of its gate.

    Args:
        gate: the task's margin.
        baseline: every item as the original scored it.
        seed: shuffles the items.

    Returns:
        Clusters of item ids in the order to score them, and a function that takes the scores
        so far by id and says whether they decide.

    Raises:
        UsageError: the gate has a floor.
    """
    refuse_floor(gate)
    order = bet_order(baseline.rows, seed)
    scores = {row.id: row.score for row in baseline.rows}

    def decided(candidate: Mapping[str, float]) -> bool:
        differences = {name: score - scores[name] for name, score in candidate.items()}
        return _decide(order, differences, gate.margin).outcome is not Outcome.INCONCLUSIVE

    return order, decided


def refuse_floor(gate: TaskGate) -> None:
    """UsageError where a floor stands beside the margin: its bound needs a fixed number of
    items."""
    if gate.floor is not None:
        raise UsageError(
            f"{gate.name}: a floor cannot be held by a run that stops early",
            remedy="drop the floor, or score every item without --stop-early",
        )


def _decide(
    order: Sequence[Sequence[str]], differences: Mapping[str, float], margin: float
) -> Decision:
    return decide(bets(order, differences, margin), margin)


def judge_early(
    gate: TaskGate, pairs: tuple[Pair, ...], candidate: Results, baseline: Results
) -> list[GateCheck]:
    """The e-process's decision, and the must-not-flip check as far as items were scored.

    Raises:
        NotComparableError: the items are not the first ones of the seeded order.
        UsageError: the gate has a floor.
    """
    refuse_floor(gate)
    seed, rows = candidate.tasks[gate.task].early, baseline.tasks[gate.task].rows
    assert seed is not None
    order = bet_order(rows, seed)
    differences = {p.baseline.id: p.difference for p in pairs}
    made = bets(order, differences, gate.margin)
    if sum(len(group) for group in order[: len(made)]) != len(pairs):
        raise NotComparableError(
            f"task {gate.task}: its {len(pairs)} items are not the first ones of the order that "
            f"seed {seed} gives",
            remedy="run `quantkit eval --stop-early` again, on this baseline",
        )
    decision = decide(made, gate.margin)
    checks = [_check(gate, pairs, decision, seed, len(rows))]
    held = [p for p in pairs if p.must_not_flip]
    total = sum(r.must_not_flip for r in rows)
    if held or total:
        checks.append(_must_not_flip(gate, held, max(total, len(held))))
    return checks


def _check(
    gate: TaskGate, pairs: tuple[Pair, ...], decision: Decision, seed: int, total: int
) -> GateCheck:
    n = len(pairs)
    mean = math.fsum(p.difference for p in pairs) / n
    seen = f"D {POINTS.show(mean)} points on {n} of {total} items, e-process"
    enough, limit = f"{1 / ALPHA:.0f}", f"{POINTS.show(-gate.margin)} margin"
    if decision.outcome is Outcome.PASS:
        reason = f"{seen} {decision.e_pass:.1f} ≥ {enough} above the {limit}"
    elif decision.outcome is Outcome.FAIL:
        reason = f"{seen} {decision.e_fail:.1f} ≥ {enough} below the {limit}"
    else:
        reason = (
            f"{seen} {decision.e_pass:.2g} above and {decision.e_fail:.2g} below the {limit}, "
            f"{enough} needed; without --stop-early fewer items decide"
        )
    gains, losses = sum(p.gain for p in pairs), sum(p.loss for p in pairs)
    details = {
        "n": n,
        "items": total,
        "gains": gains,
        "losses": losses,
        "flips": (gains + losses) / n,
        "margin": gate.margin,
        "method": "e-process",
        "seed": seed,
        "bets": decision.bets,
        "e_pass": decision.e_pass,
        "e_fail": decision.e_fail,
    }
    return GateCheck(gate.name, decision.outcome, mean, None, None, -gate.margin, reason, details)


def _must_not_flip(gate: TaskGate, held: list[Pair], total: int) -> GateCheck:
    """Items that were never scored are no proof that they held."""
    lost = [p.baseline.id for p in held if p.loss]
    outcome = Outcome.PASS if len(held) == total else Outcome.INCONCLUSIVE
    return GateCheck(
        f"{gate.name}.must_not_flip",
        Outcome.FAIL if lost else outcome,
        float(len(lost)),
        None,
        None,
        0.0,
        f"{len(lost)} of {len(held)} must-not-flip items lost, {total - len(held)} not scored",
        {"n": len(held), "lost": lost},
    )
