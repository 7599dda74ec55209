"""Tasks of the installed lm-eval as suites, by their own names: ``arc_easy``, ``mmlu``.

lm-eval reads the YAML, fetches the dataset through `datasets`, whose cache and offline settings
hold, and builds prompts, filters and metrics; what is scored is one row an item, as for a suite in
a file. A group that averages over items is one suite, its tasks the slices. One that averages over
tasks is as many suites, and the results carry its average; a tag is only its tasks.

Documents are read once, before any model, and held in memory: both models of a gate see the same
ones, and their hash says so.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

from quantkit.errors import QuantkitError, UsageError
from quantkit.evals.documents import Documents
from quantkit.evals.lm_eval_index import kinds, members, task_manager
from quantkit.evals.lm_eval_support import (
    check_supported,
    first_measure,
    measure,
    scored_filter,
)
from quantkit.evals.quiet import quiet
from quantkit.evals.suite import LmEvalTask, Suite
from quantkit.evals.suites import installed_suites, unknown_suite


def load_tasks(name: str) -> list[Suite]:
    """The suites that a name of lm-eval's stands for, their documents read.

    Raises:
        UsageError: there is no such name, or a task that cannot be scored; see
            `quantkit.evals.lm_eval_support`.
        QuantkitError: a dataset cannot be had, or lm-eval cannot build the task.
    """
    known = kinds()
    if name not in known:
        raise unknown_suite(
            name, "suite, file, folder or task of lm-eval", [*installed_suites(), *known]
        )
    for member in members(name):
        check_supported(member.name, member.config)
    with quiet(), _lm_eval_seeds(), _named_datasets():
        try:
            return _build(name)
        except QuantkitError:
            raise
        except Exception as e:
            raise QuantkitError(
                f"lm-eval task {name}: lm-eval {_version()} cannot build it "
                f"({type(e).__name__}: {_first_line(e)})",
                remedy="install what it names, or choose another suite",
            ) from e


def _build(name: str) -> list[Suite]:
    loaded = task_manager().load([name])
    for task in loaded["tasks"].values():
        check_supported(task.config.task, vars(task.config))  # with what a group overrides
    group = loaded.get("groups", {}).get(name)
    if group is not None:
        return _group_suites(group)
    return [_suite(task, first_measure(task)) for task in loaded["tasks"].values()]


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0]


@contextmanager
def _lm_eval_seeds() -> Iterator[None]:
    """The seeds that `lm_eval` sets before tasks load: some shuffle choices as they read them."""
    state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


@contextmanager
def _named_datasets() -> Iterator[None]:
    """Say of a dataset that cannot be had which one it is and what to do."""
    load = ConfigurableTask.download

    def download(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            load(self, *args, **kwargs)
        except Exception as e:
            raise QuantkitError(
                f"lm-eval task {self.config.task}: its dataset {_dataset(self)} cannot be loaded "
                f"({type(e).__name__}: {_first_line(e)})",
                remedy="run it once where the hub can be reached, and keep the cache of `datasets`",
            ) from e

    with mock.patch.object(ConfigurableTask, "download", download):
        yield


def _dataset(task: Any) -> str:
    name = task.config.dataset_name
    return f"{task.config.dataset_path}{f' ({name})' if name else ''}"


# --- one task --------------------------------------------------------------------------------


def _suite(task: Any, metric: str, wanted: str | None = None) -> Suite:
    """A loaded task as a suite; from here on its documents stand still.

    Args:
        task: lm-eval's.
        metric: see `quantkit.evals.lm_eval_support.measure`.
        wanted: the pipeline of answers that is scored; the task's first when None.
    """
    name = task.config.task
    scored = measure(task, metric)
    if scored is None:
        raise UsageError(f"lm-eval task {name}: its metric {metric!r} is no mean over items")
    split = task.config.test_split or task.config.validation_split
    shots = task.config.num_fewshot or 0
    pipeline = scored_filter(task, wanted)
    settings = _settings(task)
    rows = [dict(row) for row in task.eval_docs]
    if not rows:
        raise QuantkitError(f"lm-eval task {name}: split {split!r} of {_dataset(task)} is empty")
    # Read once: some tasks shuffle as they read, and each look would read again.
    task.dataset = {split: Documents(rows, task.features)}
    task.config.process_docs = None
    task.task_docs = task.dataset[split]
    config = {"task": name, "output_type": task.OUTPUT_TYPE, "test_split": split}
    return Suite(
        name=name,
        path=_path(task),
        config=config,
        metric=metric,
        hash=_hash({"settings": settings, "metric": metric, "filter": pipeline, "rows": rows}),
        slice=None,
        cluster=None,
        must_not_flip=None,
        traffic=None,
        splits={split: tuple(rows)},
        origin=LmEvalTask(task, scored[0], scored[1], pipeline),
        ids=_ids(rows),
        provenance={
            "harness": "lm-eval",
            "task": name,
            "version": str(task.VERSION),
            "config": _hash(settings),
            "dataset": task.config.dataset_path,
            "dataset_name": task.config.dataset_name,
            "split": split,
            "num_fewshot": shots,
            "filter": pipeline,
        },
    )


def _path(task: Any) -> Path:
    """The YAML of a task; ``inline`` for one that stands inside a group's."""
    return Path((task.config.metadata or {}).get("config_source", "inline"))


