"""A disk that fills up while a run writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError

from quantkit.cli.main import run
from tests.run_helpers import arguments, leftovers


@pytest.mark.parametrize(
    ("writer", "error", "message"),
    [
        # safetensors raises errors of its own, and no OSError.
        (
            "quantkit.checkpoint.shards.save_file",
            SafetensorError(
                "Error while serializing: I/O error: Disk quota exceeded (os error 122)"
            ),
            "out.staging: the disk is full",
        ),
        (
            "quantkit.checkpoint.shards.save_file",
            SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
            "out.staging: cannot be written (Error while serializing: I/O error: File too large",
        ),
        (
            "quantkit.work.save_file",
            SafetensorError("Error while serializing: I/O error: No space left on device"),
            "0000.safetensors: cannot be written (Error while serializing",
        ),
    ],
    ids=["the export", "too large an export", "a finished block"],
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
