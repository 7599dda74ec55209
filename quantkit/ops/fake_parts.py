"""Shapes and dtypes of the parts of a forward pass, for ``torch.compile`` and meta tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.ops import schema


@torch.library.register_fake("quantkit::add_rms_norm")
def _add_rms_norm(
    residual: Tensor, branch: Tensor | None, weight: Tensor, epsilon: float, out_dtype: int
) -> Tensor:
    return residual.new_empty(residual.shape, dtype=schema.CODE_DTYPES[out_dtype])


@torch.library.register_fake("quantkit::gated_activation")
def _gated_activation(gate_up: Tensor, kind: int) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@torch.library.register_fake("quantkit::hadamard")
def _hadamard(x: Tensor, factor: Tensor, order: int) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("quantkit::embed")
def _embed(tokens: Tensor, table: Tensor, scale: float) -> Tensor:
    return table.new_empty((*tokens.shape, table.shape[1]), dtype=torch.float32)


@torch.library.register_fake("quantkit::rope_store_kv")
def _rope_store_kv(
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
    kv_dtype: int,
    epsilon: float,
) -> Tensor:
    head_dim = kv.shape[3] // (schema.PAGE_TOKENS * schema.KV_BYTES[kv_dtype])
    tokens, width = qkv.shape
    return qkv.new_empty((tokens, width // head_dim - 2 * kv.shape[1], head_dim))


@torch.library.register_fake("quantkit::paged_attention")
def _paged_attention(
    q: Tensor,
    starts: Tensor,
    past: Tensor,
    pages: Tensor,
    kv: Tensor,
    kv_scale: Tensor | None,
    kv_dtype: int,
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    return q.new_empty(q.shape)
