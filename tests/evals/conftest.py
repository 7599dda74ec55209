"""Fixtures: tiny random models and suites in a temporary folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
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
