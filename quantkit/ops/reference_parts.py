"""The parts of a forward pass in plain torch: the oracle of the native ones, same signatures.

Computed in fp32, in fp64 where the input is float64. Pages are written and read by indexing, one
sequence at a time.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from quantkit.ops import schema
from quantkit.ops.reference import quantize_int8_per_group

VALUE_DTYPES = {0: torch.float32, 1: torch.bfloat16, 2: torch.int8, 3: torch.float8_e4m3fn}


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight.to(x.dtype)


def add_rms_norm(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    epsilon: float,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    if branch is not None:
        residual += branch.to(residual.dtype)
    return rms_norm(residual, weight, epsilon).to(out_dtype)


def gated_activation(gate_up: Tensor, kind: int | str) -> Tensor:
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    if schema.gate_code(kind) == schema.GATES["silu"]:
        gate = torch.nn.functional.silu(gate)
    else:
        gate = torch.nn.functional.gelu(gate, approximate="tanh")
    return (gate * up).to(gate_up.dtype)


def hadamard(x: Tensor, factor: Tensor, order: int) -> Tensor:
    """Differentiable in x, as plain torch is; on any device."""
    base = factor.shape[0]
    runs = _wide(x).unflatten(-1, (-1, order // base, base))
    runs = runs @ factor[:, :base].to(runs)
    return (_sylvester(order // base).to(runs) @ runs).reshape(x.shape).to(x.dtype)


@cache
def _sylvester(order: int) -> Tensor:
    """fp64 ``[order, order]`` for a power of two: −1 where i and j share an odd number of bits."""
    signs = torch.ones(1, 1, dtype=torch.float64)
    while len(signs) < order:
        signs = torch.cat((torch.cat((signs, signs), 1), torch.cat((signs, -signs), 1)))
    return signs


def embed(tokens: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    return _wide(table[tokens.long()]) * scale


def _halves(kv: Tensor, kv_dtype: int | str) -> tuple[Tensor, Tensor]:
    """Views of the pages' keys [pages, kv_heads, head_dim/c, 64, c] and values
    [pages, kv_heads, 64/c, head_dim, c], c values in a word of four bytes.
    """
    code = schema.kv_code(kv_dtype)
    c = 4 // schema.KV_BYTES[code]
    head_dim = kv.shape[-1] // schema.KV_BYTES[code] // schema.PAGE_TOKENS
    held = kv.view(VALUE_DTYPES[code])
    keys = held[:, :, 0].unflatten(-1, (head_dim // c, schema.PAGE_TOKENS, c))
    values = held[:, :, 1].unflatten(-1, (schema.PAGE_TOKENS // c, head_dim, c))
    return keys, values


def places(pages: Tensor, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Page and slot of the tokens first..end-1 of a sequence with these page numbers."""
    position = torch.arange(first, end)
    return pages.long()[position // schema.PAGE_TOKENS], position % schema.PAGE_TOKENS


def read_kv_pages(
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
    keys, values = _halves(kv, kv_dtype)
    page, slot = places(pages, 0, tokens)
    c = keys.shape[-1]
    # An index in front of a slice and one behind it put the tokens first.
    key = keys[page, :, :, slot].flatten(-2).float()
    value = values[page, :, slot // c, :, slot % c].float()
    if kv_scale is None:
        return key, value
    scale = kv_scale[page, :, :, slot].unsqueeze(-1)
    return key * scale[:, :, 0], value * scale[:, :, 1]


def _encode(x: Tensor, code: int) -> tuple[Tensor, Tensor | None]:
    """[tokens, kv_heads, head_dim] as a page holds it, and the scales of 8-bit types."""
    if code == schema.KV_DTYPES["int8"]:
        codes, scale = quantize_int8_per_group(x, x.shape[-1])
        return codes, scale.squeeze(-1)
    if code == schema.KV_DTYPES["fp8"]:
        scale = x.abs().amax(-1, keepdim=True) / 448
        scale = torch.where(scale == 0, 1.0, scale)
        # Adding 0 turns -0 into +0, as the activation quantizers do.
        codes = (x / scale + 0.0).clamp(-448, 448).to(torch.float8_e4m3fn)
        return codes, scale.squeeze(-1)
    return x.to(VALUE_DTYPES[code]), None


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
    code = schema.kv_code(kv_dtype)
    keys, values = _halves(kv, code)
    kv_heads, c, head_dim = kv.shape[1], keys.shape[-1], values.shape[-2]
    x = _wide(qkv).unflatten(-1, (-1, head_dim))
    q, k, v = x.split((x.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    if q_norm is not None:
        q = rms_norm(q, q_norm, epsilon)
    if k_norm is not None:
        k = rms_norm(k, k_norm, epsilon)
    rotated = []
    for s in range(past.numel()):
        first, end = int(starts[s]), int(starts[s + 1])
        held = int(past[s])
        angles = slice(held, held + end - first)
        turned_q = rope(q[first:end], cos[angles], sin[angles])
        rotated.append(turned_q)
        key, value = rope(k[first:end], cos[angles], sin[angles]), v[first:end]
        lost = ~(value.to(torch.bfloat16).isfinite().all(-1, keepdim=True))
        key, value = key.masked_fill(lost, torch.nan), value.masked_fill(lost, 0.0)
        page, slot = places(pages[s], held, held + end - first)
        values[page[slot == 0]] = 0
        for view, row, half in ((keys, key, 0), (values, value, 1)):
            held_codes, scale = _encode(row.float(), code)
            if half == 0:
                view[page, :, :, slot] = held_codes.unflatten(-1, (-1, c))
            else:
                view[page, :, slot // c, :, slot % c] = held_codes
            if kv_scale is not None and scale is not None:
                kv_scale[page, :, half, slot] = scale
    return torch.cat(rotated).to(qkv.dtype) if rotated else q.to(qkv.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, head_dim] turned by angles [tokens, rotary_dim/2]."""
    half = cos.shape[-1]
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


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
    out = torch.empty_like(q)
    for s in range(past.numel()):
        first, end = int(starts[s]), int(starts[s + 1])
        tokens = int(past[s]) + end - first
        key, value = read_kv_pages(kv, kv_scale, kv_dtype, pages[s], tokens)
        query = _wide(q[first:end])
        group = q.shape[1] // key.shape[1]
        key = key.to(query.dtype).repeat_interleave(group, dim=1)
        value = value.to(query.dtype).repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(int(past[s]), tokens).unsqueeze(-1)
        behind = position - torch.arange(tokens)
        hidden = (behind < 0) | (behind >= (window if window > 0 else tokens))
        scores = scores.masked_fill(hidden, -torch.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
        out[first:end] = mixed.to(q.dtype)
    return out
