"""How many items each task gate needs, before a model is run.

A suite's items, a margin and a flip rate give the power of Tango's test by exact sums
(`quantkit.gate.sample_size`). The flip rate is not known before the run, so a plan is a small
table over several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.gate.policy import TaskGate
from quantkit.gate.sample_size import TARGET_POWER, fewest_items, items_needed, power

#: Flip rates to plan for: 8-bit schemes flip 1 or 2 % of items, 4-bit ones about 5 to 10 %.
FLIP_RATES = (0.01, 0.02, 0.05, 0.10, 0.20)


@dataclass(frozen=True)
class PlanRow:
    """One gate at one flip rate.

    Attributes:
        gate: the policy key.
        margin, flips: δ and ψ, shares.
        n: items of the suite.
        clusters: independent groups among them; below ``n`` the items say less than ``n``
            independent ones, and ``power`` is an upper limit.
        fewest: items below which not even zero flips pass.
        needed: items for a power of .8; None above 10 million.
        power: probability that an undamaged model passes on ``n`` items.
        detectable: whether the margin can be lost at all at this flip rate (δ ≤ ψ).
    """

    gate: str
    margin: float
    flips: float
    n: int
    clusters: int
    fewest: int
    needed: int | None
    power: float
    detectable: bool

    @property
    def enough(self) -> bool:
        return self.power >= TARGET_POWER

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "enough": self.enough}


def plan(
    gate: TaskGate, n: int, clusters: int, flip_rates: Sequence[float] = FLIP_RATES
) -> list[PlanRow]:
    """One row a flip rate.

    Args:
        gate: names the margin.
        n: items that will be scored.
        clusters: independent groups among them, ``n`` where no items share one.
        flip_rates: ψ, shares.

    Raises:
        UsageError: a flip rate outside 0..1.
    """
    return [
        PlanRow(
            gate=gate.name,
            margin=gate.margin,
            flips=flips,
            n=n,
            clusters=clusters,
            fewest=fewest_items(gate.margin),
            needed=items_needed(gate.margin, flips),
            power=power(n, flips, gate.margin),
            detectable=gate.margin <= flips,
        )
        for flips in flip_rates
    ]
