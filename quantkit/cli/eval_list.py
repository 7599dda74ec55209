"""``quantkit eval --list`` and ``--validate``: suites without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase

import typer


def validate_suites(specs: Sequence[str], as_json: bool) -> None:
    """Check suites and print what they hold; the installed ones when none is named.

    Raises:
        UsageError, QuantkitError: see `quantkit.evals.suites.load_suites`.
    """
    from quantkit.cli.eval import print_table
    from quantkit.evals.suites import installed_folder, load_suites

    folder = installed_folder()
    suites = load_suites(specs or ([folder] if folder else []))
    rows = [
        {
            "suite": s.name,
            "items": s.n,
            "metric": s.metric,
            "kind": s.output_type,
            "slices": len(s.parts) or (len({row.get(s.slice) for row in s.rows}) if s.slice else 0),
            "hash": s.hash,
            "file": str(s.path),
        }
        for s in suites
    ]
    if as_json:
        typer.echo(json.dumps({"suites": rows}))
        return
    shown = [{**row, "hash": str(row["hash"])[:12]} for row in rows]
    print_table([list(shown[0]) if shown else ["no suites"], *(list(r.values()) for r in shown)])


def print_names(patterns: Sequence[str], as_json: bool) -> None:
    """Print every name that ``--suite`` takes, or those that match one of the patterns.

    Raises:
        UsageError: none matches.
    """
    from quantkit.cli.eval import print_table
    from quantkit.errors import UsageError
    from quantkit.evals.lm_eval_index import kinds
    from quantkit.evals.suites import LM_EVAL, installed_suites

    installed = installed_suites()
    found = [(name, "suite", "quantkit") for name in installed]
    found += [
        (f"{LM_EVAL}{name}" if name in installed else name, kind, "lm-eval")
        for name, kind in sorted(kinds().items())
    ]
    if patterns:
        found = [row for row in found if any(fnmatchcase(row[0], p) for p in patterns)]
    if not found:
        raise UsageError(
            f"no suite is called {' or '.join(patterns)}", remedy="arc* matches arc_easy"
        )
    if as_json:
        rows = [dict(zip(("suite", "kind", "of"), row, strict=True)) for row in found]
        typer.echo(json.dumps({"names": rows}))
        return
    print_table([["suite", "kind", "of"], *(list(row) for row in found)])
