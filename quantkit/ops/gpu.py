"""Operators that only a GPU has, as Python functions; :mod:`quantkit.ops.native` has the rules.

Each raises ``KernelMissingError`` for tensors that are not on a GPU: ``get_backend("reference")``
has the same functions for any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.ops import schema
from quantkit.ops.library import require_cuda_kernel

_ops = torch.ops.quantkit


def add_rms_norm_quantize(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    epsilon: float,
    dtype: torch.dtype,
    kind: int | str,
    group: int = -1,
) -> tuple[Tensor, Tensor]:
    """:func:`add_rms_norm` and a quantizer in one pass over memory.

    Equal to ``quantize(add_rms_norm(residual, branch, weight, epsilon, dtype))`` to the bit.

    Args:
        residual: float32 [..., N], contiguous, N at most 24576; written unless branch is None.
        branch: float32, float16 or bfloat16, like residual, or None for the norm alone.
        weight: float32 [N].
        epsilon: added to the mean square.
        dtype: torch.float16 or torch.bfloat16: what the norm is rounded to, and the arithmetic of
            the quantizer.
        kind: "int8" or "fp8".
        group: -1 for one scale a token, or 128 columns a scale ("fp8" only).

    Returns:
        int8 or float8_e4m3fn [..., N], and the scale in ``dtype``, [..., 1] or [..., ceil(N/128)].
    """
    require_cuda_kernel("add_rms_norm_quantize", residual)
    codes = (schema.dtype_code(dtype), schema.kind_code(kind), group)
    return _ops.add_rms_norm_quantize.default(residual, branch, weight, epsilon, *codes)


def gated_activation_quantize(
    gate_up: Tensor, gate: int | str, kind: int | str, group: int = -1
) -> tuple[Tensor, Tensor]:
    """:func:`gated_activation` and a quantizer in one pass over memory.

    Equal to ``quantize(gated_activation(gate_up, gate))`` to the bit.

    Args:
        gate_up: float16 or bfloat16 [..., 2·N]: all of gate, then all of up; N at most 49152.
        gate: "silu" or "gelu_tanh".
        kind: "int8" or "fp8".
        group: -1 for one scale a token, or 128 columns a scale ("fp8" only).

    Returns:
        int8 or float8_e4m3fn [..., N], and the scale in the dtype of gate_up, [..., 1] or
        [..., ceil(N/128)].
    """
    require_cuda_kernel("gated_activation_quantize", gate_up)
    codes = (schema.kind_code(kind), group)
    return _ops.gated_activation_quantize.default(gate_up, schema.gate_code(gate), *codes)


def hadamard_mma(x: Tensor, signs: Tensor, base: int, order: int) -> Tensor:
    """Each run of ``order`` columns of a row times S ⊗ B / √order, B on the tensor cores.

    Products of 16-bit floats and ±1, summed in fp32 in an order that depends on B's and S's orders
    alone; rounded once.

    Args:
        x: float16 or bfloat16 [..., N], N a multiple of ``order``. A row takes 4·N bytes of a
            block's shared memory: N is at most some 58,000 on an H100, 41,000 on an A100 and
            25,000 on GPUs with 99 KiB.
        signs: int32 [ceil(B/16), ceil(B/64), 32] from :func:`quantkit.ops.pack_hadamard`.
        base: B's order, 1 to 512.
        order: base · 2^k; S is Sylvester's Hadamard matrix of order 2^k.

    Returns:
        [..., N] in the dtype of x. A row has the same bits whatever the other rows are.
    """
    require_cuda_kernel("hadamard_mma", x)
    return _ops.hadamard_mma.default(x, signs, base, order)


def hadamard_mma_quantize(
    x: Tensor, signs: Tensor, base: int, order: int, kind: int | str, group: int = -1
) -> tuple[Tensor, Tensor]:
    """:func:`hadamard_mma` and a quantizer in one pass over memory.

    Equal to ``quantize(hadamard_mma(x, signs, base, order))`` to the bit.

    Args:
        x, signs, base, order: as there.
        kind: "int8" or "fp8".
        group: -1 for one scale a token, or 128 columns a scale ("fp8" only).

    Returns:
        int8 or float8_e4m3fn [..., N], and the scale in the dtype of x, [..., 1] or
        [..., ceil(N/128)].
    """
    require_cuda_kernel("hadamard_mma_quantize", x)
    code = schema.kind_code(kind)
    return _ops.hadamard_mma_quantize.default(x, signs, base, order, code, group)


def gated_hadamard_mma_quantize(
    gate_up: Tensor,
    signs: Tensor,
    base: int,
    order: int,
    gate: int | str,
    kind: int | str,
    group: int = -1,
) -> tuple[Tensor, Tensor]:
    """:func:`gated_activation`, :func:`hadamard_mma` and a quantizer in one pass over memory.

    Equal to the three one after another, to the bit.

    Args:
        gate_up: float16 or bfloat16 [..., 2·N]: all of gate, then all of up.
        signs, base, order: as for :func:`hadamard_mma`.
        gate: "silu" or "gelu_tanh".
        kind: "int8" or "fp8".
        group: -1 for one scale a token, or 128 columns a scale ("fp8" only).

    Returns:
        int8 or float8_e4m3fn [..., N], and the scale in the dtype of gate_up, [..., 1] or
        [..., ceil(N/128)].
    """
    require_cuda_kernel("gated_hadamard_mma_quantize", gate_up)
    codes = (schema.gate_code(gate), schema.kind_code(kind), group)
    return _ops.gated_hadamard_mma_quantize.default(gate_up, signs, base, order, *codes)


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
    """A linear layer with 8-bit weights and 16-bit activations on the tensor cores::

        y[m, n] = sum_g scale[n, g] * sum_{k in g} code[n, k] * x[m, k] + bias[n]

    Products of 16-bit floats, summed in fp32 in an order that depends on N, K and the GPU alone.

    Args:
        x: float16 or bfloat16 [..., K].
        packed: uint8 [ceil(N/64), ceil(K/64), 4096] from :func:`quantkit.ops.pack_w8_mma`.
        scale: [ceil(N/64), ceil(K/group_size), 64] in the dtype of x, from
            :func:`quantkit.ops.pack_w4a16_table`.
        bias: [N] in the dtype of x, or None.
        counters: int32 from :func:`quantkit.ops.new_w4a16_counters`; zero again on return.
        n: N, rows of the weight.
        kind: "int8" or "fp8" (float8_e4m3fn).
        group_size: columns that share a scale: a multiple of 32, or K or -1 for one group a row.

    Returns:
        [..., N] in the dtype of x. A row has the same bits whatever the other rows are, among calls
        with up to 32 rows and among calls with more.
    """
    require_cuda_kernel("w8a16_linear", x)
    code = schema.kind_code(kind)
    return _ops.w8a16_linear.default(x, packed, scale, bias, counters, n, code, group_size)


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
    """A linear layer with 8-bit weights and activations on the tensor cores::

        y[m, n] = sum_g scale[n, g] * x_scale[m, g] * sum_{k in g} code[n, k] * xq[m, k] + bias[n]

    INT8 sums are exact in int32, and the result has the bits of :func:`w8a8_linear`. FP8 products
    are exact and summed in fp32, in an order that depends on N, K and the GPU alone.

    Args:
        xq: int8 or float8_e4m3fn [..., K], of the weight's type; int8 has K at most 131071.
        x_scale: float32, float16 or bfloat16, contiguous: one value a row of xq for each group of
            columns, [..., ceil(K/group_size)]; or one for all where there is one group.
        packed: uint8 [ceil(N/64), ceil(K/64), 4096] from :func:`quantkit.ops.pack_w8_mma`.
        scale: float32 [N] or [N, 1] for one group, else [ceil(N/64), ceil(K/group_size), 64] from
            :func:`quantkit.ops.pack_w4a16_table`.
        bias: float32, float16 or bfloat16 [N], or None.
        counters: int32 from :func:`quantkit.ops.new_w4a16_counters`; zero again on return.
        n: N, rows of the weight.
        group_size: K or -1 for one group a row; float8_e4m3fn also takes multiples of 64.
        out_dtype: torch.float32, torch.float16 or torch.bfloat16.

    Returns:
        [..., N]. A row has the same bits whatever the other rows are, among calls with up to 32
        rows and among calls with more.
    """
    require_cuda_kernel("w8a8_mma_linear", xq)
    code = schema.dtype_code(out_dtype)
    return _ops.w8a8_mma_linear.default(
        xq, x_scale, packed, scale, bias, counters, n, group_size, code
    )


def fp4a16_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    n: int,
    kind: int | str,
    group_size: int,
) -> Tensor:
    """A linear layer with 4-bit float weights and 16-bit activations on the tensor cores::

        y[m, n] = sum_g scale[n, g] * sum_{k in g} value[n, k] * x[m, k] / global_scale + bias[n]

    Products of 16-bit floats, summed in fp32 in an order that depends on N, K and the GPU alone.
    "nvfp4" and "mxfp4" are E2M1 (OCP MX specification v1.0, section 5.3.3), exact in the dtype of
    x, as is a product of an E2M1 value and its E4M3 scale; "nf4" has the 16 values of Dettmers et
    al., "QLoRA", arXiv 2305.14314, appendix E, rounded to that dtype.

    Args:
        x: float16 or bfloat16 [..., K].
        packed: uint8 [ceil(N/64), ceil(K/64), 2048] from :func:`quantkit.ops.pack_fp4_mma`.
        scale: "nvfp4" uint8 [ceil(N/64), ceil(K/64), 256] and "mxfp4" [..., 128] from
            :func:`quantkit.ops.pack_fp4_scales`; "nf4" [ceil(N/64), ceil(K/group_size), 64] in the
            dtype of x from :func:`quantkit.ops.pack_w4a16_table`.
        global_scale: float32 [1] as in the checkpoint, "nvfp4" only; else None.
        bias: [N] in the dtype of x, or None.
        counters: int32 from :func:`quantkit.ops.new_w4a16_counters`; zero again on return.
        n: N, rows of the weight.
        kind: "nvfp4", "mxfp4" or "nf4".
        group_size: columns that share a scale: 16 for "nvfp4", 32 for "mxfp4", for "nf4" a multiple
            of 64, or K or -1 for one group a row.

    Returns:
        [..., N] in the dtype of x. A row has the same bits whatever the other rows are, among calls
        with up to 32 rows and among calls with more.
    """
    require_cuda_kernel("fp4a16_linear", x)
    rest = (counters, n, schema.fp4_code(kind), group_size)
    return _ops.fp4a16_linear.default(x, packed, scale, global_scale, bias, *rest)
