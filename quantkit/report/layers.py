"""The per-layer section: errors by block, one facet a kind of layer, and bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from quantkit.report import plots
from quantkit.report.run_folder import Layer, kind_key
from quantkit.report.words import fixed, percent

#: Layers in the table of the largest errors.
WORST = 6

_ERRORS = (("a", "output error", "output_error"), ("b", "weight error", "weight_error"))


def layers(found: Sequence[Layer]) -> dict[str, Any]:
    """The template's ``layers``."""
    inside = [x for x in found if x.block is not None]
    return {
        "count": len(found),
        "facets": _facets(inside),
        "measured": [name for _, name, key in _ERRORS if _known(found, key)],
        "worst": _worst(found),
        "worst_by": "output error" if _known(found, "output_error") else "weight error",
        "bits": _bits(found, inside),
        "rows": [_row(x) for x in found],
    }


def _known(found: Sequence[Layer], key: str) -> bool:
    return any(getattr(x, key) is not None for x in found)


def _kinds(inside: Sequence[Layer]) -> list[str]:
    return sorted({x.kind for x in inside}, key=kind_key)


def _facets(inside: Sequence[Layer]) -> list[Markup]:
    """One plot a kind, all on one scale. Of several experts the worst stands for the block."""
    errors = [e for x in inside for e in (x.weight_error, x.output_error) if e is not None]
    if not errors:
        return []
    last = max(x.block or 0 for x in inside)
    y_ticks = plots.ticks(max(errors))
    facets = []
    for kind in _kinds(inside):
        series = []
        for role, name, key in _ERRORS:
            worst: dict[int, float] = {}
            for x in inside:
                value = getattr(x, key)
                if x.kind == kind and x.block is not None and value is not None:
                    worst[x.block] = max(value, worst.get(x.block, 0.0))
            if worst:
                series.append(plots.Series(role, name, tuple(sorted(worst.items()))))
        if series:
            facets.append(plots.line_facet(kind, series, last, y_ticks))
    return facets


def _worst(found: Sequence[Layer]) -> list[dict[str, str]]:
    key = "output_error" if _known(found, "output_error") else "weight_error"
    ranked = [x for x in found if getattr(x, key) is not None]
    ranked.sort(key=lambda x: (-getattr(x, key), x.name))
    return [_row(x) for x in ranked[:WORST]]


def _row(x: Layer) -> dict[str, str]:
    return {
        "name": x.name,
        "shape": "×".join(map(str, x.shape)),
        "scheme": x.scheme,
        "weight": x.weight,
        "solver": x.solver,
        "bits": fixed(x.bits, 3),
        "weight_error": "–" if x.weight_error is None else percent(x.weight_error, 2),
        "output_error": "–" if x.output_error is None else percent(x.output_error, 2),
    }


def _bits(found: Sequence[Layer], inside: Sequence[Layer]) -> dict[str, Any]:
    """Which scheme each layer got: a row a kind, a box a block, a colour a scheme."""
    schemes: dict[str, list[float]] = {}
    for x in found:
        schemes.setdefault(x.scheme, []).append(x.bits)
    # Fewest bits first, so that a colour's rank says something.
    order = sorted(schemes, key=lambda name: (min(schemes[name]), name))
    roles = {name: f"q{i % 6}" for i, name in enumerate(order)}
    last = max((x.block or 0 for x in inside), default=-1)
    rows = []
    for kind in _kinds(inside):
        widest: dict[int, Layer] = {}
        for x in inside:
            if x.kind == kind and x.block is not None:
                kept = widest.get(x.block)
                widest[x.block] = x if kept is None or x.bits > kept.bits else kept
        at = [widest.get(block) for block in range(last + 1)]
        rows.append(
            {
                "kind": kind,
                "cells": plots.cells(
                    [None if x is None else roles[x.scheme] for x in at],
                    ["" if x is None else f"{x.name}: {x.scheme}, {x.bits:.3f} bits" for x in at],
                ),
                "range": _range([x.bits for x in at if x is not None]),
            }
        )
    legend = [
        {"role": roles[name], "name": name, "n": len(schemes[name]), "bits": _range(schemes[name])}
        for name in order
    ]
    return {
        "rows": rows,
        "legend": legend,
        "last": last,
        "outside": [_row(x) for x in found if x.block is None],
    }


def _range(bits: Sequence[float]) -> str:
    low, high = fixed(min(bits), 2), fixed(max(bits), 2)
    return low if low == high else f"{low}–{high}"
