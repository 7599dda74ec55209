"""Plots as inline SVG: coordinates here, every colour in the stylesheet.

Two shapes. A *strip* is as wide as its column: x is given in percent and y in pixels, so
that text keeps its size on a phone. A *facet* has a fixed view box small enough to be read
at that width, and is repeated. No ids, dates or random numbers: the bytes depend on the
numbers alone. Classes stand for roles (``a``, ``b``: first and second series; ``pass``,
``fail``, ``inconclusive``), so one drawing serves light, dark and paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from quantkit.report.intervals import Interval
from quantkit.report.words import NBSP, Measure, fixed
from quantkit.results import GateCheck


@dataclass(frozen=True)
class Series:
    """A line of a facet: (x, y) points and the class that colours it."""

    role: str
    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Axis:
    """A linear scale from ``low`` to ``high`` onto ``first`` … ``last``."""

    low: float
    high: float
    first: float = 0.0
    last: float = 100.0

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        share = (value - self.low) / span if span > 0 else 0.5
        return round(self.first + share * (self.last - self.first), 2)


def ticks(high: float, count: int = 4) -> list[float]:
    """Round numbers from 0 up to the first one that is not below ``high``."""
    if high <= 0:
        return [0.0, 1.0]
    rough = high / count
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(high / step - 1e-9) + 1)]


def ticks_between(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers around ``low`` … ``high``, not from 0: small changes are to be seen."""
    if high - low <= max(1e-12, 1e-9 * max(abs(low), abs(high))):
        pad = abs(low) / 20 or 0.5
        low, high = low - pad, high + pad
    step = ticks(high - low, count)[1]
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_labels(values: Sequence[float], *, as_percent: bool = False) -> list[str]:
    """As many decimals as tell neighbouring ticks apart, the same for all."""
    scale = 100 if as_percent else 1
    shown = [scale * v for v in values]
    digits = 0
    while digits < 15 and any(abs(round(v, digits) - v) > 1e-6 * (shown[-1] or 1) for v in shown):
        digits += 1
    return [fixed(v, digits) + (f"{NBSP}%" if as_percent else "") for v in shown]


# -- strips ----------------------------------------------------------------------------------


def gate_strip(check: GateCheck, measure: Measure, word: str) -> Markup:
    """One gate: its bounds as a bar, the limit as a line, the side that holds shaded."""
    known = [check.value, check.limit, measure.origin, check.lower, check.upper]
    values = [v for v in known if v is not None]
    low, high = min(values), max(values)
    pad = 0.12 * (high - low) or 0.5
    x = Axis(low - pad, high + pad)
    limit = x(check.limit)
    first, last = (limit, 100.0) if measure.higher else (0.0, limit)
    digits = measure.digits_apart(check.limit, check.value, check.lower, check.upper)
    shown = measure.show(check.value, digits)
    parts = [
        _rect("inside", first, 18, last - first, 26),
        _line("frame", 0, 44, 100, 44),
    ]
    if measure.origin is not None and abs(x(measure.origin) - limit) > 0.5:
        origin = x(measure.origin)
        parts.append(_line("origin", origin, 18, origin, 44))
        if abs(origin - limit) > 40:
            parts.append(_text("small", origin, 12, "unchanged"))
    label = f"{word} {measure.show(check.limit, digits)}"
    parts.append(_text("small strong", limit, 12, label))
    if check.lower is not None and check.upper is not None:
        left, right = x(check.lower), x(check.upper)
        parts.append(_rect(f"bar {check.outcome.lower()}", left, 26, right - left, 10))
        between = f"{measure.show(check.lower, digits)} … {measure.show(check.upper, digits)}"
        shown = f"{shown}  ({between})"
    parts.append(_line("limit", limit, 16, limit, 46))
    parts.append(_dot(f"dot {check.outcome.lower()}", x(check.value), 31, 5))
    parts.append(_text("small", x(check.value), 58, shown))
    return _strip(62, f"{check.name}: {check.reason}", parts)


def score_strip(rows: Sequence[tuple[str, str, float, float | None, float | None]]) -> Markup:
    """Scores on 0..100 %: rows of (role, name, estimate, lower, upper)."""
    bottom = 22 * len(rows) + 4
    parts = []
    for share in (0, 25, 50, 75, 100):
        parts.append(_line("grid", share, 0, share, bottom))
        parts.append(_text("small", share, bottom + 13, f"{share} %"))
    said = []
    for i, (role, name, estimate, lower, upper) in enumerate(rows):
        y = 22 * i + 13
        text = f"{name} {fixed(100 * estimate, 1)}{NBSP}%"
        if lower is not None and upper is not None:
            parts.append(_rect(f"bar {role}", 100 * lower, y - 3, 100 * (upper - lower), 6))
        parts.append(_dot(f"dot {role}", 100 * estimate, y, 5))
        said.append(text)
    return _strip(bottom + 18, ", ".join(said), parts)


