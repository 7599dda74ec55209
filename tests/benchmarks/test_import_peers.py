"""What the benchmark of other programs' checkpoints computes. No peer needed."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from benchmark_scripts import load_script

from quantkit.models.load import load_runtime

peers = load_script("import_peers")

IDS = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(0))


def test_the_error_is_that_of_the_logits(tiny: Path) -> None:
    theirs = load_runtime(tiny, kernels="reference", dtype=torch.float32).logits(IDS[0].tolist())
    ours = peers.logits(tiny, "reference", IDS)
    assert peers.error(ours, theirs) == 0
    assert abs(peers.error(ours * 1.1, theirs) - 0.1) < 1e-6


def test_a_script_that_fails_gives_its_last_line(tmp_path: Path) -> None:
    assert peers.ask(sys.executable, "import sys; print(sys.argv[1])", tmp_path) == ""
    assert peers.ask(sys.executable, "raise SystemExit('no such format')") == "no such format"


def test_scripts_are_python_and_a_folder_below_is_found(tmp_path: Path) -> None:
    for name, case in peers.CASES.items():
        compile(case.script, name, "exec")
    below = tmp_path / "model-w4g64"
    below.mkdir()
    (below / "config.json").write_text("{}")
    assert peers.written(tmp_path) == below
    (tmp_path / "config.json").write_text("{}")
    assert peers.written(tmp_path) == tmp_path


def test_what_is_not_made_is_a_failure(tmp_path: Path) -> None:
    row = peers.measure(peers.Case("raise SystemExit('boom')"), tmp_path, sys.executable, IDS)
    assert not row.ok
    assert row.said == "not made: boom"
    assert peers.line("x", row).startswith("FAIL x")
