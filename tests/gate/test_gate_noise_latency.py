"""The noise floor under a flip rate, and latency gates."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gate_builders import pair_of_results, paired, results, task, text

from quantkit.errors import NotComparableError, QuantkitError, UsageError
from quantkit.gate import judge, parse_policy
from quantkit.gate.noise_floor import flip_rate
from quantkit.noise import NoiseFloor, TaskNoise
from quantkit.results import Outcome, Results
from quantkit.timings import Timings

FIVE = parse_policy({"intent.acc": {"margin": 0.05}})
HOST = {"machine": "x86_64", "cpu": "one", "threads": 4}

# -- noise -----------------------------------------------------------------------------------


def with_noise(counts: tuple[int, int, int, int], flips: int, **changes: Any) -> Any:
    """(candidate, baseline whose second run flipped its first items)."""
    candidate, baseline = pair_of_results(*counts, **changes)
    rows = baseline.tasks["intent"].rows
    moved = {r.id: 1.0 - 2 * r.score for r in rows[:flips]}
    noise = NoiseFloor("modules", {"intent": TaskNoise(len(rows), moved)}, 0.001)
    held = Results(baseline.fingerprint, baseline.tasks, noise=noise)
    return candidate, Results.from_json(held.to_json())


def test_excess_flips_are_reported() -> None:
    candidate, baseline = with_noise((245, 14, 20, 141), flips=6)
    assert baseline.noise is not None
    assert flip_rate(baseline.tasks["intent"], baseline.noise.tasks["intent"]) == 6 / 420
    verdict = judge(candidate, baseline, FIVE)
    noise = verdict.checks[0].details["noise"]
    assert noise["flips"] == pytest.approx(6 / 420)
    assert noise["excess_flips"] == pytest.approx(28 / 420)
    assert noise["kernels"] == "modules"
    assert not verdict.warnings
    assert verdict.outcome is Outcome.PASS


def test_noise_that_hides_the_margin_is_said() -> None:
    verdict = judge(*with_noise((245, 14, 20, 141), flips=180), FIVE)
    (warning,) = [w for w in verdict.warnings if "noise floor" in w]
    assert "alone makes the 5-point margin inconclusive: 42.9 % of items flip" in warning


def test_noise_of_clusters_uses_their_bounds() -> None:
    clusters = [f"c{i // 20}" for i in range(420)]
    verdict = judge(*with_noise((245, 14, 20, 141), flips=100, cluster=clusters), FIVE)
    alone = judge(*with_noise((245, 14, 20, 141), flips=100), FIVE)
    widths = [v.checks[0].details["noise"]["half_width"] for v in (verdict, alone)]
    assert widths[0] > 2 * widths[1]
    assert any("noise floor" in w for w in verdict.warnings)


def test_the_noise_of_kl_stands_beside_it() -> None:
    candidate = results(text=text([3.0] * 24, kl=[0.02] * 24))
    baseline = replace(results(text=text([3.0] * 24)), noise=NoiseFloor("m", {}, 0.001))
    held = parse_policy({"kl.mean": {"max": 0.05}})
    assert judge(candidate, baseline, held).checks[0].details["noise"] == 0.001


def test_noise_of_other_items_is_refused() -> None:
    candidate, baseline = pair_of_results(245, 14, 20, 141)
    for noise in (TaskNoise(419, {}), TaskNoise(420, {"nobody": 1.0})):
        held = Results(
            baseline.fingerprint, baseline.tasks, noise=NoiseFloor("m", {"intent": noise})
        )
        with pytest.raises(QuantkitError, match="noise floor is of"):
            judge(candidate, held, FIVE)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_damaged_noise_is_refused(bad: float) -> None:
    doc = results({"t": task([1.0])}).to_json()
    doc["noise"] = {"kernels": "m", "kl_mean": None, "tasks": {"t": {"n": 1, "differences": {}}}}
    assert Results.from_json(doc).noise is not None
    doc["noise"]["tasks"]["t"]["differences"] = {"item-0000": bad}
    with pytest.raises(UsageError, match="not finite"):
        Results.from_json(doc)


# -- latency ---------------------------------------------------------------------------------


def timed(seconds: Any, *, tpot: float = 0.02, host: Any = HOST, concurrency: int = 4) -> Results:
    prompts = {f"p{i:02d}": (float(s),) * 3 for i, s in enumerate(seconds)}
    flat = dict.fromkeys(prompts, (tpot,))
    return results().__class__(
        results().fingerprint, timings=Timings(host, concurrency, prompts, flat)
    )


def latency(candidate: Results, baseline: Results, limit: float = 1.05, kind: str = "ttft") -> Any:
    held = parse_policy({f"latency.{kind}": {"max": limit}})
    return judge(candidate, baseline, held).checks[0]


BASE = np.random.default_rng(0).gamma(4, 0.05, 30)


def test_latency_outcomes() -> None:
    noise = np.exp(np.random.default_rng(1).normal(0, 0.05, 30))
    for ratio, outcome in ((0.8, Outcome.PASS), (1.05, Outcome.INCONCLUSIVE), (1.3, Outcome.FAIL)):
        check = latency(timed(BASE * ratio * noise), timed(BASE))
        assert check.outcome is outcome, check.reason
        assert check.value == pytest.approx(ratio, rel=0.05)
        assert check.lower < check.value < check.upper


def test_ttft_and_tpot_are_gated_apart() -> None:
    slow_start = timed(BASE * 2, tpot=0.01)
    assert latency(slow_start, timed(BASE)).outcome is Outcome.FAIL
    check = latency(slow_start, timed(BASE), 0.9, "tpot")
    assert check.outcome is Outcome.PASS
    assert check.value == pytest.approx(0.5)


def test_one_slow_repeat_is_not_the_model() -> None:
    candidate = timed(BASE)
    assert candidate.timings is not None
    disturbed = {k: (v[0], v[1], 50.0) for k, v in candidate.timings.ttft.items()}
    timings = Timings(HOST, 4, disturbed, candidate.timings.tpot)
    again = Results.from_json(Results(candidate.fingerprint, timings=timings).to_json())
    assert latency(again, timed(BASE)).value == pytest.approx(1.0)


def test_few_prompts_bound_nothing() -> None:
    check = latency(timed(BASE[:7] * 3), timed(BASE[:7]))
    assert check.outcome is Outcome.INCONCLUSIVE
    assert "7 prompts bound nothing; at least 8" in check.reason


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (timed(BASE, host={**HOST, "cpu": "another"}), "host cpu differs"),
        (timed(BASE, host={**HOST, "threads": 8}), "host threads differs"),
        (timed(BASE, concurrency=1), "concurrency differs"),
        (timed(BASE[:20]), "prompts differ"),
        (results(), "the candidate has no timings"),
    ],
)
def test_other_hosts_and_prompts_are_not_compared(candidate: Results, message: str) -> None:
    with pytest.raises(NotComparableError, match=message):
        latency(candidate, timed(BASE))


def test_results_without_timings() -> None:
    with pytest.raises(UsageError, match="neither of the results holds timings"):
        latency(results(), results())


@pytest.mark.parametrize("wrong", [[], [0.0], [-1.0], [math.nan]])
def test_damaged_timings_are_refused(wrong: list[float]) -> None:
    doc = timed(BASE).to_json()
    doc["timings"]["ttft"]["p00"] = wrong
    with pytest.raises(UsageError, match="ttft"):
        Results.from_json(doc)


def test_identical_scores_have_no_noise() -> None:
    base, _ = paired(200, 0, 0, 220)
    held = Results(
        results().fingerprint,
        {"intent": task(base)},
        noise=NoiseFloor("m", {"intent": TaskNoise(420, {})}),
    )
    noise = judge(held, held, FIVE).checks[0].details["noise"]
    assert noise["flips"] == noise["excess_flips"] == 0
    assert 0 < noise["half_width"] < 0.05
