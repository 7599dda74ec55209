"""A task as lm-eval reads one, a hub without a network, and what lm-eval itself says."""

from __future__ import annotations

from typing import Any

import datasets
import lm_eval
import pytest

from quantkit.evals import lm_eval_index
from quantkit.evals.language_model import QuantkitLM
from quantkit.models.runtime import Runtime

#: What the rows of made-up tasks are about.
WORDS = ("refund", "order", "late", "rome", "paris", "invoice", "the order", "nothing")

#: A task of two choices, as a hub's data set would be read by lm-eval.
TASK = {
    "task": "tiny",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": ["no", "yes"],
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 3.0},
}


def hub(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    """A hub that has these rows for every split of every data set; returns what is asked of it."""
    asked: list[tuple[Any, Any]] = []

    def load(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
        asked.append((path, name))
        split = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "dev", "test"), split))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def said_by_lm_eval(runtime: Runtime, name: str) -> dict[str, Any]:
    """What lm-eval's own entry point makes of a task, of the same answers."""
    answer: dict[str, Any] = lm_eval.simple_evaluate(
        model=QuantkitLM(runtime),
        tasks=[name],
        task_manager=lm_eval_index.task_manager(),
        bootstrap_iters=0,
        log_samples=True,
    )
    return answer
