"""The number of threads that a run has."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from quantkit.cli.main import run
from quantkit.ops import get_isa


def test_threads_are_as_many_as_were_asked_for(tiny: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("scheme: w8a16\nkeep: [lm_head]\n")  # no data: one forward pass in all
    argv = ["calibrate", str(tiny), "-r", str(recipe), "--no-gate", "-o", str(tmp_path / "out")]
    before = torch.get_num_threads()
    try:
        assert run([*argv, "--threads", str(before + 1)]) == 0
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
