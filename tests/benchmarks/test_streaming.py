"""What the benchmark of large models writes, and how it watches memory."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from benchmark_scripts import load_script

from quantkit import model as models

streaming = load_script("streaming")

SMALL = streaming.Shape(hidden=64, intermediate=128, layers=3, heads=4, kv_heads=2, vocabulary=272)


def test_the_default_is_llama_3_8b() -> None:
    weights = sum(math.prod(dims) for file in streaming.Shape().files() for dims in file.values())
    assert weights == 8_030_261_248


def test_a_model_is_written_file_by_file_and_loads(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    size = streaming.write_model(folder, SMALL, tiny)
    assert len(list(folder.glob("*.safetensors"))) == SMALL.layers + 2
    loaded = models.load_source(str(folder))
    assert sum(p.numel() * 2 for p in loaded.model.parameters()) == size
    blocks = loaded.model.model.layers
    assert not blocks[0].mlp.up_proj.weight.equal(blocks[1].mlp.up_proj.weight)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size


def hog(megabytes: int) -> list[str]:
    code = f"import time; x = bytearray({megabytes} << 20); time.sleep(0.5)"
    return [sys.executable, "-c", code]


def test_memory_is_seen_and_a_limit_ends_the_run(tmp_path: Path) -> None:
    found = streaming.watch(hog(200), tmp_path / "log", None)
    assert found.returncode == 0
    assert not found.over
    assert 200 << 20 < found.anonymous < 300 << 20
    assert found.resident >= found.anonymous
    ended = streaming.watch(hog(200), tmp_path / "log", 100 << 20)
    assert ended.over
    assert ended.returncode != 0


@pytest.mark.slow
def test_the_whole_benchmark_on_a_small_model(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "streaming.py", "--tokenizer", str(tiny), "--scratch", str(tmp_path), "--recipe", "rtn",
        "--recipe", "static", "--hidden", "512", "--intermediate", "1024", "--layers", "3",
        "--heads", "8", "--kv-heads", "2", "--vocabulary", "272", "--seq-len", "32",
        "-o", str(tmp_path / "out.json"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    assert streaming.main() == 0, capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["recipe"] for row in rows] == ["rtn", "static"]
    assert all(row["verified"] for row in rows)
    assert not (tmp_path / "model").exists()
