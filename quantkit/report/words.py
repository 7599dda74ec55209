"""Numbers as text, and a gate's arithmetic as a sentence."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.results import GateCheck, Outcome, Verdict

#: Keeps a number and its unit on one line.
NBSP = "\u00a0"

#: Beyond this many decimals two numbers count as the same.
MOST_DIGITS = 8


@dataclass(frozen=True)
class Measure:
    """How one kind of gate is read.

    Attributes:
        scale, digits: a value is shown as ``scale * value`` with that many decimals.
        unit: follows the number.
        higher: whether more is better, that is on which side of the limit a gate holds.
        origin: where an unchanged model would stand, which the plot shows too.
        signed: show a plus.
        allowed: the limit in words, with ``{}`` for its number.
    """

    scale: float
    digits: int
    unit: str
    higher: bool
    origin: float | None
    allowed: str
    signed: bool = False

    def show(self, value: float, digits: int | None = None) -> str:
        """The number alone."""
        return fixed(self.scale * value, digits or self.digits, signed=self.signed)

    def digits_apart(self, limit: float, *values: float | None) -> int:
        """Decimals enough to tell every value from the limit: rounding must not hide why a
        gate decided as it did."""
        digits = self.digits
        for value in values:
            if value is None or value == limit:
                continue
            while digits < MOST_DIGITS and self.show(value, digits) == self.show(limit, digits):
                digits += 1
        return digits


_MEASURES = {
    "kl.mean": Measure(1, 4, " nats per token", False, 0.0, "at most {} is allowed"),
    "kl.p99": Measure(
        1, 4, " nats at the 99th percentile of tokens", False, 0.0, "at most {} is allowed"
    ),
    "top1": Measure(
        100,
        1,
        f"{NBSP}% of tokens keep their most likely token",
        True,
        1.0,
        f"at least {{}}{NBSP}% is asked",
    ),
    "perplexity.ratio": Measure(
        1, 3, " times the original’s perplexity", False, 1.0, "at most {} is allowed"
    ),
    "size.ratio": Measure(
        100, 1, f"{NBSP}% of the original’s bytes", False, 1.0, f"at most {{}}{NBSP}% is allowed"
    ),
    "latency.ttft": Measure(
        1, 3, " times the original’s time to the first token", False, 1.0, "at most {} is allowed"
    ),
    "latency.tpot": Measure(
        1, 3, " times the original’s time per output token", False, 1.0, "at most {} is allowed"
    ),
    "size.bits_per_weight": Measure(1, 3, " bits per weight", False, None, "at most {} is allowed"),
}
_POINTS = Measure(100, 1, f"{NBSP}points", True, 0.0, "a loss of up to {} is allowed", signed=True)
_FLOOR = Measure(100, 1, f"{NBSP}%", True, None, f"at least {{}}{NBSP}% is asked of both models")
_COUNT = Measure(1, 0, " items", False, 0.0, "at most {} is allowed")


def measure_of(check: GateCheck) -> Measure:
    """How this gate's numbers are read: limits by name, every other gate is a task's."""
    if check.name in _MEASURES:
        return _MEASURES[check.name]
    if check.name.endswith(".floor"):
        return _FLOOR
    return _COUNT if check.name.endswith(".must_not_flip") else _POINTS


def limit_word(check: GateCheck) -> str:
    """What the policy calls the limit."""
    measure = measure_of(check)
    if measure is _POINTS:
        return "margin"
    if measure is _FLOOR:
        return "floor"
    return "min" if measure.higher else "max"


def explain(check: GateCheck) -> str:
    """One gate as a sentence without its full stop."""
    measure = measure_of(check)
    if measure is _COUNT:
        return check.reason
    digits = measure.digits_apart(check.limit, check.value, check.lower, check.upper)
    value = measure.show(check.value, digits)
    limit = measure.show(check.limit, digits)
    text = value + measure.unit
    if measure is _POINTS:
        limit = limit.lstrip("−+")
        base, quant = check.details.get("baseline"), check.details.get("candidate")
        if isinstance(base, float | int) and isinstance(quant, float | int):
            text = f"{percent(quant)} where the original has {percent(base)}, {text}"
    text += f"; {measure.allowed.format(limit)}"
    if check.lower is None or check.upper is None:
        return text
    better, worse = (check.upper, check.lower) if measure.higher else (check.lower, check.upper)
    if check.outcome is Outcome.PASS:
        return f"{text}, and even the worse bound, {measure.show(worse, digits)}, is inside"
    if check.outcome is Outcome.FAIL:
        return f"{text}, and even the better bound, {measure.show(better, digits)}, is outside"
    low, high = measure.show(check.lower, digits), measure.show(check.upper, digits)
    text += f", and the bounds, {low} and {high}, lie on both sides of it"
    needed, n = check.details.get("items_needed"), check.details.get("n")
    if isinstance(needed, int) and isinstance(n, int) and needed > n:
        text += f"; about {whole(needed)} items would decide"
    return text


def headline(verdict: Verdict | None) -> str:
    """The one sentence that explains a verdict."""
    if verdict is None:
        return (
            "This checkpoint was written without being scored, so nothing here says that it "
            "still does its job."
        )
    of = verdict.checks
    decided = [c for c in of if c.outcome is verdict.outcome]
    if verdict.outcome is Outcome.PASS:
        return f"{_all(len(of))}: no interval reaches beyond its limit."
    first = decided[0]
    what = "failed" if verdict.outcome is Outcome.FAIL else "cannot be decided on this evidence"
    count = f"{len(decided)} of {len(of)} gates {what}"
    others = ", first of all" if len(decided) > 1 else ":"
    return f"{count}{others} {first.name}: {explain(first)}."


def _all(gates: int) -> str:
    return {1: "The one gate holds", 2: "Both gates hold"}.get(gates, f"All {gates} gates hold")


# -- numbers ---------------------------------------------------------------------------------


def fixed(value: float, digits: int, *, signed: bool = False) -> str:
    """With a real minus sign, and no sign on a zero."""
    if abs(value) >= 1e6:  # a ruined model's perplexity
        text = f"{value:{'+' if signed else ''}.3g}"
    else:
        text = f"{value:{'+' if signed else ''}.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def percent(share: float, digits: int = 1) -> str:
    return f"{fixed(100 * share, digits)}{NBSP}%"


def points(share: float) -> str:
    """A difference of shares: ``−7.1 points``."""
    return f"{fixed(100 * share, 1, signed=True)}{NBSP}points"


def whole(count: float) -> str:
    """With thin spaces between thousands, which do not break a line."""
    return f"{count:,.0f}".replace(",", "\u202f")


def size(count: float) -> str:
    """Bytes in the decimal units that disks are sold in."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.{2 if unit == 'GB' else 1}f}{NBSP}{unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """``1 h 04 min``, ``3 min 20 s``, ``9.4 s``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def score(value: float, *, share: bool) -> str:
    """A task's metric: percent where all scores lie within 0..1."""
    return percent(value) if share else fixed(value, 3)