def _ids(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The documents' own ids where they name each of them, else positions."""
    own = [row.get("id") for row in rows]
    names = tuple(str(name) for name in own)
    if any(name is None for name in own) or len(set(names)) < len(names):
        return tuple(str(i) for i in range(len(rows)))
    return names


def _settings(task: Any) -> dict[str, Any]:
    """A task's settings without where its file lies on this machine."""
    settings = dict(task.config.to_dict(keep_callable=True))
    metadata = dict(settings.get("metadata") or {})
    metadata.pop("config_source", None)
    return {**settings, "metadata": metadata}


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _plain(value: Any) -> Any:
    """A function by its source, whatever its address is today; anything else as text."""
    if isinstance(value, functools.partial):
        return [_plain(value.func), list(value.args), value.keywords]
    if callable(value):
        try:
            return inspect.getsource(value)
        except (TypeError, OSError):
            return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
    return str(value)


# --- groups ----------------------------------------------------------------------------------


def _group_suites(group: Group) -> list[Suite]:
    """A group's suites: one where it averages over items, else one for each task.

    Raises:
        UsageError: it averages a metric that its tasks have no value of for one item.
    """
    aggregate = group.aggregate_metric_list
    if not aggregate:
        return [
            suite
            for child in group
            for suite in (
                _group_suites(child)
                if isinstance(child, Group)
                else [_suite(child, first_measure(child))]
            )
        ]
    tasks = list({task.task_name: task for task in group.get_all_tasks()}.values())
    usable = [a for a in aggregate if _same_measure(tasks, a.metric)]
    if not usable:
        metrics = ", ".join(a.metric for a in aggregate)
        raise UsageError(
            f"lm-eval group {group.name}: its tasks do not all have {metrics} for one item",
            remedy="name its tasks",
        )
    first = usable[0]
    wanted = first.filter_list[0] if first.filter_list else None
    parts = tuple(_suite(task, first.metric, wanted) for task in tasks)
    if first.weight_by_size:
        return [_joined(group, parts)]
    return [replace(part, provenance={**part.provenance, "groups": [group.name]}) for part in parts]


def _same_measure(tasks: Sequence[Any], metric: str) -> bool:
    """True when every task scores one item by a metric, and all in one way."""
    found = [measure(task, metric) for task in tasks]
    return len({None if m is None else m[0] for m in found} - {None}) == 1 and None not in found


def _joined(group: Group, parts: tuple[Suite, ...]) -> Suite:
    """A group's items as one suite: their mean is the tasks' mean, weighed by size."""
    rows = tuple(row for part in parts for row in part.rows)
    kinds_of = sorted({part.output_type for part in parts})
    entry = task_manager().task_index.get(group.name)  # none where it stands inside another's
    return Suite(
        name=group.name,
        path=(entry.yaml_path if entry is not None else None) or parts[0].path,
        config={"task": group.name, "output_type": ", ".join(kinds_of), "test_split": "test"},
        metric=parts[0].metric,
        hash=_hash([[part.name, part.hash] for part in parts]),
        slice=None,
        cluster=None,
        must_not_flip=None,
        traffic=None,
        splits={"test": rows},
        parts=parts,
        ids=tuple(f"{part.name}/{name}" for part in parts for name in part.ids),
        provenance={
            "harness": "lm-eval",
            "group": group.name,
            "version": group.version,
            "tasks": {part.name: dict(part.provenance) for part in parts},
        },
    )
