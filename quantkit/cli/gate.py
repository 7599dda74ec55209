"""``quantkit gate``: hold a candidate's results against a baseline's."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from quantkit.gate import Flip
    from quantkit.results import Verdict


class OnInconclusive(StrEnum):
    """What an inconclusive verdict ends with: exit code 1 or 0 in place of 3."""

    fail = "fail"
    warn = "warn"


def command(
    results: Annotated[Path, typer.Argument(help="The candidate's results, from `quantkit eval`.")],
    baseline: Annotated[
        str,
        typer.Option(
            "--baseline",
            help="The original model's results: a file, or the name of an accepted baseline.",
        ),
    ],
    policy: Annotated[
        Path | None,
        typer.Option(
            "--policy",
            help="YAML of gates and limits. Default: five points a task, a tenth of perplexity.",
        ),
    ] = None,
    timings: Annotated[
        Path | None,
        typer.Option(
            "--timings",
            help="Latencies of both models, from `quantkit bench decode --timings`, for latency.* "
            "gates.",
        ),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", help="Write JUnit XML, one test case a gate.")
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(
            "--markdown",
            help="Write a Markdown summary. It is appended to $GITHUB_STEP_SUMMARY when set.",
        ),
    ] = None,
    flips: Annotated[
        Path | None, typer.Option("--flips", help="Write the flipped items as JSON lines.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the verdict as gate.json.")
    ] = None,
    badge: Annotated[
        Path | None,
        typer.Option("--badge", help="Write the JSON of a shields.io endpoint badge."),
    ] = None,
    on_inconclusive: Annotated[
        OnInconclusive | None,
        typer.Option("--on-inconclusive", help="End with 1 (fail) or 0 (warn) in place of 3."),
    ] = None,
    baseline_dir: Annotated[
        Path, typer.Option("--baseline-dir", help="Where named baselines are kept.")
    ] = Path(".quantkit/baselines"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> None:
    """Pass or fail a quantized model against its baseline.

    Exit codes: 0 pass, 1 measured regression, 2 usage, 3 inconclusive, 4 runtime,
    5 not comparable.
    """
    from quantkit import gate
    from quantkit.gate import baselines
    from quantkit.results import Results, write_json, write_text

    try:
        candidate = Results.load(results)
        reference, source = baselines.resolve(baseline, candidate, baseline_dir)
        if timings is not None:
            candidate, reference = gate.with_timings(timings, candidate, reference)
        held = gate.load_policy(policy) if policy else gate.default_policy(candidate, reference)
        verdict = gate.judge(candidate, reference, held)
        flipped = gate.flips(candidate, reference, held)
        document = gate.document(
            verdict,
            held,
            gate.provenance(results, candidate),
            gate.provenance(source, reference),
        )
    except Exception as error:  # CI reads the file even where the process was at fault
        if junit:
            _write_error(junit, error)
        raise

    code = gate.exit_code(verdict, on_inconclusive)
    try:
        if junit:
            fails = on_inconclusive is OnInconclusive.fail
            write_text(junit, gate.junit(verdict, inconclusive_fails=fails))
        if markdown:
            write_text(markdown, gate.markdown(verdict, flipped))
        if flips:
            write_text(flips, gate.flips_jsonl(flipped))
        if output:
            write_json(output, document)
        if badge:
            write_json(badge, gate.badge(verdict))
        _tell_github(verdict, flipped)
    finally:  # a file that cannot be written must not hide the verdict
        if as_json:
            typer.echo(json.dumps({**document, "exit_code": code}, sort_keys=True, allow_nan=False))
        else:
            typer.echo(gate.table(verdict), nl=False)
    raise typer.Exit(code)


def _write_error(junit: Path, error: Exception) -> None:
    """JUnit of a gate that could not be held; the exit code is that error's, come what may."""
    from quantkit import gate
    from quantkit.errors import QuantkitError
    from quantkit.results import write_text

    try:
        write_text(junit, gate.junit_error(error))
    except QuantkitError as e:
        typer.echo(f"error: {e}", err=True)


def _tell_github(verdict: Verdict, flipped: tuple[Flip, ...]) -> None:
    """Annotations (on stderr, where the runner reads them too) and the step summary."""
    from quantkit import gate
    from quantkit.errors import UsageError

    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in gate.github_annotations(verdict):
            typer.echo(line, err=True)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if not summary:
        return
    path = Path(summary)
    try:
        used = path.stat().st_size if path.exists() else 0
        limit = max(0, gate.MARKDOWN_BYTES - used)
        with path.open("a", encoding="utf-8") as file:
            file.write(gate.markdown(verdict, flipped, limit=limit))
    except OSError as e:
        raise UsageError(f"{path}: cannot be written ({e.strerror or e})") from e
