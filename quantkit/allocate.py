"""Which option each group of layers gets, for the least cost within a budget of bits.

A multiple-choice knapsack: every group takes exactly one option, costs and bits add up. It is
solved by dynamic programming over the bits that are spent beyond each group's cheapest option
(Kellerer, Pferschy, Pisinger: "Knapsack Problems", 2004, §11.5), which is exact where the
differences of bits have a common divisor that is not too small. Those of linear layers do: whole
rows of codes and scales.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantkit.errors import UsageError

#: Different amounts of bits that the solver tells apart. 120 groups of 12 options take 2 seconds
#: and 16 MB at the most.
STATES = 1 << 17


@dataclass(frozen=True)
class Option:
    """One way to store a group.

    Attributes:
        name: for people.
        bits: stored bits, 0 or more.
        cost: what it costs, such as nats of KL; finite, below zero allowed.
    """

    name: str
    bits: int
    cost: float


def allocate(groups: Sequence[Sequence[Option]], budget: int) -> tuple[int, ...]:
    """The index of each group's option, for the least total cost within ``budget`` bits.

    Exact if the groups' differences of bits, in units of their greatest common divisor, are
    below `STATES` in all. Beyond that each option's bits are rounded up to a larger unit: the
    budget still holds, and at most one unit a group is left unused.

    Args:
        groups: the options of each group, at least one.
        budget: bits that all groups may take together.

    Raises:
        UsageError: a cost that is not finite, a group without options, or a budget below the
            fewest bits that the options allow.
    """
    _check(groups)
    least = [min(option.bits for option in options) for options in groups]
    spare = budget - sum(least)
    if spare < 0:
        raise UsageError(
            f"budget {budget} bits: the smallest options take {sum(least)}",
            remedy="raise the budget or add smaller schemes",
        )
    extra = [[o.bits - low for o in options] for options, low in zip(groups, least, strict=True)]
    # What the largest options take beyond the smallest is never exceeded, whatever the budget.
    spare = min(spare, sum(max(row) for row in extra))
    unit = math.gcd(*(bits for row in extra for bits in row)) or 1
    unit *= max(1, math.ceil(spare / unit / STATES))
    states = spare // unit + 1

    # best[s]: the least cost of the groups so far within s units.
    best = np.zeros(states)
    taken = np.empty((len(groups), states), dtype=np.int16)
    for row, (options, bits) in enumerate(zip(groups, extra, strict=True)):
        units = [math.ceil(b / unit) for b in bits]
        best, taken[row] = _add(best, units, [option.cost for option in options])
    state = states - 1
    chosen = []
    for row in reversed(range(len(groups))):
        index = int(taken[row, state])
        chosen.append(index)
        state -= math.ceil(extra[row][index] / unit)
    return tuple(reversed(chosen))


def _add(
    best: npt.NDArray[np.float64], units: Sequence[int], costs: Sequence[float]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int16]]:
    """The least costs with one more group, and the option of it that gives each."""
    least = np.full(len(best), np.inf)
    index = np.zeros(len(best), dtype=np.int16)
    for i, (more, cost) in enumerate(zip(units, costs, strict=True)):
        if more >= len(best):
            continue
        candidate = best[: len(best) - more] + cost
        better = candidate < least[more:]
        least[more:][better] = candidate[better]
        index[more:][better] = i
    return least, index


def frontier(groups: Sequence[Sequence[Option]]) -> list[tuple[int, float]]:
    """The lower convex hull of (bits, cost) over all allocations, fewest bits first.

    Every point is an allocation; none lies below the lines between them. It is the sum of the
    groups' own hulls, their edges sorted by what a bit buys (Lagrange multipliers).

    Raises:
        UsageError: see `allocate`.
    """
    _check(groups)
    bits, cost = 0, 0.0
    edges: list[tuple[float, int, float]] = []
    for options in groups:
        hull = _hull(options)
        bits += hull[0][0]
        cost += hull[0][1]
        for (b0, c0), (b1, c1) in itertools.pairwise(hull):
            edges.append(((c1 - c0) / (b1 - b0), b1 - b0, c1 - c0))
    points = [(bits, cost)]
    for _, more, change in sorted(edges):
        bits, cost = bits + more, cost + change
        points.append((bits, cost))
    return points


def _hull(options: Sequence[Option]) -> list[tuple[int, float]]:
    """Corners of a group's lower hull from its fewest bits to its least cost."""
    hull: list[tuple[int, float]] = []
    for bits, cost in sorted((o.bits, o.cost) for o in options):
        if hull and cost >= hull[-1][1]:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], (bits, cost)):
            hull.pop()
        hull.append((bits, cost))
    return hull


def _above(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def _check(groups: Sequence[Sequence[Option]]) -> None:
    for options in groups:
        if not options:
            raise UsageError("a group without options cannot be allocated")
        for option in options:
            if not math.isfinite(option.cost):
                raise UsageError(f"{option.name}: cost {option.cost} is not finite")
