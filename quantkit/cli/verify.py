"""``quantkit verify``: is this checkpoint whole, unchanged, signed, and what its recipe gives?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from quantkit.rebuild import Comparison


def command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint folder.")],
    reload: Annotated[
        bool, typer.Option("--reload/--no-reload", help="Also load it and run a few tokens.")
    ] = True,
    key: Annotated[
        Path | None,
        typer.Option("--key", metavar="PUB", help="Check its signature with this public key."),
    ] = None,
    rebuild: Annotated[
        bool,
        typer.Option("--rebuild", help="Also make it again from its manifest and compare bytes."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", help="What to rebuild from. Default: where the run had it."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Calibration data to rebuild from, in any order. Repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Re-hash a checkpoint's files, look for missing ones, and reload it.

    Of another program's checkpoint: that every tensor is there and finite, and the reload.
    With --key: every file is as it was signed. With --rebuild: the manifest's recipe, run again on
    the same model and data with the same number of threads, gives the same bytes.

    Exit codes: 0 it is what its manifest or config says, 2 usage or an input of the rebuild is
    missing, 4 it is not, 5 the rebuild differs where libraries or the machine's class do, too.
    """
    from dataclasses import asdict

    from quantkit.errors import UsageError
    from quantkit.models.verify import Finding, require_ok, verify_files, verify_reload

    if not rebuild and (model or data):
        raise UsageError("--model and --data are of a rebuild", remedy="give --rebuild")
    findings = verify_files(checkpoint)
    if key is not None:
        from quantkit.signature import SIGNATURE, check_signature

        check_signature(checkpoint, key)
        findings.append(Finding(SIGNATURE, True, f"every file is as it was signed ({key})"))
    if reload and all(f.ok for f in findings):
        findings += verify_reload(checkpoint)
    comparison = None
    if rebuild and all(f.ok for f in findings):
        comparison = _rebuild(checkpoint, model, data or [])
        for found in comparison.differences:
            findings.append(Finding(f"rebuild of {found.file}", False, found.detail))
        if not comparison.differences:
            findings.append(Finding("rebuild", True, f"{comparison.files} files alike"))
    ok = all(f.ok for f in findings)
    if as_json:
        other = comparison.environment if comparison is not None else {}
        document = {"ok": ok, "checks": [asdict(f) for f in findings], "environment": other}
        typer.echo(json.dumps(document, indent=1))
    else:
        for finding in findings:
            typer.echo(f"{'ok  ' if finding.ok else 'FAIL'} {finding.check}: {finding.detail}")
    if comparison is not None:
        comparison.require_same(checkpoint)
    require_ok(findings, checkpoint)


def _rebuild(checkpoint: Path, model: str | None, data: list[str]) -> Comparison:
    import tempfile

    from quantkit.cli.progress import reporter
    from quantkit.rebuild import rebuild

    with tempfile.TemporaryDirectory(prefix="quantkit-rebuild-") as folder:
        return rebuild(checkpoint, Path(folder), model=model, data=data, reporter=reporter)
