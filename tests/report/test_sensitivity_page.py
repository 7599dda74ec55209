"""The page of a sensitivity file: what it draws, and that it needs nothing else."""

from __future__ import annotations

import re
from dataclasses import replace

from quantkit.report.sensitivity import Page, Point, Row, render_sensitivity


def page() -> Page:
    schemes = ("w3", "w4", "w8")
    rows = tuple(
        Row(
            f"model.layers.{block}.{kind}",
            {"w3": 0.1, "w4": 0.01, "w8": 0.0},
            {"w3": 3.25, "w4": 4.25, "w8": 8.25},
            "w4" if block else "w8",
        )
        for block in range(3)
        for kind in ("mlp.up_proj", "mlp.down_proj")
    )
    return Page(
        source="<b>model</b>",
        tokens="4 windows of 32 tokens",
        solver="gptq",
        schemes=schemes,
        rows=rows,
        frontier=((3.25, 0.6), (4.25, 0.06), (8.25, 0.0)),
        uniform=(Point("w3", 3.25, 0.6), Point("w4", 4.25, 0.06), Point("w8", 8.25, 0.0)),
        chosen=Point("mixture", 5.5, 0.04),
        checks=((0.1, 0.12), (0.01, 0.0)),
    )


def test_every_layer_and_scheme_is_drawn_and_the_chosen_ones_outlined() -> None:
    html = render_sensitivity(page())
    assert len(re.findall(r'<rect class="heat"', html)) == 6 * 3
    assert len(re.findall(r'<rect class="picked"', html)) == 6
    assert "model.layers.2.mlp.up_proj, w3: 3.250 bits, 1.00e-01 nats" in html
    assert "chosen: 5.500 bits, 0.0400 nats" in html
    assert "Predicted against measured" in html


def test_nothing_chosen_and_nothing_checked_is_not_drawn() -> None:
    bare = page()
    rows = tuple(replace(row, chosen=None) for row in bare.rows)
    html = render_sensitivity(replace(bare, rows=rows, chosen=None, checks=()))
    assert '<rect class="picked"' not in html
    assert "Outlined" not in html
    assert "Predicted against measured" not in html


def test_it_is_self_contained_escaped_and_repeatable() -> None:
    html = render_sensitivity(page())
    assert html == render_sensitivity(page())
    assert "<b>model</b>" not in html
    assert "&lt;b&gt;model" in html
    assert not re.search(r"(?:src|href)=|<script|@import|url\(", html)
