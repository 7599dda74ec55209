"""Stopping early: a paired test that may be looked at after every item.

Tango's bounds hold for one look at all items. Who looks after each item and stops when he
likes what he sees needs an e-process: a bet against the null whose capital, while the null is
true, exceeds 1/α with probability α at most, over all looks together (Ville's inequality).

With d the difference of an item (candidate - baseline, within -1..1) and δ the margin::

    K⁺ = mean over λ of Π(1 + λ(d + δ)),  0 < λ < 1/(1 - δ)     against H0: E d ≤ -δ
    K⁻ = mean over λ of Π(1 - λ(d + δ)),  0 < λ < 1/(1 + δ)     against H0: E d ≥ -δ

PASS when K⁺ reaches 1/α, FAIL when K⁻ does. Failing is fast: a loss of 25 points shows within
some 40 items. Passing is slow, several times the items of Tango's test.

Items that share a cluster are bet on together, by x = Σ(d + δ) / (items of the largest
cluster), which stays within the range of a single item.

Sources:
    Waudby-Smith & Ramdas 2024, JRSS-B 86:1, section 4, for betting on a bounded mean.
    Ville 1939, Étude critique de la notion de collectif, for the inequality.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantkit.errors import UsageError
from quantkit.gate.statistics import ALPHA
from quantkit.results import ItemRow, Outcome

Floats = NDArray[np.float64]

#: Stakes as shares of the largest that cannot ruin the bettor. Small ones win against a rare
#: flip, large ones against a broken model; their mean needs no choice in advance.
STAKES = np.array([0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.4, 0.6, 0.8, 0.95])


def capital(excess: ArrayLike, margin: float) -> tuple[Floats, Floats]:
    """(ln K⁺, ln K⁻) after each bet, along the last axis.

    Args:
        excess: x = d + δ of each item or cluster in order, ``[..., n]``, within δ-1..δ+1.
        margin: δ.
    """
    x = np.asarray(excess, dtype=np.float64)

    def log_mean(stakes: Floats) -> Floats:
        logs = np.cumsum(np.log1p(x[..., None] * stakes), axis=-2)
        top = logs.max(axis=-1, keepdims=True)
        return np.asarray(top[..., 0] + np.log(np.exp(logs - top).mean(axis=-1)))

    return log_mean(STAKES / (1 - margin)), log_mean(-STAKES / (1 + margin))


@dataclass(frozen=True)
class Decision:
    """What an e-process has decided, and at which bet it first did.

    ``bets`` counts items (or clusters) up to the decision, all of them where there is none.
    ``e_pass`` and ``e_fail`` are the capitals K⁺ and K⁻ at that point.
    """

    outcome: Outcome
    bets: int
    e_pass: float
    e_fail: float


def decide(excess: Sequence[float], margin: float, alpha: float = ALPHA) -> Decision:
    """The first decision along a sequence of bets; INCONCLUSIVE when there is none.

    Raises:
        UsageError: a margin that is not a share, or a bet outside its range.
    """
    if not 0 < margin < 1:
        raise UsageError(f"margin {margin:g} is not between 0 and 1", remedy="0.05 is five points")
    x = np.asarray(excess, dtype=np.float64)
    if not len(x):
        return Decision(Outcome.INCONCLUSIVE, 0, 1.0, 1.0)
    if not (np.isfinite(x).all() and (abs(x - margin) <= 1 + 1e-12).all()):
        raise UsageError(
            "an e-process bets on differences within -1..1", remedy="gate scores within 0..1"
        )
    log_pass, log_fail = capital(x, margin)
    threshold = -math.log(alpha)
    crossed = np.flatnonzero((log_pass >= threshold) | (log_fail >= threshold))
    at = int(crossed[0]) if len(crossed) else len(x) - 1
    outcome = Outcome.INCONCLUSIVE
    if len(crossed):
        outcome = Outcome.PASS if log_pass[at] >= threshold else Outcome.FAIL
    # A ruined model's capital must stay a number that JSON can hold.
    e_pass, e_fail = (math.exp(min(float(logs[at]), 700.0)) for logs in (log_pass, log_fail))
    return Decision(outcome, at + 1, e_pass, e_fail)


def bet_order(rows: Iterable[ItemRow], seed: int) -> list[list[str]]:
    """Ids of all items in the order of betting: clusters shuffled, each kept together.

    Depends on the ids, clusters and seed alone, so that whoever judges a run that stopped
    early can see that its items are the first of this order and were not picked.
    """
    groups: dict[tuple[bool, str], list[str]] = {}
    for row in rows:
        key = (row.cluster is not None, row.id if row.cluster is None else row.cluster)
        groups.setdefault(key, []).append(row.id)
    order = [sorted(groups[key]) for key in sorted(groups)]
    random.Random(seed).shuffle(order)
    return order


def bets(
    order: Sequence[Sequence[str]], differences: Mapping[str, float], margin: float
) -> list[float]:
    """x of each cluster of ``order`` whose items all have a difference, up to the first that
    has not.

    Args:
        order: every cluster of the task, scored or not: the largest sets the scale.
        differences: d by item id.
        margin: δ.
    """
    largest = max((len(group) for group in order), default=1)
    made = []
    for group in order:
        if not all(name in differences for name in group):
            break
        made.append(math.fsum(differences[name] + margin for name in group) / largest)
    return made
