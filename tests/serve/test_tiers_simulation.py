"""Overload, simulated: what tiers promise, beside first come, first served."""

from __future__ import annotations

import pytest

from benchmarks.serve_tiers_simulation import Machine, compare
from benchmarks.tier_load import Workload

Rows = dict[str, dict]


@pytest.fixture(scope="module")
def results() -> Rows:
    return compare(Machine(), Workload(answer_tokens=32), requests=200, load=1.5)


def test_the_paid_tier_hardly_notices(results: Rows) -> None:
    alone = results["paid alone"]["paid"]["ttft_p99"]
    assert results["tiers"]["paid"]["ttft_p99"] <= 1.5 * alone
    assert results["first come"]["paid"]["ttft_p99"] > 5 * alone, "the load is no load"


def test_the_free_tier_degrades_and_never_starves(results: Rows) -> None:
    free, before = results["tiers"]["free"], results["first come"]["free"]
    assert free["refused"] == 0
    assert free["ttft_p100"] < 2 * before["ttft_p100"], "every one got its token"
    assert free["ttft_p50"] > before["ttft_p50"]


def test_admission_keeps_the_promise_to_those_it_lets_in(results: Rows) -> None:
    promise = 3 * results["alone"]["ttft"]
    paid = results["+ admission"]["paid"]
    assert paid["ttft_p99"] <= promise
    assert paid["refused"] < 0.15 * paid["requests"]


def test_a_run_repeats_to_the_bit() -> None:
    workload = Workload(answer_tokens=8)
    assert compare(Machine(), workload, 20) == compare(Machine(), workload, 20)
