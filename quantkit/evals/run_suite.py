"""Running suites through lm-eval, one row of evidence an item.

lm-eval builds the prompts, the few-shot contexts, the filters and the metrics, so that a
number here is the number that ``lm_eval`` prints for the same file; quantkit answers its
requests (`quantkit.evals.language_model`) and keeps what each item scored. Nothing here
touches the network or a cache folder: rows are handed over in memory.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate as lm_evaluate
from lm_eval.tasks import TaskManager

from quantkit.errors import QuantkitError
from quantkit.evals.documents import as_arrow_reads
from quantkit.evals.early import EarlyStop, run_until_decided
from quantkit.evals.item_row import item_row
from quantkit.evals.language_model import QuantkitLM
from quantkit.evals.metrics import AGGREGATIONS
from quantkit.evals.quiet import quiet
from quantkit.evals.scorers import NONE_ALLOWED, Factory, Scorer, make_scorer
from quantkit.evals.shots import shots_of_whole_run
from quantkit.evals.suite import Suite
from quantkit.evals.token_model import TokenLM
from quantkit.models.runtime import Runtime
from quantkit.progress import Progress, silent
from quantkit.results import ItemRow, TaskResult


def run_suites(
    runtime: Runtime,
    suites: Sequence[Suite],
    *,
    max_items: int | None = None,
    seed: int = 0,
    budget: int | None = None,
    early: Mapping[str, EarlyStop] | None = None,
    scorers: Mapping[str, Factory] = NONE_ALLOWED,
    progress: Progress = silent,
) -> dict[str, TaskResult]:
    """Score a model on suites.

    Args:
        runtime: the model.
        suites: see `quantkit.evals.suites.load_suites`.
        max_items: at most so many items of each suite, drawn with ``seed``; the same seed
            draws the same items for every model.
        seed: see ``max_items``.
        budget: rows of a batch, see `quantkit.evals.language_model.QuantkitLM`.
        early: suites that may end before their last item, by name.
        scorers: ``code`` and ``judge``, where they are allowed; see `quantkit.evals.scorers`.
        progress: told of answered requests, a suite's name as the label.

    Returns:
        Results by suite name.

    Raises:
        QuantkitError: NaN, or an error inside lm-eval.
    """
    lm = QuantkitLM(runtime, progress=progress, budget=budget)
    return ask_suites(
        lm,
        suites,
        max_items=max_items,
        seed=seed,
        early=early,
        scorers=scorers,
    )


def ask_suites(
    lm: TokenLM,
    suites: Sequence[Suite],
    *,
    max_items: int | None = None,
    seed: int = 0,
    early: Mapping[str, EarlyStop] | None = None,
    scorers: Mapping[str, Factory] = NONE_ALLOWED,
) -> dict[str, TaskResult]:
    """`run_suites` on anything that answers lm-eval's requests."""
    made = {s.name: make_scorer(s.scoring, scorers) for s in suites if s.scoring is not None}
    results = {}
    for suite in suites:
        score = functools.partial(run_suite, lm, suite, scorer=made.get(suite.name))
        stop = (early or {}).get(suite.name)
        if stop is not None:
            results[suite.name] = run_until_decided(score, suite, stop)
        else:
            results[suite.name] = score(draw(suite.n, max_items, seed))
    return results


def draw(n: int, max_items: int | None, seed: int) -> list[int] | None:
    """Positions of a seeded subset, sorted; None for all.

    Sorted, because lm-eval pairs its samples with positions in ascending order.
    """
    if max_items is None or max_items >= n:
        return None
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return sorted(order[:max_items])


def run_suite(
    lm: TokenLM,
    suite: Suite,
    samples: list[int] | None = None,
    scorer: Scorer | None = None,
) -> TaskResult:
    """Score a model on one suite.

    Args:
        lm: the model.
        suite: what to run; a group's tasks run one after the other.
        samples: sorted positions of the items to score; all when None.
        scorer: scores written answers in place of the suite's metric.

    Raises:
        QuantkitError: an error inside lm-eval, or a score that is not finite.
    """
    if suite.parts:
        return _run_group(lm, suite, samples, scorer)
    lm.label = suite.name
    with quiet():
        try:
            task = _build(suite) if suite.origin is None else suite.origin.task
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
            with shots_of_whole_run(task, samples):
                answer = lm_evaluate(
                    lm=lm,
                    task_dict={"tasks": {suite.name: task}},
                    samples=None if samples is None else {suite.name: samples},
                    bootstrap_iters=0,
                    log_samples=True,
                )
        except (QuantkitError, KeyboardInterrupt):
            raise
        except Exception as e:
            raise QuantkitError(
                f"suite {suite.name} ({suite.path}): lm-eval failed on it ({type(e).__name__}: {e})"
            ) from e
    logged = sorted(answer["samples"][suite.name], key=lambda s: s["doc_id"])
    scored = logged[0]["filter"] if suite.origin is None else suite.origin.filter
    expected = list(range(suite.n)) if samples is None else samples
    found = [sample["doc_id"] for sample in logged if sample["filter"] == scored]
    if found != expected:
        raise QuantkitError(
            f"suite {suite.name} ({suite.path}): lm-eval scored {len(found)} items where "
            f"{len(expected)} were asked"
        )
    others: dict[int, list[Mapping[str, Any]]] = {index: [] for index in expected}
    for sample in logged:
        if sample["filter"] != scored:
            others[sample["doc_id"]].append(sample)
    rows = tuple(
        item_row(suite, sample, scorer, others[sample["doc_id"]])
        for sample in logged
        if sample["filter"] == scored
    )
    return TaskResult(suite.score_name, rows, suite.hash, provenance=suite.provenance)


def _run_group(
    lm: TokenLM, suite: Suite, samples: list[int] | None, scorer: Scorer | None
) -> TaskResult:
    """A group's tasks, their rows as slices of one suite."""
    rows: list[ItemRow] = []
    start = 0
    for part in suite.parts:
        positions = range(start, start + part.n)
        start += part.n
        mine = None if samples is None else [i - positions[0] for i in samples if i in positions]
        if mine == []:  # lm-eval takes no samples to mean all
            continue
        found = run_suite(lm, part, mine, scorer).rows
        local = range(part.n) if mine is None else mine
        rows += [
            replace(row, id=suite.item_id(positions[i]), slice=part.name)
            for i, row in zip(local, found, strict=True)
        ]
    return TaskResult(suite.score_name, tuple(rows), suite.hash, provenance=suite.provenance)


# --- handing a suite to lm-eval --------------------------------------------------------------


def _build(suite: Suite) -> Any:
    """lm-eval's task of a file."""
    (task,) = TaskManager(include_defaults=False).load([_task_config(suite)])["tasks"].values()
    return task


def _task_config(suite: Suite) -> dict[str, Any]:
    """The suite's YAML as lm-eval takes it, with rows in place of files."""
    config = copy.deepcopy(dict(suite.config))
    # Each metric states what lm-eval would otherwise warn about and look up.
    config["metric_list"] = config.get("metric_list") or [{"metric": suite.metric}]
    for entry in config["metric_list"]:
        entry.setdefault("aggregation", AGGREGATIONS.get(entry["metric"], "mean"))
        entry.setdefault("higher_is_better", entry["metric"] not in AGGREGATIONS)
    del config["dataset_path"], config["dataset_kwargs"]
    splits = {split: as_arrow_reads(rows) for split, rows in suite.splits.items()}
    config["custom_dataset"] = lambda **_: splits
    return config
