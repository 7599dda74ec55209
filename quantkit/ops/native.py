"""The native operators as Python functions.

Every function raises ``quantkit.errors.KernelMissingError`` when the library for the tensor's
device is not built, and ``RuntimeError`` with the value, the rule and the remedy when an argument
is wrong. Inputs may have any strides; outputs are contiguous. Weight-only formats share one
meaning, with fp32 accumulation (K a row of the weight, g a group of ``group_size`` columns)::

    y[m, n] = sum_g scale[n, g] * sum_{k in g} (decode(code[n, k]) - zero[n, g]) * x[m, k] + bias[n]

On the CPU a row of ``y`` has the same bits whatever the other rows of ``x`` are and however many
threads run. bf16 activations multiply in bf16 products with fp32 sums where the CPU has them
(``avx512bf16``): exact for 8-bit codes and for integer and FP4 codebooks; a codebook that bf16
cannot hold, such as NF4, is rounded to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.ops import reference, schema
from quantkit.ops.library import require_cpu_kernel, require_cuda_kernel, require_for

_ops = torch.ops.quantkit


def pack_w4(codes: Tensor) -> Tensor:
    """4-bit codes to the kernels' layout.

    Args:
        codes: uint8 [N, K], values 0..15; only the low four bits are kept.

    Returns:
        uint8 [ceil(N/16), ceil(K/8), 64], padded with code 0: 64-byte chunks of 16 rows and 8
        columns, one little-endian 32-bit word a row, column ``2j`` in bits ``4j..4j+3`` and column
        ``2j+1`` in bits ``16+4j..16+4j+3``. Chunks of four neighbouring blocks of 16 rows
        alternate (the C header has the picture). The same on every device.
    """
    if codes.is_cuda:  # a few tensor operations there: the layout is the same, to the byte
        return reference.pack_w4(codes)
    require_for(codes)
    return _ops.pack_w4.default(codes)


def pack_w8(codes: Tensor) -> Tensor:
    """8-bit codes to the kernels' layout.

    Args:
        codes: int8, float8_e4m3fn or uint8 [N, K].

    Returns:
        uint8 [ceil(N/16), ceil(K/4), 64], padded with 0: chunks of 16 rows and 4 columns, in the
        same order as those of :func:`pack_w4`.
    """
    if codes.is_cuda:  # a few tensor operations there: the layout is the same, to the byte
        return reference.pack_w8(codes)
    require_for(codes)
    return _ops.pack_w8.default(codes)


def pack_float(values: Tensor) -> Tensor:
    """Weights that stay floats, in the kernels' layout.

    Args:
        values: bfloat16 or float32 [N, K].

    Returns:
        bfloat16 [ceil(N/16), ceil(K/2), 32] or float32 [ceil(N/16), K, 16], padded with 0: chunks
        of 16 rows and 2 or 1 columns, in the same order as those of :func:`pack_w4`.
    """
    require_cpu_kernel("pack_float", values)
    return _ops.pack_float.default(values)


def w4_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    lut: Tensor,
    bias: Tensor | None,
    n: int,
    group_size: int,
) -> Tensor:
    """A linear layer with 4-bit weights.

    Args:
        x: float32, float16 or bfloat16 [..., K].
        packed: uint8 [ceil(N/16), ceil(K/8), 64] from :func:`pack_w4`.
        scale: float32 [N, ceil(K/group_size)]; fastest from :func:`quantkit.ops.pack_scale`.
        zero: float32 like scale, in units of the codebook; None for zero.
        lut: float32 [16], what each code means; finite values.
        bias: float32, float16 or bfloat16 [N], or None.
        n: N, rows of the weight.
        group_size: columns that share a scale: a multiple of 16, or K or -1 for one group a row.

    Returns:
        [..., N] in the dtype of x.
    """
    require_for(x)
    return _ops.w4_linear.default(x, packed, scale, zero, lut, bias, n, group_size)


def w4a16_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    n: int,
    group_size: int,
) -> Tensor:
    """A linear layer with integer 4-bit weights on a GPU's tensor cores::

        y[m, n] = sum_g scale[n, g] * sum_{k in g} (code[n, k] - zero[n, g]) * x[m, k] + bias[n]

    Products of 16-bit floats, summed in fp32 in an order that depends on N, K and the GPU alone.

    Args:
        x: float16 or bfloat16 [..., K].
        packed: uint8 [ceil(N/64), ceil(K/64), 2048] from :func:`quantkit.ops.pack_w4a16`.
        scale: [ceil(N/64), ceil(K/group_size), 64] in the dtype of x, from
            :func:`quantkit.ops.pack_w4a16_table`.
        zero: uint8 like scale, 0..15 in units of the code; None for 8.
        bias: [N] in the dtype of x, or None.
        counters: int32 from :func:`quantkit.ops.new_w4a16_counters`; zero again on return.
        n: N, rows of the weight.
        group_size: columns that share a scale: a multiple of 32, or K or -1 for one group a row.

    Returns:
        [..., N] in the dtype of x. A row has the same bits whatever the other rows are, among calls
        with up to 32 rows and among calls with more.
    """
    require_cuda_kernel("w4a16_linear", x)
    return _ops.w4a16_linear.default(x, packed, scale, zero, bias, counters, n, group_size)


def w8_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    kind: int | str,
    group_size: int,
) -> Tensor:
    """A linear layer with 8-bit weights and floating-point activations.

    Args:
        x: float32, float16 or bfloat16 [..., K].
        codes: uint8 [ceil(N/16), ceil(K/4), 64] from :func:`pack_w8`. Row-major [N, K] codes are
            accepted on the CPU and packed on every call.
        scale: float32 [N, ceil(K/group_size)]; the last group may be short.
        zero: float32 like scale, in units of the code; None for zero.
        bias: float32, float16 or bfloat16 [N], or None.
        kind: "int8" or "fp8" (float8_e4m3fn).
        group_size: a multiple of 16, or K or -1 for one group a row.

    Returns:
        [..., N] in the dtype of x.
    """
    require_for(x)
    return _ops.w8_linear.default(x, codes, scale, zero, bias, schema.kind_code(kind), group_size)


def w8a8_linear(
    xq: Tensor,
    x_scale: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """A linear layer with INT8 weights and INT8 activations, accumulated exactly in int32.

    ``y = float(xq @ wq.T) * (x_scale * w_scale) + bias``, rounded once to ``out_dtype``.

    Args:
        xq: int8 [..., K], K at most 131071.
        x_scale: one value a row of xq, or one for all; any float dtype.
        wq: uint8 [ceil(N/16), ceil(K/4), 64] from :func:`pack_w8`, or int8 [N, K] (packed on every
            call).
        w_scale: float [N] or [N, 1].
        bias: float [N] or None.
        out_dtype: torch.float32, torch.float16 or torch.bfloat16.

    Returns:
        [..., N].
    """
    require_cpu_kernel("w8a8_linear", xq)
    code = schema.dtype_code(out_dtype)
    return _ops.w8a8_linear.default(xq, x_scale, wq, w_scale, bias, code)


def int8_linear(
    xq: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    lut: Tensor | None,
    bias: Tensor | None,
    n: int,
    group_size: int,
    out_dtype: torch.dtype,
    x_group_size: int | None = None,
) -> Tensor:
    """A linear layer with INT8 activations and 4-bit or 8-bit integer weights.

    Products are summed exactly in int32 over the columns that share both scales (a *step*), then
    in fp32 in ascending order::

        y = sum_s (sum_{k in s} (decode(code) - zero) * xq) * (x_scale * scale) + bias

    Args:
        xq: int8 [..., K], any strides.
        x_scale: float [..., ceil(K/x_group_size)], or one value for all of xq.
        packed: from :func:`pack_w4` where ``lut`` is given, else from :func:`pack_w8` (int8).
        scale: float32 or bfloat16 [N, ceil(K/group_size)].
        zero: float32 like scale, in units of the decoded code; None for zero.
        lut: float32 [16], what each 4-bit code means: integers or halves of integers, the largest
            at most 127 steps above the smallest. None for 8-bit weights.
        bias: float32, float16 or bfloat16 [N], or None.
        n: N, rows of the weight.
        group_size: columns that share a weight scale: a multiple of 16, or K or -1 for one a row.
        out_dtype: torch.float32, torch.float16 or torch.bfloat16.
        x_group_size: columns that share an activation scale, likewise; of this and ``group_size``
            one must divide the other. None: group_size if x_scale has a column for each group of
            the weight, else one scale a row.

    Returns:
        [..., N]. A row has the same bits whatever the other rows are and however many threads run.

    Raises:
        RuntimeError: shapes, dtypes or group sizes break a rule above; more than 131071 columns
            share both scales; lut is not integral.
    """
    require_cpu_kernel("int8_linear", xq)
    if x_group_size is None:
        x_group_size = schema.x_group_size(x_scale, group_size, xq.shape[-1])
    code = schema.dtype_code(out_dtype)
    return _ops.int8_linear.default(
        xq, x_scale, packed, scale, zero, lut, bias, n, group_size, code, x_group_size
    )


def float_linear(x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """A linear layer with bfloat16 or float32 weights, summed in fp32.

    bfloat16 weights take bfloat16 activations in bf16 products where the CPU has them; everything
    else is multiplied in fp32.

    Args:
        x: float32, float16 or bfloat16 [..., K].
        packed: from :func:`pack_float`.
        bias: float32, float16 or bfloat16 [N], or None.
        n: N, rows of the weight.

    Returns:
        [..., N] in the dtype of x.
    """
    require_cpu_kernel("float_linear", x)
    return _ops.float_linear.default(x, packed, bias, n)


def dequantize_w4(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    lut: Tensor,
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight that :func:`w4_linear` multiplies with: [N, K], computed in fp32, rounded once."""
    require_for(packed)
    code = schema.dtype_code(dtype)
    return _ops.dequantize_w4.default(packed, scale, zero, lut, n, k, group_size, code)


