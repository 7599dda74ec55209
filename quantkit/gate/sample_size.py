"""What a gate can decide before any compute is spent on it.

Power is exact: the probabilities of all (gains, losses) that Tango's test lets pass are
summed. The textbook formula n ≥ (z₁₋α + z₁₋β)² (ψ - D²) / (δ + D)² only starts the search:
at n = 50, ψ = .02, δ = .05 it promises .80 where the truth is .245.

Here δ is the margin, ψ the flip rate (share of items where the two models differ in being
right) and D the true difference of accuracies, all of them shares and not points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from quantkit.errors import UsageError
from quantkit.gate.statistics import ALPHA, tango_z

#: What `preflight` assumes when nothing is known of a model: 4-bit schemes flip about 5 %.
ASSUMED_FLIPS = 0.05

TARGET_POWER = 0.8

#: `items_needed` looks no further than this.
_MOST_ITEMS = 10_000_000


def power(
    n: int, flips: float, margin: float, difference: float = 0.0, alpha: float = ALPHA
) -> float:
    """Probability that the task gate passes, summed over the trinomial of (gains, losses).

    Args:
        n: items.
        flips: ψ, the true share of items that flip.
        margin: δ, the allowed loss.
        difference: D, the true difference. At ``-margin`` this is the type I error.

    Raises:
        UsageError: |D| > ψ, or a rate outside 0..1: no such distribution exists.
    """
    if n < 1 or not abs(difference) <= flips <= 1 or not 0 < margin < 1:
        raise UsageError(
            f"no model has flip rate {flips:g}, difference {difference:g}, margin {margin:g} "
            f"on {n} items",
            remedy="needs n ≥ 1, |difference| ≤ flips ≤ 1 and 0 < margin < 1",
        )
    # Outside 12 standard deviations (and 60 flips, for rare ones) the weight is below 1e-18.
    spread = 12 * math.sqrt(n * flips * (1 - flips)) + 60
    m = np.arange(max(0, int(n * flips - spread)), min(n, int(n * flips + spread)) + 1)
    weight = np.exp(
        special.gammaln(n + 1)
        - special.gammaln(m + 1)
        - special.gammaln(n - m + 1)
        + special.xlogy(m, flips)
        + special.xlog1py(n - m, -flips)
    )
    most = _most_losses(m, n, margin, alpha)
    share = (flips - difference) / (2 * flips) if flips else 0.5
    passes = np.where(most >= m, 1.0, special.bdtr(np.maximum(most, 0), m, share))
    return float(np.minimum((weight * np.where(most < 0, 0.0, passes)).sum(), 1.0))


def _most_losses(m: NDArray[np.int64], n: int, margin: float, alpha: float) -> NDArray[np.int64]:
    """For each number of flips [M], the most losses with which the gate passes; -1 if none.

    Among equally many flips Z falls with every loss, so the decision is a threshold, and a
    bisection over integers replaces the (gains, losses) grid: 10⁶ items take milliseconds.
    """
    z = float(special.ndtri(1 - alpha))
    low, high = np.full(m.shape, -1), m.copy()  # low passes (or is -1), above high fails
    while np.any(low < high):
        middle = (low + high + 1) // 2
        passes = tango_z(m - middle, middle, n, -margin) > z
        low, high = np.where(passes, middle, low), np.where(passes, high, middle - 1)
    return low


def fewest_items(margin: float, alpha: float = ALPHA) -> int:
    """The fewest items with which a candidate that flips nothing passes: below it none can
    be shown to be non-inferior. At g = l = 0, Z² = nδ / (1 - δ).

    Raises:
        UsageError: a margin that is not a share.
    """
    if not 0 < margin < 1:
        raise UsageError(f"margin {margin:g} is not between 0 and 1", remedy="0.05 is five points")
    z = float(special.ndtri(1 - alpha))
    return math.floor(z * z * (1 - margin) / margin) + 1


def items_needed(
    margin: float,
    flips: float,
    power: float = TARGET_POWER,
    difference: float = 0.0,
    alpha: float = ALPHA,
) -> int | None:
    """Items with which the gate passes with probability ``power``; None above 10 million.

    Exact power is a saw: it dips by a point or two where one more loss becomes intolerable,
    so somewhat more items than this may have slightly less power.

    Raises:
        UsageError: a flip rate that is no share, or a true difference outside the margin.
    """
    target = power
    if not 0 <= flips <= 1:
        raise UsageError(
            f"flip rate {flips:g} is not between 0 and 1", remedy="0.05 is 5 % of the items"
        )
    if not 0 < target < 1 or difference <= -margin:
        raise UsageError(
            f"no number of items reaches power {target:g} at difference {difference:g} and "
            f"margin {margin:g}",
            remedy="a power in 0..1 and a difference inside the margin are needed",
        )
    z = float(special.ndtri(1 - alpha) + special.ndtri(target))
    guess = z * z * max(flips - difference * difference, 0.0) / (margin + difference) ** 2
    low, high = 0, max(fewest_items(margin, alpha), math.ceil(guess))
    while high <= _MOST_ITEMS and _power(high, flips, margin, difference, alpha) < target:
        low, high = high, 2 * high
    if high > _MOST_ITEMS:
        return None
    while high - low > 1 + high // 10_000:
        middle = (low + high) // 2
        enough = _power(middle, flips, margin, difference, alpha) >= target
        low, high = (low, middle) if enough else (middle, high)
    return high


#: `items_needed` takes an argument named as the function.
_power = power


@dataclass(frozen=True)
class Preflight:
    """Whether a task gate can decide, known from its number of items alone.

    Attributes:
        name: the policy key.
        n, margin, flips: what was asked.
        power: probability that an undamaged candidate (D = 0) passes.
        needed: items for a power of .8 at this flip rate.
        possible: False when even zero flips could not pass.
        message: one line to print, or None when all is well.
    """

    name: str
    n: int
    margin: float
    flips: float
    power: float
    needed: int | None
    possible: bool
    message: str | None


def preflight(name: str, n: int, margin: float, flips: float = ASSUMED_FLIPS) -> Preflight:
    """Ask before evaluating: can ``n`` items tell whether a loss stays inside ``margin``?"""
    fewest, needed = fewest_items(margin), items_needed(margin, flips)
    chance = power(n, flips, margin)
    message = None
    if n < fewest:
        message = infeasible(name, n, margin)
    elif chance < TARGET_POWER:
        enough = "over 10 million" if needed is None else str(needed)
        message = (
            f"{name}: {n} items pass an undamaged model with probability {chance:.2f} at a flip "
            f"rate of {100 * flips:g} %; {enough} items would reach {TARGET_POWER:g}"
        )
    elif margin > flips:
        message = (
            f"{name}: the margin of {100 * margin:g} points is wider than the flip rate of "
            f"{100 * flips:g} %, so no model that flips this little can fail; a smaller margin "
            "would say more"
        )
    return Preflight(name, n, margin, flips, chance, needed, n >= fewest, message)


def infeasible(name: str, n: int, margin: float) -> str:
    """The line that says that ``n`` items cannot pass, whatever the candidate does."""
    return (
        f"{name}: even zero flips could not pass a {100 * margin:g}-point margin with n={n}; "
        f"you need {fewest_items(margin)} items or a wider margin"
    )
