"""`benchmarks/serve_tiers.py`: its arithmetic, and a whole run on a tiny model."""

from __future__ import annotations

import argparse
import random

import pytest

from benchmarks import serve_tiers as tiers
from benchmarks.tier_load import Workload
from quantkit.models.runtime import Runtime

OPTIONS = argparse.Namespace(
    checkpoint="x/tiny",
    rounds=2,
    seconds=1.0,
    settle=0.2,
    backlog=4,
    patience=30.0,
    load=1.5,
    prompt_tokens=40,
    answer_tokens=8,
    crowd=24,
    max_sequences=4,
    prefill_chunk=16,
    output=None,
    json=True,
)


def arrival(first: float, end: float) -> tiers.Arrival:
    return tiers.Arrival(0.0, "free-0", (1,), 1, first=first, end=end)


def test_saturation_counts_only_while_requests_wait() -> None:
    """Two slots, a second each: the first end is at 1, the last gets its slot at 4."""
    served = [arrival(i // 2 + 0.0, i // 2 + 1.0) for i in range(10)]
    assert tiers.measure_saturation(served) == pytest.approx(6 / 3)
    # Whoever is last may take as long as it likes.
    served[-1].end = 100.0
    assert tiers.measure_saturation(served) == pytest.approx(6 / 3)


def test_arrivals_settle_and_begin_with_a_backlog() -> None:
    found = tiers.make_arrivals(Workload(0.2, 5, 8), OPTIONS, 50, 100.0, "a")
    assert [(a.at, a.tier, a.counts) for a in found[:4]] == [(0.0, "free", False)] * 4
    assert all(a.counts == (a.at >= 0.2) for a in found[4:])
    assert len({a.prompt_ids for a in found}) == len(found)
    assert max(a.at for a in found) < 1.0


def test_bounds_of_a_ratio() -> None:
    rng = random.Random(0)
    alone = [rng.uniform(1, 2) for _ in range(400)]
    low, high = tiers.bounds(alone, [1.5 * t for t in alone], 0.99)
    assert low == pytest.approx(1.5) == high, "each request slower by the same factor"
    low, high = tiers.bounds(alone, [rng.uniform(1.5, 3) for _ in alone], 0.9)
    assert low < 1.5 < high < 1.7


@pytest.mark.slow
def test_a_whole_run(native: Runtime) -> None:
    found = tiers.compare(native, OPTIONS)
    ways = found["ways"]
    assert list(ways) == ["paid alone", "first come", "tiers", "+ admission"]
    assert set(ways["paid alone"]) == {"paid"}
    sent = [way["paid"]["requests"] for way in ways.values()]
    assert len(set(sent)) == 1, "the same arrivals each way"
    assert ways["tiers"]["paid"]["refused"] == 0
    assert found["load_measured"] > 0
    ratio = found["paid_p99_over_alone"]["tiers"]
    assert ratio["lower"] <= ratio["p99"] <= ratio["upper"]
