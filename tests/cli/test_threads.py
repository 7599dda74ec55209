"""The number of threads that a run has."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from quantkit.cli.main import run
from quantkit.ops import get_isa
from tests.run_helpers import arguments


def test_threads_are_as_many_as_were_asked_for(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    try:
        argv = arguments(tiny, recipe, traffic, tmp_path / "out", "--threads", str(before + 1))
        assert run(argv) == 0
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    document = json.loads((tmp_path / "out.run" / "run.json").read_text())
    machine = document["machine"]
    assert machine["threads"] == before + 1
    # The other facts that a checkpoint's bytes depend on.
    assert machine["kernels' instruction set"] == get_isa()
    assert machine["torch's instruction set"] == torch.backends.cpu.get_cpu_capability()
    recorded = json.loads((tmp_path / "out" / "quantkit.json").read_text())["machine"]
    assert recorded["threads"] == before + 1
    assert recorded["isa"] == get_isa()
