"""A suite as everything behind its reader sees it, whether a file or a task of lm-eval's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.evals.metrics import METRICS, Score
from quantkit.evals.scorers import Scoring


@dataclass(frozen=True)
class LmEvalTask:
    """What a suite that is lm-eval's own task has beside its rows.

    Attributes:
        task: lm-eval's object, its documents those of the suite.
        score_name: see `Suite.score_name`.
        score: one item's value of the metric → its score.
        filter: the pipeline of answers that is scored; others go into the items' details.
    """

    task: Any
    score_name: str
    score: Score
    filter: str


@dataclass(frozen=True)
class Suite:
    """A validated suite.

    Attributes:
        name: the YAML's ``task``, or the name of a group.
        path: the YAML file.
        config: the YAML as written; of a task of lm-eval's own, as that reads it.
        metric: the first of its metrics, the one that items are scored by.
        hash: sha256 over the YAML's and the data files' bytes, or a task's settings and documents.
        slice, cluster, must_not_flip: fields of the rows, or None.
        traffic: calibration data that looks like this suite, or None.
        splits: rows by split, as read.
        scoring: what scores an item in place of the metric, or None.
        origin: lm-eval's own task, or None for a file.
        parts: a group's tasks, whose items are this suite's in their order and whose names are its
            slices; empty for a single task.
        ids: names of the items; empty where the rows' ``id`` or their position says it.
        provenance: where a task of lm-eval's own came from, for the results.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    metric: str
    hash: str
    slice: str | None
    cluster: str | None
    must_not_flip: str | None
    traffic: Path | None
    splits: Mapping[str, tuple[Mapping[str, Any], ...]] = field(repr=False)
    scoring: Scoring | None = None
    origin: LmEvalTask | None = field(default=None, repr=False)
    parts: tuple[Suite, ...] = field(default=(), repr=False)
    ids: tuple[str, ...] = field(default=(), repr=False)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def score_name(self) -> str:
        """What the results call the score, and the gate's key holds after the dot."""
        if self.scoring is not None:
            return self.scoring.name
        if self.parts:
            return self.parts[0].score_name
        return METRICS[self.metric][0] if self.origin is None else self.origin.score_name

    @property
    def score(self) -> Score:
        """One item's value of the metric, as lm-eval logs it → its score."""
        return METRICS[self.metric][1] if self.origin is None else self.origin.score

    @property
    def rows(self) -> tuple[Mapping[str, Any], ...]:
        """The rows that are scored."""
        return self.splits[self.config["test_split"]]

    @property
    def n(self) -> int:
        """Number of items."""
        return len(self.rows)

    @property
    def output_type(self) -> str:
        return str(self.config["output_type"])

    def item_id(self, index: int) -> str:
        """Name of the item at a position."""
        return self.ids[index] if self.ids else str(self.rows[index].get("id", index))
