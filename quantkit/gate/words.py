"""Bounds against limits: the outcome, and the line that says why.

Four words name a limit, and each is a rule:

    margin   the lower bound must lie above it; touching it is not enough
    floor    the lower bound must reach it
    min      the same, for a rate
    max      the upper bound may reach it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quantkit.gate.statistics import Bounds
from quantkit.results import Outcome

Word = Literal["margin", "floor", "min", "max"]


@dataclass(frozen=True)
class Unit:
    """How a number is shown: ``scale`` times its value, with at least ``digits`` decimals."""

    digits: int
    scale: float = 1.0
    signed: bool = False

    def show(self, value: float, digits: int | None = None) -> str:
        shown, sign = self.scale * value, "+" if self.signed else ""
        if abs(shown) >= 1e6:  # a ruined model's perplexity
            return f"{shown:{sign}.3g}"
        text = f"{shown:{sign}.{digits or self.digits}f}"
        if float(text) == 0:  # -0.0 is a zero
            text = text.replace("-", sign)
        return text.replace("-", "−")

    def digits_apart(self, value: float, limit: float) -> int:
        """Decimals enough to see that ``value`` is not ``limit``: rounding must not hide why
        a gate decided as it did."""
        enough = (d for d in range(self.digits, 9) if self.show(value, d) != self.show(limit, d))
        return self.digits if value == limit else next(enough, 9)


POINTS = Unit(1, 100.0, signed=True)
PERCENT = Unit(1, 100.0)
NATS = Unit(4)
RATIO = Unit(3)


def outcome_of(bounds: Bounds, limit: float, word: Word) -> Outcome:
    """PASS if all that is plausible keeps the rule of ``word``, FAIL if none of it does."""
    low, high = bounds.lower, bounds.upper
    if low is None or high is None:
        return Outcome.INCONCLUSIVE
    if word == "max":
        inside, outside = high <= limit, low > limit
    else:
        inside, outside = low > limit if word == "margin" else low >= limit, high < limit
    if inside:
        return Outcome.PASS
    return Outcome.FAIL if outside else Outcome.INCONCLUSIVE


def against(bounds: Bounds, limit: float, word: Word, unit: Unit, cluster: str) -> str:
    """The bound that decided, beside the limit: ``95 % ≥ −3.1 > −5.0 margin``.

    ``cluster`` names the unit of sampling, for the case that there is only one.
    """
    low, high = bounds.lower, bounds.upper
    if low is None or high is None:
        return f"and one {cluster} bounds nothing; at least two are needed"
    outcome = outcome_of(bounds, limit, word)
    if outcome is Outcome.INCONCLUSIVE:
        digits = max(unit.digits_apart(low, limit), unit.digits_apart(high, limit))
        return (
            f"95 % bounds {unit.show(low, digits)} and {unit.show(high, digits)} hold the "
            f"{unit.show(limit, digits)} {word}"
        )
    passed = outcome is Outcome.PASS
    upper = passed == (word == "max")
    bound = high if upper else low
    digits = unit.digits_apart(bound, limit)
    if word == "max":
        sign = "≤" if passed else ">"
    else:
        sign = "<" if not passed else ">" if word == "margin" else "≥"
    side = "≤" if upper else "≥"
    return f"95 % {side} {unit.show(bound, digits)} {sign} {unit.show(limit, digits)} {word}"
