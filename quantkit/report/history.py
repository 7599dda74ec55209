"""Earlier runs of the same model beside this one, in the order given: what each measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import NotComparableError, UsageError
from quantkit.report import plots
from quantkit.report.intervals import Interval, score_interval
from quantkit.report.run_folder import Run, read_run
from quantkit.report.words import fixed, percent
from quantkit.results import Outcome, Results, TaskResult

_SIGNS = {Outcome.PASS: "✓", Outcome.FAIL: "✗", Outcome.INCONCLUSIVE: "?"}


@dataclass(frozen=True)
class Past:
    """One run that was scored, or a results file alone.

    Attributes:
        name: of the run's folder or the file.
        note: when it ended and by which recipe, as far as it says so.
        outcome: None where nothing judged it.
        results: what it scored.
    """

    name: str
    note: str
    outcome: Outcome | None
    results: Results


@dataclass(frozen=True)
class _Measure:
    """One number that runs are compared by; ``read`` gives None where it means something else."""

    name: str
    read: Callable[[Results], Interval | None]
    show: Callable[[float], str]
    as_percent: bool = False


def read_history(run: Run, paths: Sequence[str | Path]) -> tuple[Past, ...]:
    """The runs and results files at ``paths``, and ``run`` itself last.

    Args:
        run: the run that the page is about.
        paths: folders as `quantkit.report.run_folder.read_run` takes them, or results files.

    Raises:
        UsageError: no run or results there, or a run that was not scored.
        NotComparableError: scores of a model made from other original weights.
    """
    if not paths:
        return ()
    this = _of_run(run, Path(run.output))
    past = [_read(Path(path)) for path in paths]
    for path, one in zip(paths, past, strict=True):
        ours, theirs = _original(this.results), _original(one.results)
        if ours != theirs:
            raise NotComparableError(
                f"{path}: made from weights {str(theirs)[:12]}…, this run from {str(ours)[:12]}…",
                remedy="give runs of one original model",
            )
    return (*past, this)


def _read(path: Path) -> Past:
    if path.is_file():
        results = Results.load(path)
        of_original = "original" not in results.fingerprint
        return Past(path.name, "the original" if of_original else "", None, results)
    return _of_run(read_run(path), path)


def _of_run(run: Run, path: Path) -> Past:
    if run.candidate is None or run.verdict is None:
        raise UsageError(
            f"{path}: was made with --no-gate and holds no scores",
            remedy="score it with `quantkit eval -o FILE` and give that file",
        )
    recipe = "" if run.recipe_name is None else f"{run.recipe_name}, "
    name = path.resolve().name.removesuffix(".run").removesuffix(".rejected")
    return Past(name, recipe + run.date[:10], run.verdict.outcome, run.candidate)


def _original(results: Results) -> Any:
    return results.fingerprint.get("original", results.fingerprint.get("model"))


def history(past: Sequence[Past]) -> dict[str, Any] | None:
    """The template's ``history``: a row a run, a plot a measure; None without earlier runs."""
    if not past:
        return None
    measures = [m for m in _measures(past[-1].results) if m.read(past[-1].results) is not None]
    found = [[measure.read(one.results) for measure in measures] for one in past]
    facets = []
    for measure, values in zip(measures, zip(*found, strict=True), strict=True):
        points = [(i, v) for i, v in enumerate(values, start=1) if v is not None]
        if len(points) > 1:
            facets.append(
                plots.history_facet(measure.name, points, len(past), as_percent=measure.as_percent)
            )
    return {
        "columns": [measure.name for measure in measures],
        "rows": [
            {
                "number": number,
                "name": one.name,
                "note": "this run" if number == len(past) else one.note,
                "word": "not judged" if one.outcome is None else str(one.outcome),
                "role": "none" if one.outcome is None else one.outcome.lower(),
                "sign": "" if one.outcome is None else _SIGNS[one.outcome],
                "cells": [
                    "–" if value is None else measure.show(value.estimate)
                    for measure, value in zip(measures, values, strict=True)
                ],
            }
            for number, (one, values) in enumerate(zip(past, found, strict=True), start=1)
        ],
        "facets": facets,
    }


def _measures(this: Results) -> list[_Measure]:
    """What ``this`` run was measured by; another run's number counts on the same text or items."""

    def of_text(read: Callable[[Any], float | None]) -> Callable[[Results], Interval | None]:
        def value(results: Results) -> Interval | None:
            text = results.text
            if text is None or this.text is None or not text.tokens or text.hash != this.text.hash:
                return None
            return _point(read(text))

        return value

    def of_task(name: str, mine: TaskResult) -> Callable[[Results], Interval | None]:
        def value(results: Results) -> Interval | None:
            task = results.tasks.get(name)
            if task is None or not task.rows or task.hash != mine.hash or task.n != mine.n:
                return None
            return score_interval(task.rows) or _point(task.value)

        return value

    def of_cost(key: str, unit: float = 1.0) -> Callable[[Results], Interval | None]:
        return lambda results: _point(results.cost.get(key), unit)

    tasks = [
        _Measure(f"{name} · {task.metric}", of_task(name, task), percent, as_percent=True)
        if all(0 <= row.score <= 1 for row in task.rows)
        else _Measure(f"{name} · {task.metric}", of_task(name, task), lambda v: fixed(v, 3))
        for name, task in sorted(this.tasks.items())
    ]
    return [
        *tasks,
        _Measure("KL to the original", of_text(lambda t: t.kl_mean), lambda v: fixed(v, 4)),
        _Measure("top-1 agreement", of_text(lambda t: t.top1_agreement), percent, as_percent=True),
        _Measure(
            "perplexity",
            of_text(lambda t: math.exp(min(t.mean_nll, 700.0))),
            lambda v: fixed(v, 2),
        ),
        _Measure("MB", of_cost("size_bytes", 1e6), lambda v: fixed(v, 1)),
        _Measure("bits a weight", of_cost("bits_per_weight"), lambda v: fixed(v, 2)),
    ]


def _point(value: Any, unit: float = 1.0) -> Interval | None:
    """A number of units, without bounds; None for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return Interval(value / unit, value / unit, value / unit, "")
