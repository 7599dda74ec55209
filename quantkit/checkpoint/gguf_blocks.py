"""Codes and scales ↔ GGUF's blocks of 32 weights, without quantizing again.

======  ==========================  =====================================================
type    a block of 32 columns       holds
======  ==========================  =====================================================
Q8_0    fp16 d, 32 int8             symmetric integers of 5 to 8 bits: d = scale
Q4_0    fp16 d, 16 bytes            symmetric integers of 2 to 4 bits: d · (nibble − 8)
Q4_1    fp16 d, fp16 m, 16 bytes    asymmetric ones of 2 to 4 bits: d · nibble + m, where m is
                                    −d · zero, rounded to fp16
MXFP4   uint8 E8M0, 16 bytes        mxfp4a16, as it is
======  ==========================  =====================================================

The low nibbles of the 16 bytes are columns 0 to 15 of the block, the high ones 16 to 31. A group of
several blocks repeats its scale. Source: ggml, ``ggml-common.h`` (block_q4_0 and the others) and
``ggml-quants.c``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantkit import numerics
from quantkit.checkpoint.half import Rounding, to_half
from quantkit.errors import UsageError
from quantkit.numerics import QTensor
from quantkit.schemes import DType, Granularity, QuantSpec, ScaleFormat

#: Columns of a block.
BLOCK = 32


def block_type(spec: QuantSpec, shape: tuple[int, int], name: str) -> str:
    """The GGUF type that holds a weight of this spec.

    Args:
        spec: of the weight.
        shape: ``(N, K)``.
        name: of the layer, for messages.

    Raises:
        UsageError: no type holds it.
    """
    if shape[1] % BLOCK:
        raise UsageError(
            f"{name}: in_features {shape[1]} is not divisible by {BLOCK}, GGUF's block",
            remedy="keep the layer in 16 bits (keep: in the recipe)",
        )
    if spec.granularity is Granularity.BLOCK or (spec.group_size or BLOCK) % BLOCK:
        where = f"block {spec.block}" if spec.block else f"groups of {spec.group_size}"
        raise UsageError(
            f"{name}: {where}, and a GGUF block has one scale for {BLOCK} columns",
            remedy="calibrate with groups that 32 divides, such as w4a16-g32",
        )
    if spec.scale is ScaleFormat.E8M0:
        return "MXFP4"
    if spec.dtype is DType.INT and spec.bits <= 4:
        return "Q4_0" if spec.symmetric else "Q4_1"
    if spec.dtype is DType.INT and spec.symmetric:
        return "Q8_0"
    raise UsageError(
        f"{name}: no GGUF type holds {spec.label()}",
        remedy="calibrate with symmetric integers, such as w8a16-g32, or with w4a16-asym-g32",
    )


def to_blocks(q: QTensor, name: str) -> tuple[np.ndarray, Rounding]:
    """A weight as the bytes of its GGUF type, and what scales and offsets lost in fp16.

    Args:
        q: of a spec that `block_type` gives a type for.
        name: of the layer, for messages.

    Returns:
        uint8 ``[N, K/32 · bytes of a block]``.

    Raises:
        UsageError: a scale above fp16's range.
    """
    n, k = q.shape
    kind = block_type(q.spec, q.shape, name)
    if kind == "MXFP4":
        exponents = q.scale.reshape(n, k // BLOCK, 1)
        return _join([exponents, _nibbles(q.codes)]), Rounding()
    scale, rounding = to_half(_per_block(numerics.float_scale(q), n, k), name)
    if kind == "Q8_0":
        return _join([_bytes(scale), q.codes.reshape(n, -1, BLOCK).view(torch.uint8)]), rounding
    if kind == "Q4_0":
        codes = (q.codes + 8).to(torch.uint8)
        return _join([_bytes(scale), _nibbles(codes)]), rounding
    assert q.zero is not None
    middle = 2 ** (q.spec.bits - 1)
    zero = _per_block(q.zero.float() + middle, n, k)
    offset, lost = to_half(-scale.float() * zero, name)
    codes = (q.codes + middle).to(torch.uint8)
    return _join([_bytes(scale), _bytes(offset), _nibbles(codes)]), rounding + lost


def _per_block(x: Tensor, n: int, k: int) -> Tensor:
    """Scales of a tensor, channels or groups as fp32 ``[N, K/32]``."""
    rows = x.float().reshape(1 if x.numel() == 1 else n, -1).expand(n, -1)
    return rows.repeat_interleave(k // BLOCK // rows.shape[1], dim=1)


def _bytes(x: Tensor) -> Tensor:
    """fp16 ``[N, B]`` → uint8 ``[N, B, 2]``."""
    return x.contiguous().unsqueeze(-1).view(torch.uint8)


def _nibbles(codes: Tensor) -> Tensor:
    """uint8 codes 0..15 ``[N, K]`` → uint8 ``[N, K/32, 16]``."""
    halves = codes.reshape(codes.shape[0], -1, 2, BLOCK // 2)
    return halves[:, :, 0] | (halves[:, :, 1] << 4)


def _join(parts: list[Tensor]) -> np.ndarray:
    """The fields of each block, one after the other; ``[N, B, …]`` → ``[N, bytes]``."""
    return torch.cat(parts, dim=-1).flatten(1).contiguous().numpy()