def change_bar(value: float, largest: float) -> Markup:
    """A bar from the middle: to the left for a loss, to the right for a gain."""
    width = 48 * abs(value) / largest if largest > 0 else 0.0
    role = "fail" if value < 0 else "pass"
    parts = [_rect(f"bar {role}", 50 - width if value < 0 else 50, 3, width, 10)]
    parts.append(_line("frame", 50, 0, 50, 16))
    return Markup('<svg class="strip" width="100%" height="16" aria-hidden="true">{}</svg>').format(
        Markup("").join(parts)
    )


def cells(values: Sequence[str | None], titles: Sequence[str]) -> Markup:
    """A row of equal boxes, each with the class of its value; None leaves a gap."""
    step = 100 / max(1, len(values))
    parts = [
        Markup(
            '<rect class="{}" x="{}%" y="1" width="{}%" height="20"><title>{}</title></rect>'
        ).format(role, round(i * step, 3), round(step * 0.94, 3), title)
        for i, (role, title) in enumerate(zip(values, titles, strict=True))
        if role is not None
    ]
    return Markup('<svg class="strip" width="100%" height="22" aria-hidden="true">{}</svg>').format(
        Markup("").join(parts)
    )


def shares(parts: Sequence[tuple[str, float]]) -> Markup:
    """One bar cut into shares of the whole: (name, value)."""
    total = sum(value for _, value in parts)
    x, boxes = 0.0, []
    for i, (name, value) in enumerate(parts):
        width = 100 * value / total if total > 0 else 0.0
        boxes.append(
            Markup(
                '<rect class="q{}" x="{}%" y="0" width="{}%" height="18"><title>{}</title></rect>'
            ).format(i % 6, round(x, 2), round(max(0.0, width - 0.3), 2), f"{name}: {width:.1f} %")
        )
        x += width
    said = ", ".join(f"{n} {100 * v / total:.0f} %" for n, v in parts) if total > 0 else ""
    return _strip(18, said, boxes)


# -- facets ----------------------------------------------------------------------------------

_W, _WIDE, _H = 280, 330, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 272, 26, 142


def line_facet(
    title: str, series: Sequence[Series], x_high: int, y_ticks: Sequence[float]
) -> Markup:
    """Lines over block indices 0..x_high; y in percent, on the scale that all facets share."""
    x = Axis(0, max(1, x_high), _LEFT + 6, _RIGHT - 4)
    y = Axis(0, y_ticks[-1], _BOTTOM, _TOP)
    parts = _y_axis(y, y_ticks, tick_labels(y_ticks, as_percent=True))
    parts.append(_px_text("name", _LEFT, 15, title, "start"))
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if x_high / s <= 6)
    for block in range(0, x_high + 1, step):
        parts.append(_px_text("small", x(block), _BOTTOM + 16, str(block)))
    for s in series:
        at = [(x(px), y(py)) for px, py in s.points]
        path = " ".join(f"{px},{py}" for px, py in at)
        parts.append(Markup('<polyline class="line {}" points="{}"/>').format(s.role, path))
        parts += [
            Markup(
                '<circle class="dot {}" cx="{}" cy="{}" r="2.2"><title>{}</title></circle>'
            ).format(s.role, px, py, f"block {block:g}: {s.name} {fixed(100 * value, 2)} %")
            for (px, py), (block, value) in zip(at, s.points, strict=True)
        ]
    return _facet(f"{title}: {' and '.join(s.name for s in series)} by block", parts)


