"""The page: sections into the template, everything escaped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from quantkit.report import sections
from quantkit.report.history import Past, history
from quantkit.report.input_ranges import input_ranges
from quantkit.report.layers import layers
from quantkit.report.run_folder import Run

_HERE = Path(__file__).parent
TEMPLATE = "template.html.jinja"
STYLE = "style.css"

#: Control characters, which HTML forbids, as their visible pictures: ESC is ␛.
_CONTROLS = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"} | {0x7F: 0x2421}


def render(run: Run, past: Sequence[Past] = ()) -> str:
    """One HTML document. The same run gives the same bytes.

    Args:
        run: what the page is about.
        past: runs to show beside it, see `quantkit.report.history.read_history`.
    """
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,  # model output may hold HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(
        run=run,
        style=Markup((_HERE / STYLE).read_text(encoding="utf-8")),
        date=sections.date(run),
        verdict=sections.verdict(run),
        warnings=[*run.warnings, *(run.verdict.warnings if run.verdict else ())],
        key_numbers=sections.key_numbers(run),
        gates=sections.gates(run.verdict),
        layers=layers(run.layers),
        input_ranges=input_ranges(run.layers, run.caches),
        text=sections.text(run.candidate),
        tasks=sections.tasks(run),
        flips=sections.flips(run.flips),
        history=history(past),
        calibration=sections.calibration(run),
        provenance=sections.provenance(run),
    )
    # A model may write half a character; UTF-8 has no bytes for that.
    return page.translate(_CONTROLS).encode("utf-8", "replace").decode("utf-8")
