"""The operators of :mod:`quantkit.ops.gpu` in plain torch, on any device: their oracle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantkit.ops import reference, schema
from quantkit.ops.reference_parts import add_rms_norm, gated_activation, hadamard


def pack_w8_mma(codes: Tensor) -> Tensor:
    """int8, float8_e4m3fn or uint8 [N, K] to the layout of the 8-bit linear layers on tensor cores.

    Returns:
        uint8 [ceil(N/64), ceil(K/64), 4096], padded with 0: fragments of mma in the order in which
        a warp loads them (the C header has the formula).
    """
    n, k = codes.shape
    padded = torch.nn.functional.pad(codes.view(torch.uint8), (0, -k % 64, 0, -n % 64))
    blocks, slabs = padded.shape[0] // 64, padded.shape[1] // 64
    # Rows 16 tile + 8 i + g; columns 32 half + 8 t + 4 j + byte; word 2 j + i.
    split = padded.reshape(blocks, 4, 2, 8, slabs, 2, 4, 2, 4)
    b, tile, i, g, s, half, t, j, byte = range(9)
    return split.permute(b, s, tile, half, g, t, j, i, byte).reshape(blocks, slabs, 4096)


def unpack_w8_mma(packed: Tensor, n: int, k: int, kind: int | str = "int8") -> Tensor:
    """The inverse of :func:`pack_w8_mma`: int8 or float8_e4m3fn [N, K]."""
    blocks, slabs, _ = packed.shape
    split = packed.reshape(blocks, slabs, 4, 2, 8, 4, 2, 2, 4)
    b, s, tile, half, g, t, j, i, byte = range(9)
    rows = split.permute(b, tile, i, g, s, half, t, j, byte).reshape(blocks * 64, slabs * 64)
    fp8 = schema.kind_code(kind) == schema.KIND_FP8
    return rows[:n, :k].contiguous().view(torch.float8_e4m3fn if fp8 else torch.int8)


def pack_hadamard(factor: Tensor) -> Tensor:
    """The signs of B, in the order of the tensor cores' fragments.

    Args:
        factor: [B, at least B], columns from B on ignored; the others are c and −c for one c, as
            :func:`quantkit.hadamard.factor` makes them.

    Returns:
        int32 [ceil(B/16), ceil(B/64), 32]; a word has the signs of four fragments of a lane (the C
        header has the formula).

    Raises:
        ValueError: factor is no multiple of a matrix of 1 and −1.
    """
    base = factor.shape[0]
    square = factor[:, :base].cpu()
    if square.shape != (base, base) or not (square.abs() == square[0, 0].abs()).all():
        raise ValueError(
            f"factor {list(factor.shape)} is no multiple of a matrix of 1 and -1; "
            "make it with quantkit.hadamard.factor"
        )
    width, bands = -base % 64, -base % 16
    minus = torch.nn.functional.pad((square < 0).long(), (0, bands, 0, width))
    # Row 64 word + 16 f + 4 t + 2 high + e; column 16 band + 8 low + g.
    split = minus.reshape(-1, 4, 4, 2, 2, minus.shape[1] // 16, 2, 8)
    word, f, t, high, e, band, low, g = range(8)
    bits = split.permute(band, word, g, t, e, f, high, low).reshape(-1, split.shape[0], 32, 2, 16)
    # Bit 16 e + 15 - 4 f - 2 high - low.
    weights = 2 ** torch.tensor([[15 - i for i in range(16)], [31 - i for i in range(16)]])
    return (bits * weights).sum((-1, -2)).to(torch.uint32).view(torch.int32).to(factor.device)


def unpack_hadamard(signs: Tensor, base: int) -> Tensor:
    """The inverse of :func:`pack_hadamard`: B, fp32 [B, B] of 1 and −1."""
    bands, words, _ = signs.shape
    shifts = torch.tensor([[15 - i for i in range(16)], [31 - i for i in range(16)]])
    bits = signs.long().cpu()[..., None, None] >> shifts & 1
    split = bits.reshape(bands, words, 8, 4, 2, 4, 2, 2)
    band, word, g, t, e, f, high, low = range(8)
    rows = split.permute(word, f, t, high, e, band, low, g).reshape(64 * words, 16 * bands)
    return (1.0 - 2.0 * rows[:base, :base]).to(signs.device)


def w8a16_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    counters: Tensor,
    n: int,
    kind: int | str,
    group_size: int,
) -> Tensor:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    k = x.shape[-1]
    group = torch.arange(k, device=x.device) // (k if group_size == -1 else group_size)
    table = reference.unpack_w4a16_table(scale, n).to(compute)[:, group]
    weight = unpack_w8_mma(packed, n, k, kind).to(compute) * table
    y = x.to(compute) @ weight.t()
    return (y if bias is None else y + bias.to(compute)).to(x.dtype)


def w8a8_mma_linear(
    xq: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    counters: Tensor,
    n: int,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    k = xq.shape[-1]
    kind = schema.KIND_INT8 if xq.dtype == torch.int8 else schema.KIND_FP8
    # float64 holds every sum of 131071 products of two int8 exactly.
    codes, weight = xq.reshape(-1, k).double(), unpack_w8_mma(packed, n, k, kind).double()
    if group_size == -1 or group_size >= k:
        scales = x_scale.float().reshape(-1, 1) * scale.float().reshape(1, -1)
        y = (codes @ weight.t()).float() * scales
    else:
        group = torch.arange(k, device=xq.device) // group_size
        weight = weight * reference.unpack_w4a16_table(scale, n).double()[:, group]
        x_scales = x_scale.double().reshape(codes.shape[0], -1)[:, group]
        y = (codes * x_scales) @ weight.t()
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(out_dtype).reshape(*xq.shape[:-1], n)


def _quantize(x: Tensor, kind: int | str, group: int) -> tuple[Tensor, Tensor]:
    if schema.kind_code(kind) == schema.KIND_INT8:
        if group != -1:
            raise ValueError(f"group {group}: int8 has one scale a token here; use -1")
        return reference.quantize_int8_per_token(x)
    if group == -1:
        return reference.quantize_fp8_per_token(x)
    return reference.quantize_fp8_per_block(x, group)


def add_rms_norm_quantize(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    epsilon: float,
    dtype: torch.dtype,
    kind: int | str,
    group: int = -1,
) -> tuple[Tensor, Tensor]:
    return _quantize(add_rms_norm(residual, branch, weight, epsilon, dtype), kind, group)


def gated_activation_quantize(
    gate_up: Tensor, gate: int | str, kind: int | str, group: int = -1
) -> tuple[Tensor, Tensor]:
    return _quantize(gated_activation(gate_up, gate), kind, group)


def hadamard_mma(x: Tensor, signs: Tensor, base: int, order: int) -> Tensor:
    return hadamard(x, unpack_hadamard(signs, base) / math.sqrt(order), order)


def hadamard_mma_quantize(
    x: Tensor, signs: Tensor, base: int, order: int, kind: int | str, group: int = -1
) -> tuple[Tensor, Tensor]:
    return _quantize(hadamard_mma(x, signs, base, order), kind, group)


def gated_hadamard_mma_quantize(
    gate_up: Tensor,
    signs: Tensor,
    base: int,
    order: int,
    gate: int | str,
    kind: int | str,
    group: int = -1,
) -> tuple[Tensor, Tensor]:
    x = gated_activation(gate_up, gate)
    return hadamard_mma_quantize(x, signs, base, order, kind, group)
