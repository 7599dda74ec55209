"""A checkpoint in another program's format, written beside its final name and renamed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from quantkit.checkpoint.export_gguf import write_gguf
from quantkit.checkpoint.export_gptq import write_gptq
from quantkit.checkpoint.half import Rounding
from quantkit.checkpoint.opened import OpenCheckpoint, open_checkpoint
from quantkit.checkpoint.write import guarded_disk
from quantkit.errors import UsageError


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file or folder.
        size_bytes: of it all.
        tensors: how many of each storage type.
        rounding: of scales and offsets, to fp16.
        notes: what the format does not hold and its programs do in their own way.
    """

    path: Path
    size_bytes: int
    tensors: dict[str, int]
    rounding: Rounding
    notes: list[str] = field(default_factory=list)


#: What `quantkit export --format` takes → what writes a path that does not exist yet, and returns
#: the number of tensors of each type, the rounding of scales and notes. To add one, add a row.
EXPORTERS: dict[
    str, Callable[[OpenCheckpoint, Path], tuple[dict[str, int], Rounding, list[str]]]
] = {
    "gguf": write_gguf,
    "gptq": write_gptq,
}


def export(folder: Path, fmt: str, out: Path) -> Exported:
    """Write a quantized checkpoint in another format. Codes are copied, never quantized again.

    Args:
        folder: of a checkpoint in any format that quantkit reads.
        fmt: a key of `EXPORTERS`.
        out: a file (gguf) or folder (gptq) that does not exist yet.

    Raises:
        UsageError: OUT exists or cannot be written, or the format cannot hold the model.
        QuantkitError: a damaged checkpoint, or a full disk.
    """
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out}: exists", remedy="choose another -o, or remove it")
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder", remedy="make it, or choose another -o")
    staging = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with open_checkpoint(folder) as source, guarded_disk(staging):
            if source.reader.cache_spec() is not None:
                raise UsageError(
                    f"{folder}: has calibrated scales of keys and values, which {fmt} cannot hold",
                    remedy="calibrate without kv_cache, and give the server a cache type",
                )
            if source.reader.hadamards():
                name, order = next(iter(source.reader.hadamards().items()))
                raise UsageError(
                    f"{folder}: the input of {name} is multiplied by a Hadamard matrix of order "
                    f"{order} at inference, which no program that reads {fmt} does",
                    remedy="calibrate with rotate's `mlp: false`",
                )
            tensors, rounding, notes = EXPORTERS[fmt](source, staging)
            os.replace(staging, out)
    finally:
        if staging.is_file():
            staging.unlink()
    files = [out] if out.is_file() else list(out.iterdir())
    size = sum(path.stat().st_size for path in files)
    return Exported(out, size, tensors, rounding, notes)
