"""Which of lm-eval's tasks can be scored here, and why others cannot.

A gate pairs items, so a task must give each item one greedy answer and one number. What runs is
the code that lm-eval was installed with, and no other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NoReturn

from lm_eval.api.metrics import mean
from lm_eval.api.registry import metric_registry

from quantkit.errors import UsageError
from quantkit.evals.metrics import BY_OUTPUT_TYPE, METRICS, Score

#: Settings of a task that no engine here answers: key → what it asks for.
MODALITIES = {"doc_to_image": "images", "doc_to_audio": "sound"}


def check_supported(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a task whose items cannot be scored one by one, greedily and without risk.

    Args:
        name: for messages.
        config: the YAML's keys, with functions or with the text that names them.

    Raises:
        UsageError: naming the reason.
    """
    kind = config.get("output_type") or "generate_until"
    if config.get("class"):
        _refuse(name, "is a Python class of its own, with requests of several kinds an item")
    if kind == "loglikelihood_rolling":
        _refuse(
            name,
            "asks for the likelihood of whole documents (loglikelihood_rolling)",
            "give such text by --text",
        )
    if config.get("unsafe_code"):
        _refuse(
            name,
            "runs the model's code (unsafe_code)",
            "write a suite scored by `code`, and give --allow-code",
        )
    for key, what in MODALITIES.items():
        if config.get(key):
            _refuse(name, f"shows {what} ({key}), and models here read text")
    if (config.get("repeats") or 1) != 1:
        _refuse(name, f"asks {config['repeats']} times an item (repeats); an item has one answer")
    generation = config.get("generation_kwargs") or {}
    if generation.get("do_sample") or float(generation.get("temperature") or 0) > 0:
        _refuse(name, "samples its answers (generation_kwargs); answers here are greedy")
    if config.get("process_results") is None:
        for entry in config.get("metric_list") or ():
            _check_metric(name, entry)


def _check_metric(name: str, entry: Mapping[str, Any]) -> None:
    metric = entry.get("metric")
    # A function, or the path of one that is not imported yet.
    if callable(metric) or (isinstance(metric, str) and os.sep in metric):
        return
    if entry.get("hf_evaluate") or metric not in metric_registry:
        _refuse(name, f"has the metric {metric!r}, which lm-eval would fetch as code from the hub")


def _refuse(name: str, reason: str, remedy: str | None = None) -> NoReturn:
    raise UsageError(f"lm-eval task {name}: {reason}", remedy=remedy)


def measure(task: Any, metric: str) -> tuple[str, Score] | None:
    """(what the results call a metric, one item's value → its score, larger when better).

    None when the metric has no value for one item: those that lm-eval computes over all items at
    once, such as F1.
    """
    known = BY_OUTPUT_TYPE.get(task.OUTPUT_TYPE, ())
    if not callable(task.config.process_results) and metric in known:
        return METRICS[metric]
    if task.aggregation().get(metric) is not mean:
        return None
    if task.higher_is_better().get(metric) is False:
        return f"minus_{metric}", lambda value: -float(value)
    return metric, float


def first_measure(task: Any) -> str:
    """The first of a task's metrics that has a value for one item.

    Raises:
        UsageError: there is none.
    """
    listed = list(task.aggregation())
    for metric in listed:
        if measure(task, metric) is not None:
            return str(metric)
    raise UsageError(
        f"lm-eval task {task.config.task}: none of its metrics ({', '.join(listed)}) is a mean "
        "over items, and a gate pairs items"
    )


def scored_filter(task: Any, wanted: str | None = None) -> str:
    """The pipeline of answers that is scored: the one that is named, else the task's first.

    Raises:
        UsageError: the task has no pipeline of that name.
    """
    names = [str(pipeline.name) for pipeline in task._filters]
    if wanted is None:
        return names[0]
    if wanted not in names:
        raise UsageError(
            f"lm-eval task {task.config.task}: has no filter {wanted!r}, which its group averages; "
            f"it has {', '.join(names)}",
            remedy="name the group's tasks",
        )
    return wanted
