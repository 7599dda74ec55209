"""``quantkit sign``: put a signature on a finished checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint folder.")],
    key: Annotated[
        Path,
        typer.Option(
            "--key", metavar="FILE", help="Private key in PEM, unencrypted, on P-256 to P-521."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Sign every file of a checkpoint that is whole; writes model.sig beside the weights.

    `verify`, `eval` and `serve` check it with --key and the public key. Needs quantkit[sign].

    Exit codes: 0 signed, 2 usage, 4 the checkpoint is not what its manifest says.
    """
    from quantkit.models.verify import require_ok, verify_files
    from quantkit.signature import sign

    require_ok(verify_files(checkpoint), checkpoint)
    path = sign(checkpoint, key)
    typer.echo(json.dumps({"signature": str(path)}) if as_json else f"wrote {path}")