def position_facet(values: Sequence[float], mean: float | None, seq_len: int) -> Markup:
    """Mean KL in equal slices of the window, and the mean over all of it."""
    y_ticks = ticks(max([*values, mean or 0.0]))
    y = Axis(0, y_ticks[-1], _BOTTOM, _TOP)
    right = _WIDE - 8
    x = Axis(0, len(values), _LEFT, right)
    parts = _y_axis(y, y_ticks, tick_labels(y_ticks), right)
    parts.append(_px_text("small", _LEFT, 15, "nats per token", "start"))
    for i, value in enumerate(values):
        left, top = x(i + 0.08), y(value)
        first, last = round(i * seq_len / len(values)), round((i + 1) * seq_len / len(values))
        parts.append(
            Markup(
                '<rect class="bar a" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>'
            ).format(
                left,
                top,
                round(x(i + 0.92) - left, 2),
                round(_BOTTOM - top, 2),
                f"tokens {first} to {last}: {fixed(value, 4)} nats per token",
            )
        )
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        at = _LEFT + share * (right - _LEFT)
        parts.append(_px_text("small", at, _BOTTOM + 16, str(round(share * seq_len)), anchor))
    if mean is not None:
        parts.append(
            Markup('<line class="mean" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                _LEFT, right, y(mean), y(mean)
            )
        )
        parts.append(_px_text("small strong", right, 15, f"mean {fixed(mean, 4)} (dashed)", "end"))
    return _facet("mean KL by position in the window", parts, _WIDE)


def history_facet(
    title: str, points: Sequence[tuple[int, Interval]], runs: int, *, as_percent: bool = False
) -> Markup:
    """One measure over runs 1..``runs``, each with its interval; the last one is this page's."""
    bounds = [b for _, v in points for b in (v.lower, v.upper, v.estimate)]
    y_ticks = ticks_between(min(bounds), max(bounds))
    y = Axis(y_ticks[0], y_ticks[-1], _BOTTOM, _TOP)
    x = Axis(0.5, runs + 0.5, _LEFT, _RIGHT)
    parts = _y_axis(y, y_ticks, tick_labels(y_ticks, as_percent=as_percent))
    parts.append(_px_text("name", _LEFT, 15, title, "start"))
    step = math.ceil(runs / 10)
    for number in range(1, runs + 1, step):
        parts.append(_px_text("small", x(number), _BOTTOM + 16, str(number)))
    scale, unit = (100, f"{NBSP}%") if as_percent else (1, "")
    path = " ".join(f"{x(number)},{y(v.estimate)}" for number, v in points)
    parts.append(Markup('<polyline class="line base" points="{}"/>').format(path))
    for number, v in points:
        role = "a" if number == runs else "base"
        if v.upper > v.lower:
            parts.append(
                Markup('<line class="whisker {}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                    role, x(number), x(number), y(v.lower), y(v.upper)
                )
            )
        said = f"run {number}: {fixed(scale * v.estimate, 4)}{unit}"
        parts.append(
            Markup(
                '<circle class="dot {}" cx="{}" cy="{}" r="4"><title>{}</title></circle>'
            ).format(role, x(number), y(v.estimate), said)
        )
    return _facet(f"{title} over {runs} runs", parts)


def _y_axis(
    y: Axis, values: Sequence[float], labels: Sequence[str], right: int = _RIGHT
) -> list[Markup]:
    parts = []
    for value, label in zip(values, labels, strict=True):
        at = y(value)
        role = "frame" if value == values[0] else "grid"
        parts.append(
            Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                role, _LEFT, right, at, at
            )
        )
        parts.append(_px_text("small", _LEFT - 5, at + 3.5, label, "end"))
    return parts


# -- marks -----------------------------------------------------------------------------------


def _strip(height: int, said: str, parts: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg class="strip" width="100%" height="{}" role="img" aria-label="{}">{}</svg>'
    ).format(height, said, Markup("").join(parts))


def _facet(said: str, parts: Sequence[Markup], width: int = _W) -> Markup:
    return Markup(
        '<svg class="facet" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    ).format(width, _H, said, Markup("").join(parts))


def _rect(role: str, x: float, y: float, width: float, height: float) -> Markup:
    return Markup('<rect class="{}" x="{}%" y="{}" width="{}%" height="{}"/>').format(
        role, round(x, 2), y, round(max(0.0, width), 2), height
    )


def _line(role: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{}%" y1="{}" x2="{}%" y2="{}"/>').format(
        role, x1, y1, x2, y2
    )


def _dot(role: str, x: float, y: float, radius: float) -> Markup:
    return Markup('<circle class="{}" cx="{}%" cy="{}" r="{}"/>').format(
        role, round(x, 2), y, radius
    )


def _text(role: str, x: float, y: float, text: str) -> Markup:
    """Text at x percent that never leaves the strip: it hangs inwards near an end."""
    anchor = "start" if x < 22 else "end" if x > 78 else "middle"
    return Markup('<text class="{}" x="{}%" y="{}" text-anchor="{}">{}</text>').format(
        role, round(x, 2), y, anchor, text
    )


def _px_text(role: str, x: float, y: float, text: str, anchor: str = "middle") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        role, round(x, 2), round(y, 2), anchor, text
    )
