"""Allocation against brute force, and the properties that any size must have."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit import allocate as solver
from quantkit.allocate import Option, allocate, frontier
from quantkit.errors import UsageError

OPTION = st.builds(
    Option,
    name=st.just("o"),
    bits=st.integers(0, 60).map(lambda n: 8 * n),
    cost=st.integers(-1000, 10_000).map(lambda n: n / 1000),
)
#: Time says nothing about a search of this size.
UNTIMED = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
GROUPS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


def totals(groups: list[list[Option]], chosen: tuple[int, ...]) -> tuple[int, float]:
    picked = [options[i] for options, i in zip(groups, chosen, strict=True)]
    return sum(o.bits for o in picked), math.fsum(o.cost for o in picked)


def brute_force(groups: list[list[Option]], budget: int) -> float:
    every = (totals(groups, c) for c in itertools.product(*(range(len(g)) for g in groups)))
    return min(cost for bits, cost in every if bits <= budget)


@given(GROUPS, st.integers(0, 3000))
@UNTIMED
def test_equals_brute_force(groups: list[list[Option]], spare: int) -> None:
    budget = sum(min(o.bits for o in options) for options in groups) + spare
    bits, cost = totals(groups, allocate(groups, budget))
    assert bits <= budget
    assert cost == pytest.approx(brute_force(groups, budget), abs=1e-12)


@given(GROUPS, st.integers(0, 3000))
@UNTIMED
def test_a_coarse_unit_keeps_the_budget(groups: list[list[Option]], spare: int) -> None:
    """With few states bits are rounded up: within budget, never better than the best."""
    budget = sum(min(o.bits for o in options) for options in groups) + spare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "STATES", 7)
        bits, cost = totals(groups, allocate(groups, budget))
    assert bits <= budget
    assert cost >= brute_force(groups, budget) - 1e-12


@given(GROUPS)
@UNTIMED
def test_the_frontier_is_convex_and_nothing_lies_below_it(groups: list[list[Option]]) -> None:
    points = frontier(groups)
    slopes = [(d - b) / (c - a) for (a, b), (c, d) in itertools.pairwise(points)]
    assert all(s < 0 for s in slopes)
    assert all(t >= s - 1e-9 for s, t in itertools.pairwise(slopes))
    for bits, cost in points:
        assert brute_force(groups, bits) == pytest.approx(cost, abs=1e-9)


def test_sizes_of_a_real_model_are_solved_exactly() -> None:
    """Bits of 576-column layers in groups of 32 and 64: a gcd far above one bit."""
    sizes = [576 * 960, 576 * 576, 576 * 3072, 1536 * 576] * 30
    rates = (3.25, 3.5, 4.25, 4.5, 5.25, 6.25, 8.5)
    groups = [
        [Option(str(r), int(n * r), (1 + i % 7) * n * 4.0**-r) for r in rates]
        for i, n in enumerate(sizes)
    ]
    budget = int(4.5 * sum(sizes))
    bits, cost = totals(groups, allocate(groups, budget))
    hull = frontier(groups)
    below = max((p for p in hull if p[0] <= budget), key=lambda p: p[0])
    above = min((p for p in hull if p[0] > budget), key=lambda p: p[0])
    slope = (above[1] - below[1]) / (above[0] - below[0])
    bound = below[1] + slope * (budget - below[0])
    assert bits <= budget
    # Between the linear relaxation, which no allocation beats, and the hull's own allocation.
    assert bound - 1e-9 <= cost <= below[1] + 1e-9


def test_a_budget_below_the_smallest_options_is_refused() -> None:
    with pytest.raises(UsageError, match="the smallest options take 8"):
        allocate([[Option("a", 8, 1.0)]], 7)


@pytest.mark.parametrize("groups", [[[]], [[Option("a", 1, math.nan)]]])
def test_what_cannot_be_allocated_is_refused(groups: list[list[Option]]) -> None:
    with pytest.raises(UsageError, match=r"cannot be allocated|not finite"):
        allocate(groups, 10)
    with pytest.raises(UsageError, match=r"cannot be allocated|not finite"):
        frontier(groups)
