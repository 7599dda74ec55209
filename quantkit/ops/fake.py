"""Shapes and dtypes of every operator without running it, for torch.compile and meta tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.ops import schema


def _ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


@torch.library.register_fake("quantkit::pack_w4")
def _pack_w4(codes: Tensor) -> Tensor:
    n, k = codes.shape
    return codes.new_empty((_ceil_div(n, 16), _ceil_div(k, 8), 64), dtype=torch.uint8)


@torch.library.register_fake("quantkit::pack_w8")
def _pack_w8(codes: Tensor) -> Tensor:
    n, k = codes.shape
    return codes.new_empty((_ceil_div(n, 16), _ceil_div(k, 4), 64), dtype=torch.uint8)


@torch.library.register_fake("quantkit::pack_float")
def _pack_float(values: Tensor) -> Tensor:
    n, k = values.shape
    codes = 4 // values.element_size()
    return values.new_empty((_ceil_div(n, 16), _ceil_div(k, codes), 16 * codes))


@torch.library.register_fake("quantkit::w4_linear")
def _w4_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    lut: Tensor,
    bias: Tensor | None,
    n: int,
    group_size: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("quantkit::w8_linear")
def _w8_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    kind: int,
    group_size: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


@torch.library.register_fake("quantkit::w8a8_linear")
def _w8a8_linear(
    xq: Tensor, x_scale: Tensor, wq: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: int
) -> Tensor:
    dtype = schema.CODE_DTYPES[out_dtype]
    return xq.new_empty((*xq.shape[:-1], w_scale.numel()), dtype=dtype)


@torch.library.register_fake("quantkit::int8_linear")
def _int8_linear(
    xq: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    lut: Tensor | None,
    bias: Tensor | None,
    n: int,
    group_size: int,
    out_dtype: int,
    x_group_size: int,
) -> Tensor:
    return xq.new_empty((*xq.shape[:-1], n), dtype=schema.CODE_DTYPES[out_dtype])


@torch.library.register_fake("quantkit::float_linear")
def _float_linear(x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("quantkit::w4a16_linear")
def _w4a16_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    n: int,
    group_size: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("quantkit::dequantize_w4")
def _dequantize_w4(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    lut: Tensor,
    n: int,
    k: int,
    group_size: int,
    out_dtype: int,
) -> Tensor:
    return packed.new_empty((n, k), dtype=schema.CODE_DTYPES[out_dtype])


@torch.library.register_fake("quantkit::dequantize_w8")
def _dequantize_w8(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    n: int,
    k: int,
    kind: int,
    group_size: int,
    out_dtype: int,
) -> Tensor:
    return packed.new_empty((n, k), dtype=schema.CODE_DTYPES[out_dtype])


@torch.library.register_fake("quantkit::quantize_int8_per_token")
def _quantize_int8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1))


@torch.library.register_fake("quantkit::quantize_int8_per_group")
def _quantize_int8_per_group(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    groups = _ceil_div(x.shape[-1], group)
    scale = x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scale


@torch.library.register_fake("quantkit::quantize_int8_static")
def _quantize_int8_static(x: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


@torch.library.register_fake("quantkit::quantize_fp8_per_token")
def _quantize_fp8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty((*x.shape[:-1], 1))


@torch.library.register_fake("quantkit::quantize_fp8_per_block")
def _quantize_fp8_per_block(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    blocks = _ceil_div(x.shape[-1], block)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty((*x.shape[:-1], blocks))


@torch.library.register_fake("quantkit::quantize_fp8_static")
def _quantize_fp8_static(x: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
