"""``quantkit export``: a checkpoint in another program's format."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    """A key of `quantkit.checkpoint.export.EXPORTERS`."""

    gguf = "gguf"
    gptq = "gptq"


def command(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="A quantized checkpoint folder.")
    ],
    fmt: Annotated[
        Format,
        typer.Option(
            "--format", help="gguf: a file for llama.cpp; gptq: a folder for GPTQModel and vLLM."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file or folder to write; must not exist.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Write a checkpoint in another format, code by code: nothing is quantized again.

    What the format cannot hold is an error (exit 2); docs/formats.md says what it can.
    """
    from quantkit.checkpoint.export import export

    typer.echo(f"exporting {checkpoint}", err=True)
    done = export(checkpoint, fmt.value, output)
    rounding = done.rounding
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "output": str(done.path),
                    "format": fmt.value,
                    "size_bytes": done.size_bytes,
                    "tensors": done.tensors,
                    "rounding": {
                        "total": rounding.total,
                        "changed": rounding.changed,
                        "worst": rounding.worst,
                    },
                    "notes": done.notes,
                }
            )
        )
        return
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(done.tensors.items()))
    typer.echo(f"{done.path}  {done.size_bytes / 1e6:.1f} MB  {kinds}")
    if rounding.changed:
        typer.echo(
            f"fp16 scales: {rounding.changed} of {rounding.total} rounded, by at most "
            f"{rounding.worst:.1e} of their value"
        )
    else:
        typer.echo("exact: every weight is the checkpoint's code times its scale")
    for note in done.notes:
        typer.echo(f"note: {note}")
