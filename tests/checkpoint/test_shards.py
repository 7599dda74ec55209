"""Files of bounded size, from tensors that come one at a time."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantkit.checkpoint import shards

TENSORS = {f"t{i}": torch.full((100,), float(i)) for i in range(7)}  # 400 bytes each


def test_files_are_filled_in_order_and_indexed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)
    assert shards.write_tensors(tmp_path, TENSORS.items()) == 2800
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert [sorted(load_file(f)) for f in files] == [
        ["t0", "t1"],
        ["t2", "t3"],
        ["t4", "t5"],
        ["t6"],
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2800
    for name, tensor in TENSORS.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


def test_one_file_has_no_index(tmp_path: Path) -> None:
    shards.write_tensors(tmp_path, TENSORS.items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_no_more_than_a_file_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)
    made: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for i in range(20):
            tensor = torch.full((100,), float(i))
            made.append(weakref.ref(tensor))
            yield f"t{i}", tensor
            del tensor
            most = max(most, sum(ref() is not None for ref in made))

    shards.write_tensors(tmp_path, tensors())
    assert most <= 3


def test_a_tensor_larger_than_a_file_has_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    shards.write_tensors(tmp_path, list(TENSORS.items())[:2])
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
