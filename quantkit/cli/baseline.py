"""``quantkit baseline``: record results, accept them as the reference, show and compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from quantkit.gate.baselines import Baseline

app = typer.Typer(
    no_args_is_help=True, help="Named baselines: recorded, then accepted by a person."
)

Name = Annotated[str, typer.Argument(help="The baseline's name.")]
Folder = Annotated[Path, typer.Option("--dir", help="Where baselines are kept.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]

_DEFAULT = Path(".quantkit/baselines")


@app.command()
def record(
    results: Annotated[Path, typer.Argument(help="Results of the model to hold others against.")],
    name: Annotated[str, typer.Option("--name", help="The name to record under.")],
    folder: Folder = _DEFAULT,
    as_json: Json = False,
) -> None:
    """Record results as a pending baseline. It holds nobody until it is accepted."""
    from quantkit.gate import baselines
    from quantkit.results import Results

    made = baselines.record(Results.load(results), name, folder)
    _print([made], as_json)
    if not as_json:
        typer.echo(f"run `quantkit baseline accept {name}` to put it in force")


@app.command()
def accept(name: Name, folder: Folder = _DEFAULT, as_json: Json = False) -> None:
    """Put the pending baseline in force."""
    from quantkit.gate import baselines

    _print([baselines.accept(name, folder)], as_json)


@app.command()
def show(
    name: Annotated[str | None, typer.Argument(help="One baseline. Default: all.")] = None,
    folder: Folder = _DEFAULT,
    as_json: Json = False,
) -> None:
    """Show what is stored: names, states, scores and what they are keyed on."""
    from quantkit.gate import baselines

    found = baselines.stored(folder, name)
    _print(found, as_json)
    if not found and not as_json:
        typer.echo(f"no baselines in {folder}")


@app.command()
def diff(
    name: Name,
    other: Annotated[
        str | None,
        typer.Argument(help="Results or another baseline's name. Default: what NAME has pending."),
    ] = None,
    folder: Folder = _DEFAULT,
    as_json: Json = False,
) -> None:
    """Show what differs between an accepted baseline and another one.

    Exit codes: 0 the same experiment (scores may differ), 2 usage, 5 not comparable.
    """
    from quantkit.errors import EXIT_NOT_COMPARABLE, UsageError
    from quantkit.gate import baselines
    from quantkit.gate.baseline_diff import diff as compare
    from quantkit.results import Results

    before = baselines.load(name, folder)
    if other is None:
        waiting = [b for b in baselines.stored(folder, name) if b.pending]
        if not waiting:
            raise UsageError(
                f"baseline {name!r} has nothing pending in {folder}",
                remedy="name results or another baseline to compare it with",
            )
        after, source = waiting[0].results, str(waiting[0].path)
    elif Path(other).is_file() or not baselines.is_name(other):
        after, source = Results.load(other), other
    else:
        found = baselines.load(other, folder)
        after, source = found.results, str(found.path)
    made = compare(before.results, after)
    if as_json:
        sides = {"before": str(before.path), "after": source}
        typer.echo(json.dumps({**sides, **made.to_json()}, sort_keys=True))
    else:
        typer.echo(f"{before.path} → {source}")
        for change in made.changes:
            mark = "  not comparable" if change.breaks else ""
            values = f"{_value(change.before)} → {_value(change.after)}"
            typer.echo(f"  {change.key}: {values}{mark}")
        for task, (gains, losses) in made.flips.items():
            typer.echo(f"  {task}: {losses} lost, {gains} gained")
        if not made.changes:
            typer.echo("  nothing differs")
    raise typer.Exit(EXIT_NOT_COMPARABLE if made.breaking else 0)


def _value(value: object) -> str:
    text = "absent" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else text[:12] + "…"


def _print(found: list[Baseline], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([_document(b) for b in found], sort_keys=True))
        return
    for baseline in found:
        typer.echo(f"{baseline.name}  {_state(baseline)}  {baseline.path}")
        for task, facts in sorted(baseline.manifest["tasks"].items()):
            typer.echo(
                f"  {task}.{facts['metric']}  {100 * facts['value']:.1f} %  {facts['n']} items"
            )
        for key, value in sorted(baseline.manifest["fingerprint"].items()):
            typer.echo(f"  {key}: {value}")


def _state(baseline: Baseline) -> str:
    return "pending" if baseline.pending else "accepted"


def _document(baseline: Baseline) -> dict[str, Any]:
    return {
        "name": baseline.name,
        "state": _state(baseline),
        "path": str(baseline.path),
        "manifest": dict(baseline.manifest),
    }
