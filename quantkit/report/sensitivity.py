"""A sensitivity file as one HTML page: the frontier of KL against bits, and layers × schemes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from quantkit.report.page import STYLE
from quantkit.report.plots import Axis

_HERE = Path(__file__).parent
TEMPLATE = "sensitivity.html.jinja"

#: Decades of KL that colours tell apart; what lies below the last is as pale as it gets.
_DECADES = 4.0


@dataclass(frozen=True)
class Point:
    """A model: its name, stored bits a weight and predicted KL in nats a token."""

    name: str
    bits: float
    kl: float


@dataclass(frozen=True)
class Row:
    """A layer: KL and bits a weight by scheme, and the scheme that was chosen, if any."""

    name: str
    kl: Mapping[str, float]
    bits: Mapping[str, float]
    chosen: str | None


@dataclass(frozen=True)
class Page:
    """Everything that the page shows.

    Attributes:
        source, tokens, solver: words for the heading.
        schemes: names.
        rows: layers in the model's order.
        frontier: (bits a weight, KL), fewest bits first.
        uniform: the models with one scheme everywhere.
        chosen: the mixture, or None.
        checks: (predicted, measured) KL of single layers.
    """

    source: str
    tokens: str
    solver: str
    schemes: tuple[str, ...]
    rows: tuple[Row, ...]
    frontier: tuple[tuple[float, float], ...]
    uniform: tuple[Point, ...]
    chosen: Point | None
    checks: tuple[tuple[float, float], ...] = ()


def render_sensitivity(page: Page) -> str:
    """One self-contained HTML document. The same numbers give the same bytes."""
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    high = max((kl for row in page.rows for kl in row.kl.values()), default=0.0)
    return environment.get_template(TEMPLATE).render(
        page=page,
        style=Markup((_HERE / STYLE).read_text(encoding="utf-8")),
        frontier=_frontier(page),
        checks=_scatter(page.checks) if page.checks else None,
        heats=_heats(page, high),
        low=f"{high / 10**_DECADES:.0e}",
        high=f"{high:.0e}",
    )


_W, _H = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 444, 14, 262


def _frontier(page: Page) -> Markup:
    """KL on a logarithmic axis over bits a weight."""
    shown = [kl for _, kl in page.frontier] + [p.kl for p in page.uniform]
    low, high = _decades(shown)
    bits = [b for b, _ in page.frontier] + [p.bits for p in page.uniform]
    first, last = math.floor(min(bits)), math.ceil(max(bits))
    x = Axis(first, last, _LEFT, _RIGHT)
    parts = _log_grid(low, high, "↑ nats a token")
    y = Axis(low, high, _BOTTOM, _TOP)
    for tick in range(first, last + 1):
        parts.append(_text("small", x(tick), _BOTTOM + 16, str(tick), "middle"))
    parts.append(_text("small", _RIGHT, _BOTTOM + 32, "stored bits a weight →", "end"))
    path = " ".join(f"{x(b)},{y(_log(kl, low))}" for b, kl in page.frontier)
    parts.append(Markup('<polyline class="line a" points="{}"/>').format(path))
    for point in page.uniform:
        at = x(point.bits), y(_log(point.kl, low))
        said = f"{point.name}: {point.bits:.3f} bits, {point.kl:.4f} nats"
        parts.append(_dot("dot b", *at, 3.5, said))
    if page.chosen is not None:
        at = x(page.chosen.bits), y(_log(page.chosen.kl, low))
        said = f"chosen: {page.chosen.bits:.3f} bits, {page.chosen.kl:.4f} nats"
        parts.append(_dot("ring", *at, 6, said))
    legend = [("a", "best mixtures"), ("b", "one scheme everywhere")]
    for i, (role, name) in enumerate(legend):
        top = _TOP + 8 + 17 * i
        parts.append(_dot(f"dot {role}", _RIGHT - 150, top, 4, name))
        parts.append(_text("small", _RIGHT - 140, top + 4, name, "start"))
    if page.chosen is not None:
        top = _TOP + 8 + 17 * len(legend)
        parts.append(_dot("ring", _RIGHT - 150, top, 5, "chosen"))
        text = f"chosen: {page.chosen.bits:.2f} bits, {page.chosen.kl:.3f}"
        parts.append(_text("small", _RIGHT - 140, top + 4, text, "start"))
    return _svg("predicted KL against stored bits a weight", parts, _W, _H)


def _scatter(checks: Sequence[tuple[float, float]]) -> Markup:
    """Measured over predicted, both logarithmic."""
    low, high = _decades([value for pair in checks for value in pair])
    x, y = Axis(low, high, _LEFT, _RIGHT), Axis(low, high, _BOTTOM, _TOP)
    parts = _log_grid(low, high, "↑ measured")
    for power in range(low, high + 1):
        parts.append(_text("small", x(power), _BOTTOM + 16, f"1e{power}", "middle"))
    parts.append(_text("small", _RIGHT, _BOTTOM + 32, "predicted →", "end"))
    parts.append(
        Markup('<line class="even" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
            _LEFT, _BOTTOM, _RIGHT, _TOP
        )
    )
    for predicted, measured in checks:
        said = f"predicted {predicted:.2e}, measured {measured:.2e}"
        parts.append(_dot("dot a", x(_log(predicted, low)), y(_log(measured, low)), 3.5, said))
    return _svg("measured KL over predicted KL, one layer at a time", parts, _W, _H)


def _heats(page: Page, high: float) -> list[Markup]:
    """One map a kind of layer: blocks from left to right, schemes from top to bottom."""
    kinds: dict[str, list[tuple[int, Row]]] = {}
    for row in page.rows:
        found = re.search(r"\.(\d+)\.(.*)$", row.name)
        block, kind = (int(found[1]), found[2]) if found else (0, row.name)
        kinds.setdefault(kind, []).append((block, row))
    last = max((block for rows in kinds.values() for block, _ in rows), default=0)
    return [_heat(kind, rows, page.schemes, last, high) for kind, rows in kinds.items()]


def _heat(
    kind: str, rows: Sequence[tuple[int, Row]], schemes: Sequence[str], last: int, high: float
) -> Markup:
    left, top, step = 104, 22, 15
    width = 236 / (last + 1)
    parts = [_text("name", left, 14, kind, "start")]
    for i, scheme in enumerate(schemes):
        parts.append(_text("small", left - 6, top + step * i + 11, scheme, "end"))
        for block, row in rows:
            if scheme not in row.kl:
                continue
            kl = row.kl[scheme]
            depth = 1 + math.log10(kl / high) / _DECADES if kl > 0 and high > 0 else 0.0
            said = f"{row.name}, {scheme}: {row.bits[scheme]:.3f} bits, {kl:.2e} nats"
            parts.append(
                Markup(
                    '<rect class="heat" x="{}" y="{}" width="{}" height="{}" fill-opacity="{}">'
                    "<title>{}</title></rect>"
                ).format(
                    round(left + width * block, 2),
                    top + step * i,
                    round(width, 2),
                    step,
                    round(0.04 + 0.96 * max(0.0, depth), 3),
                    said,
                )
            )
            if row.chosen == scheme:
                parts.append(
                    Markup('<rect class="picked" x="{}" y="{}" width="{}" height="{}"/>').format(
                        round(left + width * block + 0.7, 2),
                        top + step * i + 0.7,
                        round(width - 1.4, 2),
                        step - 1.4,
                    )
                )
    bottom = top + step * len(schemes)
    for block in sorted({0, last}):
        x = left + width * (block + 0.5)
        parts.append(_text("small", x, bottom + 13, str(block), "middle"))
    return _svg(f"{kind}: KL by block and scheme", parts, 344, bottom + 18)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Whole powers of ten around the values above zero."""
    logs = [math.log10(v) for v in values if v > 0] or [-1.0, 0.0]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    return low, max(high, low + 1)


def _log(value: float, low: float) -> float:
    return math.log10(value) if value > 0 else low


def _log_grid(low: int, high: int, name: str) -> list[Markup]:
    y = Axis(low, high, _BOTTOM, _TOP)
    parts = []
    for power in range(low, high + 1):
        role = "frame" if power == low else "grid"
        parts.append(
            Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                role, _LEFT, _RIGHT, y(power), y(power)
            )
        )
        parts.append(_text("small", _LEFT - 6, y(power) + 4, f"1e{power}", "end"))
    parts.append(_text("small", _LEFT, _BOTTOM + 32, name, "start"))
    return parts


def _dot(role: str, x: float, y: float, radius: float, title: str) -> Markup:
    return Markup('<circle class="{}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(
        role, x, y, radius, title
    )


def _text(role: str, x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        role, round(x, 2), round(y, 2), anchor, text
    )


def _svg(said: str, parts: Sequence[Markup], width: int, height: int) -> Markup:
    return Markup(
        '<svg class="facet" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    ).format(width, height, said, Markup("").join(parts))
