"""Every kernel test runs on each instruction set that this CPU offers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from quantkit import ops
from quantkit.ops.library import CPU


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        names = ops.available_isas() if CPU.handle is not None else ["not built"]
        metafunc.parametrize("isa", names, indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa("auto")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Two threads for the kernels, one for the oracle: its matrices are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    if CPU.handle is not None:
        ops.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    if CPU.handle is not None:
        ops.set_num_threads(0)
        ops.set_thread_pool("own")
