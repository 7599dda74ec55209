"""Running suites through lm-eval, one row of evidence an item.

lm-eval builds the prompts, the few-shot contexts, the filters and the metrics, so that a
number here is the number that ``lm_eval`` prints for the same file; quantkit answers its
requests (`quantkit.evals.language_model`) and keeps what each item scored. Nothing here
touches the network or a cache folder: rows are handed over in memory.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate as lm_evaluate
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from quantkit.errors import QuantkitError
from quantkit.evals.early import EarlyStop, run_until_decided
from quantkit.evals.language_model import QuantkitLM
from quantkit.evals.metrics import METRICS
from quantkit.evals.scorers import NONE_ALLOWED, Factory, Scorer, make_scorer
from quantkit.evals.suites import Suite
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
        suite: what to run.
        samples: sorted positions of the items to score; all when None.
        scorer: scores written answers in place of the suite's metric.
    """
    lm.label = suite.name
    with _quiet():
        try:
            loaded = TaskManager(include_defaults=False).load([_task_config(suite)])
            (task,) = loaded["tasks"].values()
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
            answer = lm_evaluate(
                lm=lm,
                task_dict=loaded,
                samples=None if samples is None else {suite.name: samples},
                bootstrap_iters=0,
                log_samples=True,
            )
        except (QuantkitError, KeyboardInterrupt):
            raise
        except Exception as e:
            raise QuantkitError(
                f"{suite.path}: lm-eval failed on it ({type(e).__name__}: {e})"
            ) from e
    logged = sorted(answer["samples"][suite.name], key=lambda s: s["doc_id"])
    expected = list(range(suite.n)) if samples is None else samples
    if [s["doc_id"] for s in logged] != expected:
        raise QuantkitError(
            f"{suite.path}: lm-eval scored {len(logged)} items where {len(expected)} were asked"
        )
    rows = tuple(_item(suite, sample, scorer) for sample in logged)
    return TaskResult(metric=suite.score_name, rows=rows, hash=suite.hash)


def _item(suite: Suite, sample: Mapping[str, Any], scorer: Scorer | None) -> ItemRow:
    """One row from one of lm-eval's logged samples."""
    index = sample["doc_id"]
    row = suite.rows[index]
    name = suite.item_id(index)
    prediction, target, details = _answer(suite, sample)
    if scorer is None:
        score = METRICS[suite.metric][1](sample[suite.metric])
    else:
        score = scorer(prediction, target, row)
    if not math.isfinite(score):
        raise QuantkitError(f"{suite.name}: item {name!r} has the score {score}")
    return ItemRow(
        id=name,
        score=score,
        hash=sample["doc_hash"],
        prediction=prediction,
        target=target,
        prompt=str(sample["arguments"][0][0]),
        slice=_field(row, suite.slice),
        cluster=_field(row, suite.cluster),
        must_not_flip=bool(suite.must_not_flip and row.get(suite.must_not_flip)),
        details=details,
    )


def _answer(suite: Suite, sample: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """(what the model said, what was right, details) of a sample."""
    responses, target = sample["filtered_resps"], sample["target"]
    details: dict[str, Any] = {}
    for metric in sample["metrics"]:
        value = sample[metric]
        if metric != suite.metric and isinstance(value, int | float):
            details[metric] = float(value)
    if suite.output_type == "multiple_choice":
        # acc_mutual_info appends one more request a choice, without the context.
        delimiter = suite.config.get("target_delimiter", " ")
        texts = [args[1] for args in sample["arguments"]]
        choices = [t.removeprefix(delimiter) for t in texts]
        values = [float(value) for value, _ in responses]
        if suite.metric == "acc_mutual_info":
            half = len(values) // 2
            choices, values = choices[:half], values[:half]
            ranked = [v - float(u) for v, (u, _) in zip(values, responses[half:], strict=True)]
        elif suite.metric == "acc_norm":
            ranked = [v / len(c) for v, c in zip(values, choices, strict=True)]
        elif suite.metric == "acc_bytes":
            ranked = [v / len(c.encode()) for v, c in zip(values, choices, strict=True)]
        else:
            ranked = values
        details["loglikelihoods"] = values
        golds = target if isinstance(target, list) else [target]
        right = " | ".join(choices[g] if isinstance(g, int) else str(g) for g in golds)
        return choices[max(range(len(ranked)), key=ranked.__getitem__)], right, details
    if suite.output_type == "generate_until":
        return str(responses[0]), str(target), details
    if suite.output_type == "loglikelihood":
        value, greedy = responses[0]
        details |= {"loglikelihood": float(value), "greedy": bool(greedy)}
        return str(target) if greedy else "", str(target), details
    return "", "", details | {"loglikelihood": float(responses[0])}


def _field(row: Mapping[str, Any], name: str | None) -> str | None:
    value = row.get(name) if name else None
    return None if value is None else str(value)


# --- handing a suite to lm-eval --------------------------------------------------------------


class _Rows(list[dict[str, Any]]):
    """What lm-eval needs of a dataset: rows, and the names of their columns."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        # Columns in order of appearance and None where a row lacks one, as arrow reads JSON
        # lines: the rows, and lm-eval's hashes of them, are then those of `lm_eval` itself.
        columns = list(dict.fromkeys(key for row in rows for key in row))
        super().__init__({c: row.get(c) for c in columns} for row in rows)
        self.features = dict.fromkeys(columns)


def _task_config(suite: Suite) -> dict[str, Any]:
    """The suite's YAML as lm-eval takes it, with rows in place of files."""
    config = copy.deepcopy(dict(suite.config))
    # Each metric states what lm-eval would otherwise warn about and look up.
    for entry in config.setdefault("metric_list", [{"metric": suite.metric}]):
        entry.setdefault("aggregation", _AGGREGATIONS.get(entry["metric"], "mean"))
        entry.setdefault("higher_is_better", entry["metric"] not in _LOWER_IS_BETTER)
    del config["dataset_path"], config["dataset_kwargs"]
    splits = {split: _Rows(rows) for split, rows in suite.splits.items()}
    config["custom_dataset"] = lambda **_: splits
    return config


_AGGREGATIONS = {
    "perplexity": "perplexity",
    "word_perplexity": "weighted_perplexity",
    "byte_perplexity": "weighted_perplexity",
    "bits_per_byte": "bits_per_byte",
    "brier_score": "brier_score",
}
_LOWER_IS_BETTER = (*_AGGREGATIONS,)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's progress bar and notices off the terminal while it runs."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with mock.patch("lm_eval.api.task.tqdm", functools.partial(tqdm, disable=True)):
            yield
    finally:
        logger.setLevel(level)
