"""The walk-through of every verdict, as `make walkthrough` runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.timeout(3600)
def test_every_step_ends_with_its_exit_code(smollm2: str, tmp_path: Path) -> None:
    command = [sys.executable, "examples/walkthrough.py", "-o", str(tmp_path / "walk")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for code in (0, 1, 2, 3, 4, 5):
        assert f"--- exit {code}" in done.stdout
    assert "items are needed, 60 were scored" in done.stdout
    assert "every step ended as it should" in done.stdout
