"""Keys and values in pages on a GPU, as Python functions; :mod:`quantkit.ops.native` has the rules.

Pages hold 64 tokens of one layer, token after token (csrc/include/quantkit/cuda_attention.h has why
that is not the CPU's order)::

    kv        uint8   [pages, kv_heads, 2, 64·head_dim·bytes]   keys, then values
    kv_scale  float32 [pages, kv_heads, 2, 64]                  one scale a token (8-bit types)

and need no clearing: nothing past a sequence's end is read. Sequences are given on the device, so
that a CUDA graph can replay a step: what ``starts``, ``past``, ``lengths`` and ``pages`` hold is
not checked there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.ops import schema
from quantkit.ops.library import require_cuda_kernel

_ops = torch.ops.quantkit


def rope_store_kv_rows(
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
    kv_dtype: int | str,
    epsilon: float = 1e-6,
) -> Tensor:
    """Rotary embedding of queries and keys; keys and values go into their pages.

    A value with a NaN or an infinity is stored as zeros with a key of NaNs: every query that sees
    the token becomes NaN, no other does. Two sequences must not write to the same page.

    Args:
        qkv: bfloat16 [tokens, (heads + 2·kv_heads)·head_dim]: queries, keys, values; head_dim a
            multiple of 16, at most 128.
        q_norm, k_norm: float32 [head_dim], weights of an RMS norm of each head, or None.
        cos, sin: float32 [positions, rotary_dim/2]; dimensions i and i + rotary_dim/2 are turned by
            the angle i of the token's position, those from rotary_dim on stay.
        starts: int32 [sequences + 1], where each sequence's new tokens begin; tokens behind the
            last are left alone.
        past: int32 [sequences], tokens that its pages hold already.
        pages: int32 [sequences, P], its page numbers.
        kv, kv_scale: the pages, written.
        kv_fixed: float32 [2], calibrated scales of keys and of values, which every token gets in
            place of its own; or None.
        kv_dtype: "bfloat16", "int8" or "fp8".
        epsilon: of the norms.

    Returns:
        The queries, bfloat16 [tokens, heads, head_dim].
    """
    require_cuda_kernel("rope_store_kv_rows", qkv)
    batch = (starts, past, pages)
    cache = (kv, kv_scale, kv_fixed, schema.kv_code(kv_dtype))
    return _ops.rope_store_kv_rows.default(qkv, q_norm, k_norm, cos, sin, *batch, *cache, epsilon)


def paged_decode_attention(
    q: Tensor,
    lengths: Tensor,
    pages: Tensor,
    kv: Tensor,
    kv_scale: Tensor | None,
    kv_dtype: int | str,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Attention of one new token a sequence over its pages, its own key included.

    Products of bfloat16 with fp32 sums, softmax in fp32, probabilities rounded to bfloat16
    (flash-decoding: Dao et al., 2023). A sequence's bits depend on nothing else in the batch.

    Args:
        q: bfloat16 [sequences, heads, head_dim], head_dim 64, 80, 96 or 128; heads a multiple of
            kv_heads, which share a dequantized key and value.
        lengths: int32 [sequences], tokens in its pages, the new one included; at most 64·P.
        pages: int32 [sequences, P], its page numbers.
        kv, kv_scale, kv_dtype: the pages that :func:`rope_store_kv_rows` wrote.
        scale: of a score.
        softcap: scores become ``softcap · tanh(score / softcap)``; 0 for none.
        window: keys that a query sees, its own included; 0 for all.

    Returns:
        bfloat16 like q; zeros for a sequence of length 0.
    """
    require_cuda_kernel("paged_decode_attention", q)
    cache = (kv, kv_scale, schema.kv_code(kv_dtype))
    return _ops.paged_decode_attention.default(q, lengths, pages, *cache, scale, softcap, window)


def new_kv_rows(
    pages: int,
    kv_heads: int,
    head_dim: int,
    kv_dtype: int | str,
    device: torch.device | str = "cuda",
) -> tuple[Tensor, Tensor | None]:
    """Pages of one layer, uninitialized: ``kv``, and ``kv_scale`` or None.

    Args:
        head_dim: 64, 80, 96 or 128.
        kv_dtype: "bfloat16", "int8" or "fp8".
    """
    code = schema.kv_code(kv_dtype)
    if code == schema.KV_DTYPES["float32"]:
        raise ValueError('kv_dtype "float32": pages on a GPU hold "bfloat16", "int8" or "fp8"')
    if head_dim not in (64, 80, 96, 128):
        raise ValueError(f"head_dim {head_dim} must be 64, 80, 96 or 128")
    width = head_dim * schema.PAGE_TOKENS * schema.KV_BYTES[code]
    kv = torch.empty(pages, kv_heads, 2, width, dtype=torch.uint8, device=device)
    if schema.KV_BYTES[code] > 1:
        return kv, None
    return kv, torch.empty(
        pages, kv_heads, 2, schema.PAGE_TOKENS, device=device, dtype=torch.float32
    )
