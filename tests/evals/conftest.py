"""Fixtures: tiny random models and suites in a temporary folder."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from eval_builders import tiny_runtime, write_suite

from quantkit.models.runtime import Runtime


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices of 64 columns only get slower with more
    yield
    torch.set_num_threads(before)  # the bytes of a calibration depend on it


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    return tiny_runtime()


@pytest.fixture(scope="session")
def other() -> Runtime:
    """The same architecture and tokenizer with other weights."""
    return tiny_runtime(1)


@pytest.fixture
def suite_path(tmp_path: Path) -> Callable[..., Path]:
    """``suite_path(config, rows, **changes)`` → the YAML of a suite in a fresh folder."""
    count = iter(range(1000))

    def write(config: dict[str, Any], rows: list[dict[str, Any]], **changes: Any) -> Path:
        return write_suite(tmp_path / str(next(count)), config, rows, **changes)

    return write


@pytest.fixture
def know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``know(folder)``: lm-eval finds its tasks there and nowhere else."""
    import datasets
    from lm_eval.tasks import TaskManager

    from quantkit.evals import lm_eval_index

    def look(folder: Path) -> None:
        manager = functools.partial(TaskManager, include_path=str(folder), include_defaults=False)
        monkeypatch.setattr(lm_eval_index, "TaskManager", manager)
        lm_eval_index.task_manager.cache_clear()

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield look
    lm_eval_index.task_manager.cache_clear()


@pytest.fixture
def library(know: Callable[..., None], tmp_path: Path) -> Callable[..., Path]:
    """``library(changes, …)`` writes a task for each dict of changes, all on the same rows."""
    from lm_eval_tasks import TASK, WORDS

    def write(*tasks: dict[str, Any], **files: str) -> Path:
        folder = tmp_path / "library"
        folder.mkdir(exist_ok=True)
        rows = [{"question": f"is it {w}?", "label": i % 2} for i, w in enumerate(WORDS)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        data = {"data_files": {"test": str(folder / "rows.jsonl")}}
        for number, changes in enumerate(tasks):
            if "group" in changes:
                config = changes
            else:
                config = {**TASK, "dataset_kwargs": data, **changes}
                config = {k: v for k, v in config.items() if v is not None}
            (folder / f"{number}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        for name, text in files.items():
            (folder / f"{name}.yaml").write_text(text.replace("ROWS", str(folder / "rows.jsonl")))
        know(folder)
        return folder

    return write
