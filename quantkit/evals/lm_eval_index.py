"""What lm-eval's own tasks, groups and tags are called, and which tasks each of them holds."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval.tasks import TaskManager

from quantkit.evals.quiet import quiet

#: lm-eval's kinds of entry → what a person calls them.
KINDS = {"TASK": "task", "PY_TASK": "task", "GROUP": "group", "TAG": "tag"}


@dataclass(frozen=True)
class Member:
    """A task that a name leads to.

    Attributes:
        name: its own.
        config: the YAML's keys, functions as the text that names them.
    """

    name: str
    config: Mapping[str, Any]


@functools.cache
def task_manager() -> TaskManager:
    """lm-eval's index of the tasks that come with it: some thousand files, read once."""
    with quiet():
        return TaskManager()


def kinds() -> dict[str, str]:
    """Every name lm-eval knows → whether it is a task, a group or a tag."""
    return {name: KINDS[entry.kind.name] for name, entry in task_manager().task_index.items()}


def members(name: str) -> Iterator[Member]:
    """The tasks that a name leads to, through groups and tags.

    Raises:
        KeyError: lm-eval has no such name.
    """
    entry = task_manager().task_index[name]
    config = entry.cfg or {}
    if entry.kind.name == "TAG":
        for task in sorted(entry.tags):
            yield from members(task)
    elif entry.kind.name == "GROUP":
        yield from _in_group(name, config)
    else:
        yield Member(name, config)


def _in_group(name: str, config: Mapping[str, Any]) -> Iterator[Member]:
    index = task_manager().task_index
    listed = config.get("task")
    for item in listed if isinstance(listed, list) else ():
        inside = item if isinstance(item, dict) else {"task": item}
        child = str(inside.get("group") or inside.get("task"))
        if child in index:
            yield from members(child)
        elif "group" in inside:
            yield from _in_group(f"{name}::{child}", inside)
        else:
            yield Member(f"{name}::{child}", inside)
