"""The operators of :mod:`quantkit.ops.gpu_attention` in plain torch: their oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.ops import schema
from quantkit.ops.reference_parts import VALUE_DTYPES, places, rms_norm, rope


def _rows(kv: Tensor, kv_dtype: int | str) -> Tensor:
    """A view [pages, kv_heads, 2, 64, head_dim] of pages."""
    return kv.view(VALUE_DTYPES[schema.kv_code(kv_dtype)]).unflatten(-1, (schema.PAGE_TOKENS, -1))


def read_kv_rows(
    kv: Tensor, kv_scale: Tensor | None, kv_dtype: int | str, pages: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    """What pages hold of one sequence.

    Args:
        kv, kv_scale, kv_dtype: one layer's pages.
        pages: int [P], the sequence's page numbers.
        tokens: its length, at most 64·P.

    Returns:
        Keys and values, float32 [tokens, kv_heads, head_dim] each.
    """
    page, slot = places(pages, 0, tokens)
    held = _rows(kv, kv_dtype)[page, :, :, slot].float()
    if kv_scale is not None:
        held = held * kv_scale[page, :, :, slot].unsqueeze(-1)
    return held[:, :, 0], held[:, :, 1]


def _encode(x: Tensor, code: int, fixed: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """[tokens, kv_heads, head_dim] as a page holds it, and the scales of 8-bit types."""
    if code == schema.KV_DTYPES["bfloat16"]:
        return x.to(torch.bfloat16), None
    absmax = x.abs().amax(-1, keepdim=True)
    int8 = code == schema.KV_DTYPES["int8"]
    scale = absmax / (127.5 if int8 else 448.0)
    none = scale < torch.finfo(torch.float32).tiny if int8 else scale == 0
    scale = scale.masked_fill(none, 1.0)
    if fixed is not None:
        scale = torch.where(absmax.isfinite(), fixed, scale)
    if int8:
        codes = (x * (1 / scale)).nan_to_num(nan=-128.0).clamp(-128, 127).round().to(torch.int8)
    else:
        # Adding 0 turns -0 into +0, as the activation quantizers do.
        codes = (x / scale + 0.0).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scale.squeeze(-1)


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
    code, rows = schema.kv_code(kv_dtype), _rows(kv, kv_dtype)
    kv_heads, head_dim = kv.shape[1], rows.shape[-1]
    x = qkv.float().unflatten(-1, (-1, head_dim))
    q, k, v = x.split((x.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    if q_norm is not None:
        q = rms_norm(q, q_norm, epsilon)
    if k_norm is not None:
        k = rms_norm(k, k_norm, epsilon)
    out = torch.zeros_like(q)
    for s in range(past.numel()):
        first, end, held = int(starts[s]), int(starts[s + 1]), int(past[s])
        angles = slice(held, held + end - first)
        out[first:end] = rope(q[first:end], cos[angles], sin[angles])
        key, value = rope(k[first:end], cos[angles], sin[angles]), v[first:end]
        lost = ~value.isfinite().all(-1, keepdim=True)
        page, slot = places(pages[s], held, held + end - first)
        stored = (key.masked_fill(lost, torch.nan), value.masked_fill(lost, 0.0))
        for half, values in enumerate(stored):
            codes, scale = _encode(values, code, None if kv_fixed is None else kv_fixed[half])
            rows[page, :, half, slot] = codes
            if kv_scale is not None and scale is not None:
                kv_scale[page, :, half, slot] = scale
    return out.to(qkv.dtype)


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
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros_like(q)
    for s, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        key, value = read_kv_rows(kv, kv_scale, kv_dtype, pages[s], length)
        group = q.shape[1] // key.shape[1]
        key, value = (v.to(compute).repeat_interleave(group, dim=1) for v in (key, value))
        scores = torch.einsum("hd,khd->hk", q[s].to(compute), key) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        if window > 0:
            key_position = torch.arange(length, device=q.device)
            scores = scores.masked_fill(key_position < length - window, -torch.inf)
            value = torch.where((key_position < length - window)[:, None, None], 0.0, value)
        out[s] = torch.einsum("hk,khd->hd", scores.softmax(-1), value).to(q.dtype)
    return out
