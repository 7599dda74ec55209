"""Safetensors files of bounded size: tensors come one at a time, and memory holds one file's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from quantkit import memory
from quantkit.checkpoint.read import INDEX

#: Largest safetensors file, bytes, before another is begun: what an export holds in memory.
SHARD_BYTES = 1000**3


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Write tensors by name, and an index where the files are several.

    Pages of tensors that are mapped from files leave memory once they are written.

    Args:
        folder: theirs.
        tensors: dense and contiguous; each is kept until its file is full.

    Returns:
        their bytes in all.
    """
    written: list[tuple[Path, list[str]]] = []
    shard: dict[str, Tensor] = {}
    total = held = 0

    def write() -> None:
        nonlocal held
        # How many files there will be, which is in their names, is known at the end.
        path = folder / f"model-{len(written) + 1:05d}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        written.append((path, list(shard)))
        for tensor in shard.values():
            memory.forget_pages(tensor)
        shard.clear()
        held = 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > SHARD_BYTES:
            write()
        shard[name] = tensor
        held += size
        total += size
    write()
    _name(folder, written, total)
    return total


def _name(folder: Path, written: list[tuple[Path, list[str]]], total: int) -> None:
    if len(written) == 1:
        os.replace(written[0][0], folder / "model.safetensors")
        return
    listing: dict[str, str] = {}
    for i, (path, names) in enumerate(written):
        file = f"model-{i + 1:05d}-of-{len(written):05d}.safetensors"
        os.replace(path, folder / file)
        listing |= dict.fromkeys(names, file)
    document = {"metadata": {"total_size": total}, "weight_map": listing}
    text = json.dumps(document, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text)
