"""What changed between two baselines: the experiment, the system, the scores.

A change *breaks* the comparison when results from before it cannot be held against results
from after it: another tokenizer, template, harness, task file, item set or text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.gate.compare import paired_rows
from quantkit.results import COMPARABLE_KEYS, Results, TaskResult

#: (value, whether another value breaks the comparison)
Fact = tuple[Any, bool]


@dataclass(frozen=True)
class Change:
    """One value that differs; None where a side has none. ``breaks``: see the module."""

    key: str
    before: Any
    after: Any
    breaks: bool


@dataclass(frozen=True)
class BaselineDiff:
    """All changes, breaking ones first, and (gains, losses) of tasks that can be paired."""

    changes: tuple[Change, ...]
    flips: Mapping[str, tuple[int, int]]

    @property
    def breaking(self) -> tuple[Change, ...]:
        return tuple(c for c in self.changes if c.breaks)

    def to_json(self) -> dict[str, Any]:
        return {
            "comparable": not self.breaking,
            "changes": [asdict(c) for c in self.changes],
            "flips": {task: {"gains": g, "losses": lo} for task, (g, lo) in self.flips.items()},
        }


def diff(before: Results, after: Results) -> BaselineDiff:
    """Compare two baselines key by key.

    Raises:
        UsageError: a score outside 0..1.
    """
    one, two = _facts(before), _facts(after)
    changes = [
        _change(key, one.get(key), two.get(key))
        for key in sorted(one | two)
        if one.get(key) != two.get(key)
    ]
    changes.sort(key=lambda c: not c.breaks)
    flips = {}
    for name in sorted(before.tasks.keys() & after.tasks.keys()):
        if any(c.breaks and c.key.startswith(f"tasks.{name}.") for c in changes):
            continue
        pairs = paired_rows(name, after.tasks[name], before.tasks[name])
        flips[name] = (sum(p.gain for p in pairs), sum(p.loss for p in pairs))
    return BaselineDiff(tuple(changes), flips)


def _change(key: str, before: Fact | None, after: Fact | None) -> Change:
    """A task or a text that only one side has leaves what both have comparable."""
    breaks = (before or after or (None, False))[1]
    if before is None or after is None:
        breaks = breaks and key.startswith("fingerprint.")
    return Change(key, before and before[0], after and after[0], breaks)


def _facts(results: Results) -> dict[str, Fact]:
    """Dotted key → (value, whether another value breaks the comparison)."""
    facts: dict[str, Fact] = {}
    for key, value in results.fingerprint.items():
        if isinstance(value, Mapping):
            facts |= {f"fingerprint.{key}.{k}": (v, False) for k, v in value.items()}
        else:
            facts[f"fingerprint.{key}"] = (value, key in (*COMPARABLE_KEYS, "judge"))
    for name, task in results.tasks.items():
        facts |= {f"tasks.{name}.{k}": v for k, v in _task_facts(task).items()}
    if results.text is not None:
        facts["text.hash"] = (results.text.hash, True)
        facts["text.seq_len"] = (results.text.seq_len, True)
        facts["text.windows"] = (len(results.text.windows), True)
        facts["text.mean_nll"] = (results.text.mean_nll, False)
    facts |= {f"cost.{k}": (v, False) for k, v in results.cost.items()}
    return facts


def _task_facts(task: TaskResult) -> dict[str, Fact]:
    items = sorted((row.id, row.hash, row.cluster or "") for row in task.rows)
    return {
        "hash": (task.hash, True),
        "metric": (task.metric, True),
        "n": (task.n, True),
        "items": (_digest(items), True),
        "early": (task.early, True),
        "value": (task.value, False),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
