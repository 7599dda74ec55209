"""The parts of a decoder's forward pass as Python functions: CPU kernels, norms and gates on a GPU.

Every function raises ``KernelMissingError`` when the CPU library is not built and ``RuntimeError``
with the value, the rule and the remedy when an argument is wrong. Rows are read in their dtype,
computed in fp32 and rounded once. A row has the same bits whatever else is in the batch, however a
prompt was cut into chunks, whichever pages a sequence got and however many threads run.

A ragged batch is described by three int32 tensors: ``starts`` [S + 1], where each sequence's new
tokens begin (0 first, the number of all new tokens last, at least one a sequence); ``past`` [S],
the tokens that its pages hold already; ``pages`` [S, P], its page numbers in order, of which those
that its tokens reach are read.

Pages hold 64 tokens of one layer: ``kv`` uint8 [pages, kv_heads, 2, page bytes], keys then values,
and for 8-bit types ``kv_scale`` float32 [pages, kv_heads, 2, 64], a scale a token. The layout of a
page is that of a packed weight (the C header has the picture); :func:`new_kv_pages` makes them and
:func:`read_kv_pages` reads them back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.ops import schema
from quantkit.ops.library import require_cpu_kernel, require_for

_ops = torch.ops.quantkit


def add_rms_norm(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    epsilon: float,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``residual += branch`` in place; ``residual / sqrt(mean(residual²) + epsilon) · weight``.

    Args:
        residual: float32 [..., N], contiguous; written unless branch is None.
        branch: float32, float16 or bfloat16, like residual, or None for the norm alone.
        weight: float32 [N].
        epsilon: added to the mean square.
        out_dtype: torch.float32, torch.float16 or torch.bfloat16; on a GPU no float32.

    Returns:
        [..., N].
    """
    require_for(residual)
    code = schema.dtype_code(out_dtype)
    return _ops.add_rms_norm.default(residual, branch, weight, epsilon, code)


def gated_activation(gate_up: Tensor, kind: int | str) -> Tensor:
    """``act(gate) · up``.

    Args:
        gate_up: float32, float16 or bfloat16 [..., 2·N]: all of gate, then all of up.
        kind: "silu" or "gelu_tanh" (GELU by its tanh approximation).

    Returns:
        [..., N] in the dtype of gate_up.
    """
    require_for(gate_up)
    return _ops.gated_activation.default(gate_up, schema.gate_code(kind))


def hadamard(x: Tensor, factor: Tensor, order: int) -> Tensor:
    """Each run of ``order`` columns of a row times S ⊗ F: a rotation, with the right F.

    A GPU has it for Hadamard matrices alone, as :func:`quantkit.ops.hadamard_mma`.

    Args:
        x: float32, float16 or bfloat16 [..., N], N a multiple of ``order``.
        factor: float32 [B, B rounded up to a multiple of 16], F and columns of zeros, from
            :func:`quantkit.hadamard.factor`.
        order: B · 2^k; S is Sylvester's Hadamard matrix of order 2^k.

    Returns:
        [..., N] in the dtype of x.
    """
    require_cpu_kernel("hadamard", x)
    return _ops.hadamard.default(x, factor, order)


def embed(tokens: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    """Rows of an embedding table, times ``scale``.

    Args:
        tokens: int32 or int64 [...], each in 0..V-1.
        table: float32, float16 or bfloat16 [V, N].

    Returns:
        float32 [..., N].
    """
    require_cpu_kernel("embed", table)
    return _ops.embed.default(tokens, table, scale)


def rope_store_kv(
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
    kv_dtype: int | str,
    epsilon: float = 1e-6,
) -> Tensor:
    """Rotary embedding of queries and keys; keys and values go into their pages.

    This call clears what it finds: the value half of a page is zeroed when the first of its 64
    tokens is written, so pages may come from anywhere. A value with a NaN, an infinity or a number
    past bfloat16's range is stored as zeros with a key of NaNs: every query that sees the token
    becomes NaN, no other does. Two sequences of a batch must not write to the same page.

    Args:
        qkv: float32, float16 or bfloat16 [tokens, (heads + 2·kv_heads)·head_dim]: queries, keys,
            values.
        q_norm, k_norm: float32 [head_dim], weights of an RMS norm of each head, or None.
        cos, sin: float32 [positions, rotary_dim/2]; dimensions i and i + rotary_dim/2 are turned by
            the angle i of the token's position, those from rotary_dim on stay.
        starts, past, pages: the batch, see above.
        kv, kv_scale: the pages, written.
        kv_dtype: what they hold: "float32", "bfloat16", "int8" or "fp8".
        epsilon: of the norms.

    Returns:
        The queries, [tokens, heads, head_dim] in the dtype of qkv.
    """
    require_cpu_kernel("rope_store_kv", qkv)
    code = schema.kv_code(kv_dtype)
    return _ops.rope_store_kv.default(
        qkv, q_norm, k_norm, cos, sin, starts, past, pages, kv, kv_scale, code, epsilon
    )


def paged_attention(
    q: Tensor,
    starts: Tensor,
    past: Tensor,
    pages: Tensor,
    kv: Tensor,
    kv_scale: Tensor | None,
    kv_dtype: int | str,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Causal attention of each new token over its sequence's pages, its own key included.

    Queries in bfloat16 are multiplied in bf16 products with fp32 sums where the CPU has them, and
    probabilities rounded to bfloat16; float32 pages, and other queries, are multiplied in fp32.

    Args:
        q: float32, float16 or bfloat16 [tokens, heads, head_dim]; heads a multiple of kv_heads.
        starts, past, pages: the batch that :func:`rope_store_kv` stored. Every page up to a
            sequence's last token must be valid, those before a window too.
        kv, kv_scale, kv_dtype: the pages.
        scale: of a score.
        softcap: scores become ``softcap · tanh(score / softcap)``; 0 for none.
        window: keys that a query sees, its own included; 0 for all.

    Returns:
        [tokens, heads, head_dim] in the dtype of q.
    """
    require_cpu_kernel("paged_attention", q)
    code = schema.kv_code(kv_dtype)
    return _ops.paged_attention.default(
        q, starts, past, pages, kv, kv_scale, code, scale, softcap, window
    )


def new_kv_pages(
    pages: int, kv_heads: int, head_dim: int, kv_dtype: int | str
) -> tuple[Tensor, Tensor | None]:
    """Zeroed pages of one layer: ``kv``, and ``kv_scale`` or None.

    Args:
        head_dim: a multiple of 16, at most 512.
    """
    code = schema.kv_code(kv_dtype)
    if head_dim <= 0 or head_dim % 16 or head_dim > 512:
        raise ValueError(f"head_dim {head_dim} must be a multiple of 16, at most 512")
    width = head_dim * schema.PAGE_TOKENS * schema.KV_BYTES[code]
    kv = torch.zeros(pages, kv_heads, 2, width, dtype=torch.uint8)
    if schema.KV_BYTES[code] > 1:
        return kv, None
    return kv, torch.zeros(pages, kv_heads, 2, schema.PAGE_TOKENS, dtype=torch.float32)