def dequantize_w8(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    n: int,
    k: int,
    kind: int | str,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight that :func:`w8_linear` multiplies with: [N, K], computed in fp32, rounded once."""
    require_for(packed)
    code = schema.dtype_code(dtype)
    kind = schema.kind_code(kind)
    return _ops.dequantize_w8.default(packed, scale, zero, n, k, kind, group_size, code)


def quantize_int8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric dynamic INT8, one scale a token, in the arithmetic of compressed-tensors.

    Everything is computed in the dtype of x, with its rounding: scale = absmax / 127.5, replaced by
    the dtype's epsilon where it is 0; codes = round_half_even(clamp(x / scale, -128, 127)).

    Args:
        x: float32, float16 or bfloat16 [..., K]; on a GPU no float32, and K at most 49152.

    Returns:
        int8 [..., K] and the scale [..., 1] in the dtype of x. A row with a NaN has a NaN scale.
    """
    require_for(x)
    return _ops.quantize_int8_per_token.default(x)


def quantize_int8_per_group(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Symmetric INT8 for :func:`int8_linear`, one scale for each ``group`` columns of a token.

    Computed in fp32 whatever the dtype of x: scale = absmax / 127.5, or 1 where that is no normal
    number; codes = round_half_even(clamp(x * (1 / scale), -128, 127)).

    Args:
        x: float32, float16 or bfloat16 [..., K].
        group: any positive number; the last group may be short.

    Returns:
        int8 [..., K] and the scale, float32 [..., ceil(K/group)]. A group with a NaN has a NaN
        scale, one with an infinity an infinite one.
    """
    require_cpu_kernel("quantize_int8_per_group", x)
    return _ops.quantize_int8_per_group.default(x, group)


def quantize_int8_static(x: Tensor, scale: Tensor) -> Tensor:
    """INT8 codes [..., K] with a given scale of one value.

    The division is done in the dtype that torch promotes x and scale to.
    """
    require_for(x)
    return _ops.quantize_int8_static.default(x, scale)


def quantize_fp8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`quantize_int8_per_token`, to float8_e4m3fn with scale = absmax / 448."""
    require_for(x)
    return _ops.quantize_fp8_per_token.default(x)


def quantize_fp8_per_block(x: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """As :func:`quantize_fp8_per_token` with one scale for each ``block`` columns of a token.

    A GPU has blocks of 128.

    Returns:
        float8_e4m3fn [..., K] and the scale [..., ceil(K/block)]; the last block may be short.
    """
    require_for(x)
    return _ops.quantize_fp8_per_block.default(x, block)


def quantize_fp8_static(x: Tensor, scale: Tensor) -> Tensor:
    """float8_e4m3fn codes [..., K] with a given scale of one value."""
    require_for(x)
    return _ops.quantize_fp8_static.default(x, scale)
