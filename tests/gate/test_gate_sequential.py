"""Stopping early: what the e-process decides, how often it errs, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from gate_builders import paired, results, task

from quantkit.errors import NotComparableError, UsageError
from quantkit.gate import judge, parse_policy
from quantkit.gate.early import stopping_rule
from quantkit.gate.sequential import STAKES, bet_order, bets, capital, decide
from quantkit.results import Outcome, Results

FIVE = parse_policy({"intent.acc": {"margin": 0.05}})


def differences(rng, repeats: int, n: int, flips: float, difference: float):
    u = rng.random((repeats, n))
    loss = (flips - difference) / 2
    return np.where(u < loss, -1.0, np.where(u < flips, 1.0, 0.0))


def ever(d, margin: float) -> tuple[float, float]:
    """Shares of runs whose capital K⁺, or K⁻, ever reaches 20."""
    log_pass, log_fail = capital(d + margin, margin)
    return tuple(float((k.max(axis=1) >= math.log(20)).mean()) for k in (log_pass, log_fail))


def test_capital_by_its_definition() -> None:
    x, margin = np.array([0.05, -0.95, 0.05, 1.05]), 0.05
    up = np.mean([np.prod(1 + s / (1 - margin) * x) for s in STAKES])
    down = np.mean([np.prod(1 - s / (1 + margin) * x) for s in STAKES])
    log_pass, log_fail = capital(x, margin)
    assert math.exp(log_pass[-1]) == pytest.approx(up)
    assert math.exp(log_fail[-1]) == pytest.approx(down)


@pytest.mark.parametrize("flips", [0.05, 0.2])
def test_looking_after_every_item_errs_one_time_in_twenty(flips: float) -> None:
    # At a true loss of the margin both nulls hold; over all looks each is refuted in 5 % at most.
    d = differences(np.random.default_rng(0), 1500, 400, flips, -0.05)
    passed, failed = ever(d, 0.05)
    assert passed <= 0.05
    assert failed <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("flips", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("margin", [0.02, 0.05])
def test_long_runs_err_one_time_in_twenty(flips: float, margin: float) -> None:
    rng = np.random.default_rng(1)
    runs = [ever(differences(rng, 500, 3000, flips, -margin), margin) for _ in range(8)]
    passed, failed = np.mean(runs, axis=0)
    assert passed <= 0.05
    assert failed <= 0.05


def test_a_broken_model_fails_within_some_forty_items() -> None:
    d = differences(np.random.default_rng(2), 300, 200, 0.25, -0.25)
    _, log_fail = capital(d + 0.05, 0.05)
    crossed = log_fail >= math.log(20)
    assert crossed.any(axis=1).mean() > 0.95
    assert 15 <= np.median(crossed.argmax(axis=1)[crossed.any(axis=1)] + 1) <= 45


def test_decide_reports_the_first_crossing() -> None:
    broken = decide([-0.95] * 10, 0.05)
    assert broken.outcome is Outcome.FAIL
    assert broken.bets < 10
    assert broken.e_fail >= 20 > decide([-0.95] * (broken.bets - 1), 0.05).e_fail
    held = decide([0.05] * 400, 0.05)
    assert held.outcome is Outcome.PASS
    assert decide([0.05] * 10, 0.05).outcome is Outcome.INCONCLUSIVE
    assert decide([], 0.05).bets == 0


def test_decide_refuses_what_could_ruin_the_bettor() -> None:
    for wrong in (1.5, -1.2, math.nan):
        with pytest.raises(UsageError, match=r"within -1\.\.1"):
            decide([wrong], 0.05)
    with pytest.raises(UsageError, match="margin"):
        decide([0.0], 1.5)


def test_the_order_is_seeded_and_keeps_clusters_together() -> None:
    rows = task([1.0] * 9, cluster=["a", "b", None] * 3).rows
    order = bet_order(rows, 3)
    assert order == bet_order(reversed(rows), 3)
    assert sorted(map(len, order)) == [1, 1, 1, 3, 3]
    assert any(bet_order(rows, seed) != order for seed in range(5))
    # A cluster's bet is its sum over the largest cluster: within the range of one item.
    made = bets(order, {row.id: -1.0 for row in rows}, 0.05)
    assert min(made) == pytest.approx(-0.95)
    assert len(made) == 5


def scored_early(counts: tuple[int, int, int, int], seed: int = 0) -> tuple[Results, Results]:
    """(candidate scored until decided, baseline), as `quantkit eval --stop-early` does it."""
    base, quant = paired(*counts)
    baseline, full = task(base), task(quant)
    order, decided = stopping_rule(FIVE.tasks[0], baseline, seed)
    scores, by_id = {}, {row.id: row for row in full.rows}
    for group in order:
        scores |= {name: by_id[name].score for name in group}
        if decided(scores):
            break
    rows = tuple(row for row in full.rows if row.id in scores)
    candidate = replace(full, rows=rows, early=seed)
    return results({"intent": candidate}), results({"intent": baseline})


@pytest.mark.parametrize(
    ("counts", "outcome"),
    [
        ((150, 5, 110, 155), Outcome.FAIL),
        ((300, 1, 1, 118), Outcome.PASS),
        ((40, 2, 3, 15), Outcome.INCONCLUSIVE),
    ],
)
def test_early_runs_are_judged_by_their_e_process_alone(counts, outcome: Outcome) -> None:
    candidate, baseline = scored_early(counts)
    (check,) = judge(candidate, baseline, FIVE).checks
    assert check.outcome is outcome
    assert check.details["method"] == "e-process"
    assert check.lower is None
    if outcome is Outcome.INCONCLUSIVE:
        assert check.details["n"] == sum(counts)
    else:
        assert check.details["n"] < sum(counts)
    again = Results.from_json(candidate.to_json())
    assert again == candidate
    assert again.tasks["intent"].early == 0


def test_a_second_look_by_other_means_is_not_given() -> None:
    # Tango passes these counts when all items are scored; undecided early runs stay so.
    counts = (200, 8, 8, 184)
    base, quant = paired(*counts)
    whole = results({"intent": task(quant)}), results({"intent": task(base)})
    assert judge(*whole, FIVE).outcome is Outcome.PASS
    early = results({"intent": replace(task(quant), early=0)})
    verdict = judge(early, whole[1], FIVE)
    assert verdict.checks[0].details["method"] == "e-process"
    assert verdict.outcome is not Outcome.FAIL


def test_items_that_were_picked_are_refused() -> None:
    candidate, baseline = scored_early((150, 5, 110, 155))
    rows = candidate.tasks["intent"].rows
    best = tuple(sorted(rows, key=lambda r: -r.score))[: len(rows) // 2]
    picked = results({"intent": replace(candidate.tasks["intent"], rows=best)})
    with pytest.raises(NotComparableError, match="not the first ones of the order"):
        judge(picked, baseline, FIVE)
    with pytest.raises(NotComparableError, match="the baseline was scored with --stop-early"):
        judge(candidate, candidate, FIVE)


def test_floors_need_every_item() -> None:
    candidate, baseline = scored_early((150, 5, 110, 155))
    held = parse_policy({"intent.acc": {"margin": 0.05, "floor": 0.5}})
    with pytest.raises(UsageError, match="a floor cannot be held"):
        judge(candidate, baseline, held)


def test_must_not_flip_items_that_were_not_scored_are_no_proof() -> None:
    candidate, baseline = scored_early((300, 1, 1, 118))
    last = {r.id for r in baseline.tasks["intent"].rows} - {
        r.id for r in candidate.tasks["intent"].rows
    }
    marked = tuple(replace(r, must_not_flip=r.id in last) for r in baseline.tasks["intent"].rows)
    held = results({"intent": replace(baseline.tasks["intent"], rows=marked)})
    check = judge(candidate, held, FIVE).checks[1]
    assert check.outcome is Outcome.INCONCLUSIVE
    assert f"{len(last)} not scored" in check.reason
