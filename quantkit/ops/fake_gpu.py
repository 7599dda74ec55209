"""Shapes and dtypes of the operators of :mod:`quantkit.ops.gpu`, without running them."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.ops import schema


def _codes(
    like: Tensor, columns: int, dtype: torch.dtype, kind: int, group: int
) -> tuple[Tensor, Tensor]:
    rows = like.shape[:-1]
    codes = torch.float8_e4m3fn if kind == schema.KIND_FP8 else torch.int8
    groups = 1 if group == -1 else -(-columns // group)
    return (
        like.new_empty((*rows, columns), dtype=codes),
        like.new_empty((*rows, groups), dtype=dtype),
    )


@torch.library.register_fake("quantkit::add_rms_norm_quantize")
def _add_rms_norm_quantize(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    epsilon: float,
    dtype: int,
    kind: int,
    group: int,
) -> tuple[Tensor, Tensor]:
    return _codes(residual, residual.shape[-1], schema.CODE_DTYPES[dtype], kind, group)


@torch.library.register_fake("quantkit::gated_activation_quantize")
def _gated_activation_quantize(
    gate_up: Tensor, gate: int, kind: int, group: int
) -> tuple[Tensor, Tensor]:
    return _codes(gate_up, gate_up.shape[-1] // 2, gate_up.dtype, kind, group)


@torch.library.register_fake("quantkit::hadamard_mma")
def _hadamard_mma(x: Tensor, signs: Tensor, base: int, order: int) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("quantkit::hadamard_mma_quantize")
def _hadamard_mma_quantize(
    x: Tensor, signs: Tensor, base: int, order: int, kind: int, group: int
) -> tuple[Tensor, Tensor]:
    return _codes(x, x.shape[-1], x.dtype, kind, group)


@torch.library.register_fake("quantkit::gated_hadamard_mma_quantize")
def _gated_hadamard_mma_quantize(
    gate_up: Tensor, signs: Tensor, base: int, order: int, gate: int, kind: int, group: int
) -> tuple[Tensor, Tensor]:
    return _codes(gate_up, gate_up.shape[-1] // 2, gate_up.dtype, kind, group)


@torch.library.register_fake("quantkit::w8a16_linear")
def _w8a16_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    counters: Tensor,
    n: int,
    kind: int,
    group_size: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("quantkit::w8a8_mma_linear")
def _w8a8_mma_linear(
    xq: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    counters: Tensor,
    n: int,
    group_size: int,
    out_dtype: int,
) -> Tensor:
    return xq.new_empty((*xq.shape[:-1], n), dtype=schema.CODE_DTYPES[out_dtype])


@torch.library.register_fake("quantkit::fp4a16_linear")
def _fp4a16_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    n: int,
    kind: int,
    group_size: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("quantkit::rope_store_kv_rows")
def _rope_store_kv_rows(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    starts: Tensor,
    past: Tensor,
    pages: Tensor,
    kv: Tensor,
    kv_scale: Tensor | None,
    kv_fixed: Tensor | None,
    kv_dtype: int,
    epsilon: float,
) -> Tensor:
    head_dim = kv.shape[-1] // schema.KV_BYTES[kv_dtype] // schema.PAGE_TOKENS
    heads = qkv.shape[-1] // head_dim - 2 * kv.shape[1]
    return qkv.new_empty((qkv.shape[0], heads, head_dim))


@torch.library.register_fake("quantkit::paged_decode_attention")
def _paged_decode_attention(
    q: Tensor,
    lengths: Tensor,
    pages: Tensor,
    kv: Tensor,
    kv_scale: Tensor | None,
    kv_dtype: int,
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    return torch.empty_like(q)
