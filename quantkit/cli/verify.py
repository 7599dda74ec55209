"""``quantkit verify``: is this checkpoint whole and unchanged?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint folder.")],
    reload: Annotated[
        bool, typer.Option("--reload/--no-reload", help="Also load it and run a few tokens.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Re-hash a checkpoint's files, look for missing ones, and reload it.

    Of another program's checkpoint: that every tensor is there and finite, and the reload.
    Exit 0 when it is what its manifest or config says, 4 when it is not.
    """
    from dataclasses import asdict

    from quantkit.models.verify import require_ok, verify_files, verify_reload

    findings = verify_files(checkpoint)
    if reload and all(f.ok for f in findings):
        findings += verify_reload(checkpoint)
    ok = all(f.ok for f in findings)
    if as_json:
        typer.echo(json.dumps({"ok": ok, "checks": [asdict(f) for f in findings]}, indent=1))
    else:
        for finding in findings:
            typer.echo(f"{'ok  ' if finding.ok else 'FAIL'} {finding.check}: {finding.detail}")
    require_ok(findings, checkpoint)
