"""A disk that fills up while a run writes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from quantkit.cli.main import run
from tests.run_helpers import arguments, leftovers


@pytest.mark.parametrize(
    ("writer", "error", "message"),
    [
        (
            "quantkit.checkpoint.shards.save_file",
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            "the disk is full",
        ),
        # safetensors raises an error of its own, and no OSError.
        (
            "quantkit.work.save_file",
            SafetensorError("Error while serializing: I/O error: No space left on device"),
            "0000.safetensors: cannot be written (Error while serializing",
        ),
    ],
    ids=["the export", "a finished block"],
)
def test_full_disk(
    writer: str,
    error: Exception,
    message: str,
    tiny: Path,
    traffic: Path,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def full(tensors: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(writer, full)
    out = tmp_path / "out"
    assert run(arguments(tiny, recipe, traffic, out)) == 4
    err = capfd.readouterr().err
    assert message in err
    assert "free some space" in err
    assert leftovers(out) == []
    assert not [*(tmp_path / "out.partial").rglob("*.tmp")]
    monkeypatch.undo()
    assert run(arguments(tiny, recipe, traffic, out, "--resume")) == 0
