"""Task gates: paired non-inferiority on the items of one eval.

H0 is that the candidate loses at least its margin δ. Binary, unclustered scores go through
Tango's score test; graded scores, and items that share a passage or a dialogue, through
clustered bounds of the mean difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quantkit.gate.compare import Pair, paired_rows
from quantkit.gate.early import judge_early
from quantkit.gate.noise_floor import noise_floor
from quantkit.gate.policy import TaskGate
from quantkit.gate.sample_size import fewest_items, infeasible, items_needed
from quantkit.gate.statistics import (
    ALPHA,
    Bounds,
    difference_bounds,
    holm,
    loss_p,
    mcnemar_p,
    score_bounds,
    tango_bounds,
)
from quantkit.gate.words import PERCENT, POINTS, against, outcome_of
from quantkit.results import GateCheck, Outcome, Results

#: A slice is named as regressed, and McNemar's p as significant, below this.
SIGNIFICANT = 0.05


def judge_task(
    gate: TaskGate, candidate: Results, baseline: Results
) -> tuple[list[GateCheck], list[str]]:
    """Paired non-inferiority, and the floor and must-not-flip checks that go with it."""
    pairs = paired_rows(gate.task, candidate.tasks[gate.task], baseline.tasks[gate.task])
    if candidate.tasks[gate.task].early is not None:
        return judge_early(gate, pairs, candidate, baseline), []
    slices = _slices(pairs)
    check = _non_inferiority(gate, pairs, slices)
    checks, warnings = [check], []
    if baseline.noise is not None and gate.task in baseline.noise.tasks:
        floor = noise_floor(gate, pairs, baseline.tasks[gate.task], baseline.noise)
        check = replace(check, details={**check.details, "noise": floor.to_json()})
        checks = [check]
        warnings += floor.warnings(gate)
    if gate.floor is not None:
        checks.append(_floor(gate, gate.floor, pairs))
    if any(p.must_not_flip for p in pairs):
        checks.append(_must_not_flip(gate, pairs))

    if len(pairs) < fewest_items(gate.margin):
        warnings.append(infeasible(gate.name, len(pairs), gate.margin))
    p = check.details.get("mcnemar_p")
    if p is not None and p < SIGNIFICANT and check.value < 0 and check.outcome is not Outcome.FAIL:
        warnings.append(
            f"{gate.name}: significantly worse than the baseline (exact McNemar p = {p:.2g}), "
            "though not shown to be outside its margin"
        )
    for name, s in slices.items():
        if s["p_holm"] < SIGNIFICANT:
            warnings.append(
                f"{gate.name}: slice {name!r} regressed by {-100 * s['difference']:.1f} points "
                f"on {s['n']} items (Holm-adjusted p = {s['p_holm']:.2g})"
            )
    return checks, warnings


def _non_inferiority(
    gate: TaskGate, pairs: tuple[Pair, ...], slices: Mapping[str, Any]
) -> GateCheck:
    """PASS if the lower bound of D is above -margin, FAIL if the upper one is below it."""
    n, clusters = len(pairs), len({p.cluster for p in pairs})
    gains, losses = sum(p.gain for p in pairs), sum(p.loss for p in pairs)
    base, quant = (
        math.fsum(p.baseline.score for p in pairs) / n,
        math.fsum(p.candidate.score for p in pairs) / n,
    )
    details: dict[str, Any] = {
        "n": n,
        "clusters": clusters,
        "baseline": base,
        "candidate": quant,
        "gains": gains,
        "losses": losses,
        "flips": (gains + losses) / n,
        "margin": gate.margin,
        "fewest_items": fewest_items(gate.margin),
    }
    if slices:
        details["slices"] = slices
    bounds = paired_bounds(pairs)
    if _flips_are_all(pairs):
        details["mcnemar_p"] = mcnemar_p(gains, losses)
        # Below this flip rate no model can lose the margin: there is no null to reject.
        details["margin_exceeds_flips"] = gate.margin > (gains + losses) / n
    details["method"] = bounds.method

    outcome = outcome_of(bounds, -gate.margin, "margin")
    reason = (
        f"{100 * quant:.1f} % vs {100 * base:.1f} %: D {POINTS.show(bounds.estimate)} points, "
        + against(bounds, -gate.margin, "margin", POINTS, "cluster of items")
    )
    if outcome is Outcome.INCONCLUSIVE and "mcnemar_p" in details:
        needed = items_needed(gate.margin, (gains + losses) / n)
        details["items_needed"] = needed
        if needed is None or needed > n:
            count = "over 10 million" if needed is None else f"about {needed}"
            reason += f"; {count} items would decide"
    return GateCheck(
        gate.name,
        outcome,
        bounds.estimate,
        bounds.lower,
        bounds.upper,
        -gate.margin,
        reason,
        details,
    )


def paired_bounds(pairs: Sequence[Pair], alpha: float = ALPHA) -> Bounds:
    """One-sided bounds at level ``1 - alpha`` of D, the mean score difference, as a share.

    Tango's for right and wrong on items of their own, `difference_bounds` for the rest.
    """
    if not _flips_are_all(pairs):
        differences = [p.difference for p in pairs]
        return difference_bounds(differences, [p.cluster for p in pairs], alpha)
    n = len(pairs)
    gains, losses = sum(p.gain for p in pairs), sum(p.loss for p in pairs)
    low, high = tango_bounds(gains, losses, n, alpha)
    return Bounds((gains - losses) / n, float(low), float(high), "Tango score")


def _flips_are_all(pairs: Sequence[Pair]) -> bool:
    """Whether counts of flips say all: scores are 0 or 1, and no two items share a cluster."""
    scores = {s for p in pairs for s in (p.baseline.score, p.candidate.score)}
    return scores <= {0.0, 1.0} and len({p.cluster for p in pairs}) == len(pairs)


def _slices(pairs: tuple[Pair, ...]) -> dict[str, dict[str, Any]]:
    """Per slice: items, mean difference, and the Holm-adjusted p of an exact sign test over
    its clusters (an item without a cluster is one)."""
    names = sorted({p.baseline.slice for p in pairs if p.baseline.slice is not None})
    table, p_values = {}, []
    for name in names:
        inside = [p for p in pairs if p.baseline.slice == name]
        sums: dict[str, float] = {}
        for p in inside:
            sums[p.cluster] = sums.get(p.cluster, 0.0) + p.difference
        p_values.append(
            loss_p(sum(s > 0 for s in sums.values()), sum(s < 0 for s in sums.values()))
        )
        table[name] = {
            "n": len(inside),
            "difference": math.fsum(p.difference for p in inside) / len(inside),
        }
    for name, p_holm in zip(names, holm(p_values), strict=True):
        table[name]["p_holm"] = p_holm
    return table


def _floor(gate: TaskGate, floor: float, pairs: tuple[Pair, ...]) -> GateCheck:
    """Both models must be useful: two useless ones are perfectly non-inferior."""
    clusters = [p.cluster for p in pairs]
    sides = {
        "baseline": score_bounds([p.baseline.score for p in pairs], clusters),
        "candidate": score_bounds([p.candidate.score for p in pairs], clusters),
    }
    outcomes = {side: outcome_of(b, floor, "floor") for side, b in sides.items()}
    worst = next(
        o for o in (Outcome.FAIL, Outcome.INCONCLUSIVE, Outcome.PASS) if o in outcomes.values()
    )
    # Of two equally bad sides the lower one is the story.
    side = min((s for s in sides if outcomes[s] is worst), key=lambda s: sides[s].estimate)
    bounds = sides[side]
    return GateCheck(
        f"{gate.name}.floor",
        worst,
        bounds.estimate,
        bounds.lower,
        bounds.upper,
        floor,
        f"{side} {PERCENT.show(bounds.estimate)} %, "
        + against(bounds, floor, "floor", PERCENT, "cluster of items"),
        {s: b.estimate for s, b in sides.items()} | {"method": bounds.method, "n": len(pairs)},
    )


def _must_not_flip(gate: TaskGate, pairs: tuple[Pair, ...]) -> GateCheck:
    held = [p for p in pairs if p.must_not_flip]
    lost = [p.baseline.id for p in held if p.loss]
    reason = f"{len(lost)} of {len(held)} must-not-flip items lost"
    if lost:
        reason += ": " + ", ".join(lost[:5]) + (", …" if len(lost) > 5 else "")
    return GateCheck(
        f"{gate.name}.must_not_flip",
        Outcome.FAIL if lost else Outcome.PASS,
        float(len(lost)),
        None,
        None,
        0.0,
        reason,
        {"n": len(held), "lost": lost},
    )
