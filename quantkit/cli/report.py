"""``quantkit report``: a run as one HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="The OUT.run folder of `quantkit calibrate -o OUT`, or OUT itself."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the page.")] = Path(
        "report.html"
    ),
    history: Annotated[
        list[Path] | None,
        typer.Option(
            "--history",
            metavar="RUN",
            help="An earlier run, or results of `quantkit eval`, of the same model, to plot beside "
            "this one. Repeatable, oldest first.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Write a run as one self-contained HTML page: verdict, gates, layers, tasks, flips, history.

    Exit codes: 0 done, 2 usage, 4 runtime, 5 --history is of another original.
    """
    from quantkit.errors import UsageError
    from quantkit.report import read_history, read_run, render
    from quantkit.results import write_text

    if output.is_dir():
        raise UsageError(f"{output}: is a folder", remedy="give -o a file, such as report.html")
    this = read_run(run)
    write_text(output, render(this, read_history(this, history or ())))
    size = output.stat().st_size
    if as_json:
        typer.echo(json.dumps({"report": str(output), "bytes": size}))
    else:
        typer.echo(f"{output}  {size / 1000:.0f} kB")
