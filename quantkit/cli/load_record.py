"""Rows of a load test as they come: on stdout, and in a file that is true after each of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from quantkit.cli import load_table

if TYPE_CHECKING:
    from quantkit.loadtest.row import Row


def record(
    rows: Iterator[Row],
    about: Mapping[str, Any],
    output: Path | None,
    as_json: bool,
    attainment: float | None,
) -> None:
    """Print and write rows; those so far stand when it is interrupted or fails.

    Args:
        rows: measured as they are asked for.
        about: the system and the load.
        output: a JSON file.
        as_json: one JSON document on stdout, in place of a table.
        attainment: of a sweep: what its highest rate must have held; None is no sweep.
    """
    from quantkit.loadtest.session import sustained_rate
    from quantkit.results import write_json

    found: list[Row] = []
    document: dict[str, Any] = {**about, "complete": False, "rows": []}
    try:
        if not as_json:
            client = about["client"]
            typer.echo(f"{about['model']} on {about['server']}; client: {client['cpu']}")
            typer.echo(load_table.heading())
        for row in rows:
            found.append(row)
            document["rows"].append(row.to_json())
            if not as_json:
                typer.echo("\n".join(load_table.lines(row)))
            if output is not None:
                write_json(output, document)
        document["complete"] = True
        if attainment is not None:
            rate = document["sustained_rate"] = sustained_rate(found, attainment)
            if not as_json:
                held = "no rate" if rate is None else f"{rate:.3g} requests/s"
                typer.echo(f"highest rate with {attainment:.0%} met: {held}")
    finally:  # printed first: a disk that is full by now must not hide what was measured
        if as_json:
            typer.echo(json.dumps(document))
        if output is not None and found:  # nothing measured replaces no earlier file
            write_json(output, document)
