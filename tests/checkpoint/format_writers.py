"""Checkpoints in other programs' formats, packed slowly and literally from their definitions.

Nothing here calls quantkit's readers or packers: numbers go one by one into Python integers, and
those into words.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """A quantized layer: unsigned codes ``[N, K]``, zero points and fp16 scales ``[N, G]``, and the
    group of each column ``[K]``."""

    codes: Tensor
    zero: Tensor
    scale: Tensor
    group: Tensor
    bits: int

    def weight(self) -> Tensor:
        """What the layer stands for, in the scales' dtype."""
        steps = self.codes - self.zero[:, self.group]
        return steps.to(self.scale.dtype) * self.scale[:, self.group]


def quantize(
    weight: Tensor, bits: int, group_size: int, *, symmetric: bool, scattered: bool = False
) -> Codes:
    """Round to nearest; ``scattered`` gives groups columns from anywhere, as activation order
    does. Zero points are at least 1, which version 1 of GPTQ's format can hold."""
    n, k = weight.shape
    size = k if group_size < 0 else group_size
    group = torch.arange(k) // size
    if scattered:
        group = group[torch.randperm(k, generator=torch.Generator().manual_seed(3))]
    top = 2**bits - 1
    scale, zero = torch.empty(n, k // size), torch.empty(n, k // size, dtype=torch.int64)
    for g in range(k // size):
        part = weight[:, group == g].float()
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            scale[:, g] = torch.maximum(-low, high) * 2 / top
            zero[:, g] = 2 ** (bits - 1)
        else:
            scale[:, g] = (high - low) / top
            zero[:, g] = (-low / scale[:, g]).round().clamp(1, top)
    scale = scale.half()
    codes = (weight.float() / scale.float()[:, group]).round() + zero[:, group]
    return Codes(codes.clamp(0, top).long(), zero, scale, group, bits)


def words(stream: list[int], bits: int) -> list[int]:
    """A dense stream of codes, first in the lowest bits, as signed 32-bit words."""
    number = 0
    for i, code in enumerate(stream):
        number |= code << (i * bits)
    out = []
    for i in range(len(stream) * bits // 32):
        word = (number >> (32 * i)) & 0xFFFFFFFF
        out.append(word - 2**32 if word >= 2**31 else word)
    return out


def gptq(layer: Codes, *, version: int = 1, with_groups: bool = True) -> dict[str, Tensor]:
    """GPTQ's tensors: codes down each column of ``[K, N]``, zero points along each group."""
    offset = 2 - version
    columns = [words(row, layer.bits) for row in layer.codes.tolist()]
    zeros = [words([z - offset for z in row], layer.bits) for row in layer.zero.t().tolist()]
    tensors = {
        "qweight": torch.tensor(columns, dtype=torch.int32).t().contiguous(),
        "qzeros": torch.tensor(zeros, dtype=torch.int32),
        "scales": layer.scale.t().contiguous(),
    }
    return tensors | ({"g_idx": layer.group.to(torch.int32)} if with_groups else {})


def awq(layer: Codes) -> dict[str, Tensor]:
    """AWQ's GEMM tensors: eight outputs a word, nibble i holding the output ``order[i]``."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def row(values: list[int]) -> list[int]:
        out: list[int] = []
        for start in range(0, len(values), 8):
            out += words([values[start + output] for output in order], 4)
        return out

    return {
        "qweight": torch.tensor([row(r) for r in layer.codes.t().tolist()], dtype=torch.int32),
        "qzeros": torch.tensor([row(r) for r in layer.zero.t().tolist()], dtype=torch.int32),
        "scales": layer.scale.t().contiguous(),
    }


def write(
    source: Path,
    folder: Path,
    config: dict[str, Any],
    pack: Callable[[Codes], dict[str, Tensor]],
    quantized: Callable[[str, Tensor], Codes],
) -> Path:
    """A quantized copy of a model folder, and beside it ``<folder>-plain``, the same dequantized.

    Args:
        source: a model folder in 16 bits.
        folder: to be made.
        config: the ``quantization_config``.
        pack: a layer's tensors.
        quantized: a layer's name and weight → its codes. Every linear layer of a block is asked.

    Returns:
        the folder of the dequantized model.
    """
    plain = folder.with_name(f"{folder.name}-plain")
    for copy in (folder, plain):
        shutil.copytree(source, copy)
    packed, dense = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            packed[name] = dense[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        codes = quantized(layer, tensor)
        packed |= {f"{layer}.{key}": value for key, value in pack(codes).items()}
        dense[name] = codes.weight()
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(dense, plain / "model.safetensors", metadata={"format": "pt"})
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(document))
    return plain
