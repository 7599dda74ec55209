"""Verdicts: what passes, what fails, what cannot be told, and what may not be compared."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest
from gate_builders import pair_of_results, paired, results, task, text
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import NotComparableError, QuantkitError, UsageError
from quantkit.gate import exit_code, flips, judge, parse_policy
from quantkit.gate.statistics import tango_bounds
from quantkit.results import Outcome, Results

FIVE = parse_policy({"intent.acc": {"margin": 0.05}})
NLL = [3.0 + 0.01 * i for i in range(24)]


def policy(**gates: dict[str, float]) -> Any:
    return parse_policy({k.replace("__", "."): v for k, v in gates.items()})


# -- tasks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "outcome", "code"),
    [
        ((245, 14, 20, 141), Outcome.PASS, 0),
        ((215, 5, 50, 150), Outcome.FAIL, 1),
        ((60, 3, 5, 32), Outcome.INCONCLUSIVE, 3),
    ],
)
def test_outcomes(counts: tuple[int, int, int, int], outcome: Outcome, code: int) -> None:
    verdict = judge(*pair_of_results(*counts), FIVE)
    assert verdict.outcome is outcome
    assert verdict.exit_code == exit_code(verdict) == code
    (check,) = verdict.checks
    low, high = tango_bounds(counts[1], counts[2], sum(counts))
    assert (check.lower, check.upper) == (low, high)
    json.dumps(verdict.to_json(), allow_nan=False)


def test_reasons_read_aloud() -> None:
    reason = judge(*pair_of_results(245, 14, 20, 141), FIVE).checks[0].reason
    assert reason == "61.7 % vs 63.1 %: D −1.4 points, 95 % ≥ −3.8 > −5.0 margin"
    reason = judge(*pair_of_results(215, 5, 50, 150), FIVE).checks[0].reason
    assert reason == "52.4 % vs 63.1 %: D −10.7 points, 95 % ≤ −8.1 < −5.0 margin"
    reason = judge(*pair_of_results(60, 3, 5, 32), FIVE).checks[0].reason
    assert "95 % bounds −7.4 and +3.0 hold the −5.0 margin; about " in reason
    assert reason.endswith("items would decide")


def test_inconclusive_can_be_told_to_fail_or_warn() -> None:
    verdict = judge(*pair_of_results(60, 3, 5, 32), FIVE)
    assert exit_code(verdict, "fail") == 1
    assert exit_code(verdict, "warn") == 0
    failed = judge(*pair_of_results(215, 5, 50, 150), FIVE)
    assert exit_code(failed, "warn") == 1


def test_rounding_never_hides_the_decision() -> None:
    low, _ = tango_bounds(14, 20, 420)
    margin = -float(low) * (1 + 1e-5)  # a hair outside the bound
    verdict = judge(
        *pair_of_results(245, 14, 20, 141), parse_policy({"intent.acc": {"margin": margin}})
    )
    assert verdict.outcome is Outcome.PASS
    shown = verdict.checks[0].reason.split("≥ ")[1].removesuffix(" margin").split(" > ")
    assert shown[0] != shown[1]


counts_of_items = st.tuples(*[st.integers(0, 60)] * 4).filter(sum)


@settings(max_examples=60, deadline=None)
@given(counts_of_items, st.floats(0.005, 0.5))
def test_never_passes_unless_the_bound_does(
    counts: tuple[int, int, int, int], margin: float
) -> None:
    held = parse_policy({"intent.acc": {"margin": margin}})
    (check,) = judge(*pair_of_results(*counts), held).checks
    assert check.lower is not None
    assert check.upper is not None
    assert (check.outcome is Outcome.PASS) == (check.lower > -margin)
    assert (check.outcome is Outcome.FAIL) == (check.upper < -margin)
    assert check.lower <= check.value <= check.upper


@settings(max_examples=30, deadline=None)
@given(counts_of_items, st.booleans(), st.randoms())
def test_row_order_changes_nothing(
    counts: tuple[int, int, int, int], clustered: bool, rng: random.Random
) -> None:
    n = sum(counts)
    changes = {"slice": ["ab"[i % 2] for i in range(n)]}
    if clustered:
        changes["cluster"] = [f"c{i // 3}" for i in range(n)]
    candidate, baseline = pair_of_results(*counts, **changes)

    def shuffled(side: Results) -> Results:
        mixed = list(side.tasks["intent"].rows)
        rng.shuffle(mixed)
        return replace(side, tasks={"intent": replace(side.tasks["intent"], rows=tuple(mixed))})

    again = shuffled(candidate), shuffled(baseline)
    assert judge(*again, FIVE) == judge(candidate, baseline, FIVE)
    assert flips(*again, FIVE) == flips(candidate, baseline, FIVE)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=200))
def test_identical_results_differ_by_nothing(scores: list[float]) -> None:
    same = results({"intent": task(scores)})
    verdict = judge(same, same, FIVE)
    assert verdict.checks[0].value == 0
    assert verdict.outcome is not Outcome.FAIL
    assert not flips(same, same, FIVE)


def test_too_few_items_say_how_many_are_needed() -> None:
    held = parse_policy({"intent.acc": {"margin": 0.02}})
    verdict = judge(*pair_of_results(60, 0, 0, 40), held)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert any("even zero flips could not pass" in w for w in verdict.warnings)
    assert any("you need 133 items" in w for w in verdict.warnings)


def test_significantly_worse_inside_the_margin_is_a_warning() -> None:
    verdict = judge(*pair_of_results(700, 2, 14, 284), FIVE)
    assert verdict.outcome is Outcome.PASS
    assert any("McNemar p = 0.0042" in w for w in verdict.warnings)
    assert not judge(*pair_of_results(700, 14, 2, 284), FIVE).warnings


def test_clusters_are_honoured() -> None:
    # The same flips, once spread over items and once inside few dialogues.
    counts = (200, 4, 14, 182)
    alone = judge(*pair_of_results(*counts), FIVE).checks[0]
    labels = [f"c{i // 10}" for i in range(400)]
    together = judge(*pair_of_results(*counts, cluster=labels), FIVE).checks[0]
    assert alone.lower is not None
    assert together.lower is not None
    assert together.lower < alone.lower
    assert together.details["clusters"] == 40
    assert "mcnemar_p" not in together.details


def test_clusters_of_one_item_are_no_clusters() -> None:
    labels = [f"c{i}" for i in range(420)]
    plain, labelled = (
        judge(*pair_of_results(245, 14, 20, 141, **c), FIVE) for c in ({}, {"cluster": labels})
    )
    assert plain == labelled


def test_one_cluster_is_inconclusive() -> None:
    verdict = judge(*pair_of_results(5, 0, 1, 4, cluster=["c"] * 10), FIVE)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "one cluster of items bounds nothing" in verdict.checks[0].reason
    assert verdict.checks[0].lower is None


def test_graded_scores() -> None:
    rng = random.Random(0)
    base = [rng.random() for _ in range(300)]
    near = [min(1.0, max(0.0, s + rng.gauss(-0.005, 0.05))) for s in base]
    far = [max(0.0, s - 0.2) for s in base]
    baseline = results({"intent": task(base)})
    assert judge(results({"intent": task(near)}), baseline, FIVE).outcome is Outcome.PASS
    assert judge(results({"intent": task(far)}), baseline, FIVE).outcome is Outcome.FAIL


@pytest.mark.parametrize(
    ("counts", "outcome", "side"),
    [
        ((300, 10, 10, 100), Outcome.PASS, "baseline 73.8 %"),
        ((40, 5, 5, 370), Outcome.FAIL, "10.7 %"),
        ((200, 10, 20, 190), Outcome.INCONCLUSIVE, "candidate 50.0 %"),
    ],
)
def test_floor(counts: tuple[int, int, int, int], outcome: Outcome, side: str) -> None:
    held = parse_policy({"intent.acc": {"margin": 0.1, "floor": 0.5}})
    check = judge(*pair_of_results(*counts), held).checks[1]
    assert check.name == "intent.acc.floor"
    assert check.outcome is outcome
    assert side in check.reason


def test_two_useless_models_fail_their_floor() -> None:
    held = parse_policy({"intent.acc": {"margin": 0.1, "floor": 0.3}})
    verdict = judge(*pair_of_results(0, 0, 0, 400), held)
    assert verdict.checks[0].outcome is Outcome.PASS
    assert verdict.outcome is Outcome.FAIL


def test_must_not_flip() -> None:
    counts = (245, 14, 20, 141)
    marked = [False] * 420
    marked[0] = marked[245] = True  # right in both; gained
    verdict = judge(*pair_of_results(*counts, must_not_flip=marked), FIVE)
    assert verdict.checks[1].name == "intent.acc.must_not_flip"
    assert verdict.outcome is Outcome.PASS
    marked[260] = True  # lost
    verdict = judge(*pair_of_results(*counts, must_not_flip=marked), FIVE)
    assert verdict.outcome is Outcome.FAIL
    assert verdict.checks[0].outcome is Outcome.PASS
    assert verdict.checks[1].reason == "1 of 3 must-not-flip items lost: item-0260"


def test_regressed_slices_are_named() -> None:
    counts = (360, 0, 12, 48)
    slices = ["refunds" if 355 <= i < 375 else "rest" for i in range(420)]
    verdict = judge(*pair_of_results(*counts, slice=slices), FIVE)
    assert any(
        "slice 'refunds' regressed by 60.0 points on 20 items" in w for w in verdict.warnings
    )
    assert not any("'rest'" in w for w in verdict.warnings)
    assert verdict.checks[0].details["slices"]["rest"]["p_holm"] == 1.0


def test_flips_are_listed_losses_first() -> None:
    found = flips(*pair_of_results(5, 1, 2, 2), FIVE)
    assert [f.direction for f in found] == ["loss", "loss", "gain"]
    first = found[0]
    assert (first.baseline_prediction, first.candidate_prediction) == ("yes", "no")
    assert (first.prompt, first.target, first.task) == ("prompt 6", "yes", "intent")


# -- text and cost ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "outcome"),
    [(0.04, Outcome.PASS), (0.03, Outcome.INCONCLUSIVE), (0.02, Outcome.FAIL)],
)
def test_kl(limit: float, outcome: Outcome) -> None:
    scored = results(text=text(NLL, kl=[0.02 + 0.001 * (i % 21) for i in range(24)]))
    verdict = judge(scored, results(text=text(NLL)), policy(kl__mean={"max": limit}))
    assert verdict.outcome is outcome
    assert "nats/token" in verdict.checks[0].reason


def test_kl_needs_no_text_of_the_baseline() -> None:
    scored = results(text=text(NLL, kl=[0.02] * 24))
    assert judge(scored, results(), policy(kl__mean={"max": 0.05})).outcome is Outcome.PASS


@pytest.mark.parametrize(
    "gate", [{"kl.mean": {"max": 1}}, {"kl.p99": {"max": 1}}, {"top1": {"min": 0.5}}]
)
def test_divergence_without_a_reference_says_what_to_run(gate: dict[str, Any]) -> None:
    scored = results(text=text(NLL))
    with pytest.raises(UsageError, match="quantkit eval --reference MODEL"):
        judge(scored, scored, parse_policy(gate))


def test_kl_p99_is_compared_as_it_is() -> None:
    scored = results(text=text(NLL, p99=0.5))
    assert judge(scored, scored, policy(kl__p99={"max": 0.5})).outcome is Outcome.PASS
    verdict = judge(scored, scored, policy(kl__p99={"max": 0.49}))
    assert verdict.outcome is Outcome.FAIL
    assert verdict.checks[0].reason == "0.5000 nats at the 99th percentile > 0.4900 max"


@pytest.mark.parametrize(
    ("limit", "outcome"),
    [(0.90, Outcome.PASS), (0.946, Outcome.INCONCLUSIVE), (0.99, Outcome.FAIL)],
)
def test_top1(limit: float, outcome: Outcome) -> None:
    scored = results(text=text(NLL, top1=[935 + i % 31 for i in range(24)]))
    assert judge(scored, scored, policy(top1={"min": limit})).outcome is outcome


@pytest.mark.parametrize(
    ("limit", "outcome"),
    [(1.05, Outcome.PASS), (1.02, Outcome.INCONCLUSIVE), (1.005, Outcome.FAIL)],
)
def test_perplexity_ratio(limit: float, outcome: Outcome) -> None:
    worse = [x + 0.0198 + 0.002 * (i % 5 - 2) for i, x in enumerate(NLL)]
    verdict = judge(
        results(text=text(worse)), results(text=text(NLL)), policy(perplexity__ratio={"max": limit})
    )
    assert verdict.outcome is outcome
    assert verdict.checks[0].value == pytest.approx(math.exp(0.0198), rel=1e-3)


def test_a_ruined_model_fails_with_finite_numbers() -> None:
    verdict = judge(
        results(text=text([2000.0] * 24)),
        results(text=text(NLL)),
        policy(perplexity__ratio={"max": 1.1}),
    )
    assert verdict.outcome is Outcome.FAIL
    assert len(verdict.checks[0].reason) < 120
    json.dumps(verdict.to_json(), allow_nan=False)


def test_one_window_is_inconclusive() -> None:
    scored = results(text=text([3.0], kl=[0.001]))
    verdict = judge(scored, scored, policy(kl__mean={"max": 0.05}))
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "one window of text bounds nothing" in verdict.checks[0].reason


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_runtime_errors(bad: float) -> None:
    good = results(text=text(NLL, kl=[0.1] * 24))
    for broken, gate in (
        (text([bad] * 24), {"perplexity.ratio": {"max": 1.1}}),
        (text(NLL, kl=[bad] * 24), {"kl.mean": {"max": 1}}),
        (text(NLL, p99=bad), {"kl.p99": {"max": 1}}),
    ):
        with pytest.raises(QuantkitError) as caught:
            judge(results(text=broken), good, parse_policy(gate))
        assert caught.value.exit_code == 4
    with pytest.raises(QuantkitError) as caught:
        judge(results({"intent": task([bad])}), results({"intent": task([1.0])}), FIVE)
    assert caught.value.exit_code == 4


def test_size() -> None:
    small = results(cost={"size_bytes": 81, "bits_per_weight": 4.5, "reference_size_bytes": 270})
    big = results(cost={"size_bytes": 100, "bits_per_weight": 16})
    verdict = judge(
        small, big, policy(size__ratio={"max": 0.3}, size__bits_per_weight={"max": 4.5})
    )
    assert verdict.outcome is Outcome.PASS
    assert verdict.checks[0].value == pytest.approx(0.3)
    # The baseline's size stands in only where the candidate does not know its original.
    bare = results(cost={"size_bytes": 81})
    assert judge(bare, big, policy(size__ratio={"max": 0.3})).outcome is Outcome.FAIL
    with pytest.raises(UsageError, match="hold no bits_per_weight"):
        judge(bare, big, policy(size__bits_per_weight={"max": 5}))
    with pytest.raises(QuantkitError, match="not a number above 0"):
        judge(results(cost={"size_bytes": -1}), big, policy(size__ratio={"max": 1}))


# -- comparability ---------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["tokenizer", "chat_template", "lm_eval", "seed"])
def test_other_systems_are_not_comparable(key: str) -> None:
    candidate, baseline = pair_of_results(5, 1, 1, 3)
    other = replace(candidate, fingerprint={**candidate.fingerprint, key: "other"})
    absent = replace(candidate, fingerprint={})
    for wrong in (other, absent):
        with pytest.raises(NotComparableError, match=key if wrong is other else "tokenizer"):
            judge(wrong, baseline, FIVE)


def test_model_and_kernels_may_differ() -> None:
    candidate, baseline = pair_of_results(245, 14, 20, 141)
    other = {**candidate.fingerprint, "model": "x", "kernels": "native/int8"}
    assert judge(replace(candidate, fingerprint=other), baseline, FIVE).outcome is Outcome.PASS


def test_other_items_are_not_comparable() -> None:
    candidate, baseline = pair_of_results(5, 1, 1, 3)
    ours = candidate.tasks["intent"]

    def with_task(**changes: Any) -> Results:
        return results({"intent": replace(ours, **changes)})

    for wrong, said in (
        (with_task(hash="other"), "its file or data differ"),
        (with_task(rows=ours.rows[:-1]), r"1 \('item-0009'\) only in the baseline, 0 only"),
        (with_task(rows=(*ours.rows[:-1], replace(ours.rows[-1], hash="x"))), "another content"),
        (with_task(rows=(*ours.rows[:-1], replace(ours.rows[-1], cluster="x"))), "another cluster"),
        (with_task(metric="f1"), "the candidate has no intent.acc"),
        (results(), "the candidate has no intent.acc"),
    ):
        with pytest.raises(NotComparableError, match=said) as caught:
            judge(wrong, baseline, FIVE)
        assert caught.value.exit_code == 5


def test_other_text_is_not_comparable() -> None:
    held = policy(perplexity__ratio={"max": 1.1})
    baseline = results(text=text(NLL))
    for wrong, said in (
        (text(NLL, hash="other"), "held-out text differs"),
        (text(NLL, seq_len=512), "seq_len differs"),
        (text(NLL[:-1]), "number of windows differs"),
        (text(NLL, tokens=999), "window 0 of the text has 999 tokens"),
    ):
        with pytest.raises(NotComparableError, match=said):
            judge(results(text=wrong), baseline, held)
    with pytest.raises(NotComparableError, match="the candidate has no held-out text"):
        judge(results(), baseline, held)
    with pytest.raises(NotComparableError, match="the baseline has no held-out text"):
        judge(baseline, results(), held)


def test_a_policy_that_names_what_neither_has_is_a_usage_error() -> None:
    candidate, baseline = pair_of_results(5, 1, 1, 3)
    for gate, said in (
        ({"intents.acc": {"margin": 0.05}}, r"in neither of the results; they hold intent\.acc"),
        ({"intent.f1": {"margin": 0.05}}, "in neither of the results"),
        ({"kl.mean": {"max": 0.05}}, "run `quantkit eval --text FILE`"),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            judge(candidate, baseline, parse_policy(gate))
        assert caught.value.exit_code == 2


def test_scores_that_are_not_shares_are_refused() -> None:
    percent = results({"intent": task([0.0, 100.0])})
    with pytest.raises(UsageError, match=r"score 100, and a margin in points needs scores"):
        judge(percent, percent, FIVE)


def test_no_rows_and_double_rows_are_runtime_errors() -> None:
    empty = results({"intent": task([])})
    with pytest.raises(QuantkitError, match="has no rows"):
        judge(empty, empty, FIVE)
    rows = task([1.0, 0.0]).rows
    twice = results({"intent": replace(task([]), rows=(rows[0], rows[0]))})
    with pytest.raises(QuantkitError, match="twice"):
        judge(twice, twice, FIVE)


def test_worst_outcome_wins() -> None:
    base, quant = paired(245, 14, 20, 141)
    few_base, few_quant = paired(60, 3, 5, 32)
    cost = {"size_bytes": 81, "reference_size_bytes": 270}
    candidate = results({"intent": task(quant), "few": task(few_quant)}, cost=cost)
    baseline = results({"intent": task(base), "few": task(few_base)})
    gates: dict[str, Any] = {"intent.acc": {"margin": 0.05}, "few.acc": {"margin": 0.05}}
    assert judge(candidate, baseline, parse_policy(gates)).outcome is Outcome.INCONCLUSIVE
    gates["size.ratio"] = {"max": 0.2}
    verdict = judge(candidate, baseline, parse_policy(gates))
    assert verdict.outcome is Outcome.FAIL
    assert [c.name for c in verdict.checks] == ["intent.acc", "few.acc", "size.ratio"]


def test_no_policy_means_the_default_one() -> None:
    verdict = judge(*pair_of_results(245, 14, 20, 141))
    assert [(c.name, c.limit) for c in verdict.checks] == [("intent.acc", -0.05)]
