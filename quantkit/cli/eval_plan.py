"""``quantkit eval --plan``: what the gates need, before anything is spent on them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from quantkit.evals.scorers import Factory
    from quantkit.evals.suite import Suite
    from quantkit.gate import Policy
    from quantkit.gate.planning import PlanRow
    from quantkit.models.runtime import Runtime

#: Items that are scored to learn how long one takes, after as many to warm up.
TIMED_ITEMS = 8


class Timing(NamedTuple):
    """How long a whole suite would take, and from how many items that is known."""

    seconds: float
    items: int


def read_gates(policy: Path | None, recipe: str | None) -> tuple[Policy | None, Sequence[str]]:
    """(policy, the recipe's suites).

    Raises:
        UsageError: both are given, or what their readers refuse.
    """
    from quantkit.errors import UsageError
    from quantkit.gate import load_policy, parse_policy
    from quantkit.recipe import load_recipe

    if policy is not None and recipe is not None:
        raise UsageError("--policy and --recipe both name gates", remedy="give one of them")
    if policy is not None:
        return load_policy(policy), ()
    if recipe is None:
        return None, ()
    loaded = load_recipe(recipe)
    source = str(loaded.file) if loaded.file else recipe
    if not loaded.gate:
        raise UsageError(f"{source}: has no `gate:` section to plan for", remedy="add one")
    gates = parse_policy(dict(loaded.gate), source=source, lines=loaded.gate_lines)
    return gates, loaded.suites


def print_plan(
    suites: Sequence[Suite],
    policy: Policy | None,
    *,
    max_items: int | None,
    flip_rates: Sequence[float],
    load: Callable[[], Runtime] | None,
    scorers: Mapping[str, Factory],
    as_json: bool,
) -> None:
    """Print items needed, items there are, power, and seconds where a model can be timed.

    Args:
        suites: to score.
        policy: the gates; None plans the default margin for every suite.
        max_items: ``--max-items``.
        flip_rates: ψ to plan for; the default ones when empty.
        load: gives the model to time; None times nothing.
        scorers: see `quantkit.evals.run_suite.run_suites`.
        as_json: one JSON document in place of a table.

    Raises:
        UsageError: a gate of a suite that is not given, or no task gate at all.
    """
    from quantkit.gate.planning import FLIP_RATES, plan

    rates = tuple(flip_rates) or FLIP_RATES
    rows: list[PlanRow] = []
    for gate, suite in _gated(suites, policy):
        n = suite.n if max_items is None else min(suite.n, max_items)
        rows += plan(gate, n, min(n, _clusters(suite)), rates)
    timed = {} if load is None else _time(load(), suites, max_items, scorers)
    if as_json:
        seconds = {name: timing.seconds for name, timing in timed.items()}
        typer.echo(json.dumps({"plan": [r.to_json() for r in rows], "seconds": seconds}))
        return
    _print_table(rows, timed)


def _gated(suites: Sequence[Suite], policy: Policy | None) -> list[tuple[Any, Suite]]:
    from quantkit.errors import UsageError
    from quantkit.gate.policy import DEFAULT_MARGIN, TaskGate

    if policy is None:
        return [(TaskGate(s.name, s.score_name, DEFAULT_MARGIN), s) for s in suites]
    named = {(s.name, s.score_name): s for s in suites}
    pairs = []
    for gate in policy.tasks:
        suite = named.get((gate.task, gate.metric))
        if suite is None:
            known = ", ".join(f"{name}.{metric}" for name, metric in named) or "none"
            raise UsageError(
                f"{policy.source}: gate {gate.name!r}: no suite of that name and metric is given",
                remedy=f"add it with --suite; given are {known}",
            )
        pairs.append((gate, suite))
    if not pairs:
        raise UsageError(f"{policy.source}: holds no task gate, so there is nothing to plan")
    return pairs


def _clusters(suite: Suite) -> int:
    """Independent groups of items: an item without a cluster is one."""
    values = [row.get(suite.cluster) if suite.cluster else None for row in suite.rows]
    return len({v for v in values if v is not None}) + values.count(None)


def _time(
    runtime: Runtime,
    suites: Sequence[Suite],
    max_items: int | None,
    scorers: Mapping[str, Factory],
) -> dict[str, Timing]:
    """How long each suite would take, from a few of its items."""
    from quantkit.evals.run_suite import run_suites

    found = {}
    for suite in suites:
        n = suite.n if max_items is None else min(suite.n, max_items)
        timed = min(TIMED_ITEMS, n)
        run_suites(runtime, [suite], max_items=timed, seed=1, scorers=scorers)
        began = time.perf_counter()
        run_suites(runtime, [suite], max_items=timed, seed=0, scorers=scorers)
        found[suite.name] = Timing((time.perf_counter() - began) * n / timed, timed)
    return found


def _print_table(rows: Sequence[PlanRow], timed: Mapping[str, Timing]) -> None:
    from quantkit.cli.eval import print_table

    table: list[list[Any]] = [
        ["gate", "margin", "flip rate", "items needed", "there are", "power", ""]
    ]
    for row in rows:
        needed = "over 10 million" if row.needed is None else row.needed
        if row.n < row.fewest:
            note = f"even zero flips need {row.fewest} items"
        elif not row.detectable:
            note = "cannot lose the margin at this flip rate"
        else:
            note = "enough" if row.enough else f"{row.needed - row.n} short" if row.needed else ""
        table.append(
            [
                row.gate,
                f"{100 * row.margin:g} points",
                f"{100 * row.flips:g} %",
                needed,
                row.n,
                f"{row.power:.2f}",
                note,
            ]
        )
    print_table(table)
    for row in {row.gate: row for row in rows}.values():
        if row.clusters < row.n:
            typer.echo(
                f"{row.gate}: {row.n} items share {row.clusters} clusters and say less than "
                f"{row.n} independent ones: more are needed than the table says"
            )
    for name, timing in timed.items():
        typer.echo(f"{name}: about {timing.seconds:.0f} s a model, from {timing.items} items")
