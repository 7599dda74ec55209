"""Random ragged batches over pages, and attention in fp64 over what the pages hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quantkit import ops

KV_DTYPES = ["float32", "bfloat16", "int8", "fp8"]
PAGE = ops.PAGE_TOKENS


def int32(values: Sequence[int] | Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32)


@dataclass
class Cache:
    """One layer's pages, and rotary tables whose angles are all 0 unless ``turn`` is called."""

    kv_dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    pages: int = 16
    positions: int = 640
    kv: Tensor = field(init=False)
    kv_scale: Tensor | None = field(init=False)
    cos: Tensor = field(init=False)
    sin: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.kv, self.kv_scale = ops.new_kv_pages(
            self.pages, self.kv_heads, self.head_dim, self.kv_dtype
        )
        self.cos = torch.ones(self.positions, self.head_dim // 2)
        self.sin = torch.zeros(self.positions, self.head_dim // 2)

    def turn(self, rotary_dim: int) -> Cache:
        angles = torch.rand(self.positions, rotary_dim // 2) * 6.28
        self.cos, self.sin = angles.cos(), angles.sin()
        return self

    def poison(self) -> Cache:
        """What another owner might have left: NaN in every type that has one, and in scales."""
        self.kv.fill_(0xFF)
        if self.kv_scale is not None:
            self.kv_scale.fill_(torch.nan)
        return self

    def random_qkv(self, tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        return torch.randn(tokens, width).to(dtype)

    def store(
        self,
        qkv: Tensor,
        past: Sequence[int],
        new: Sequence[int],
        pages: Tensor,
        norms: tuple[Tensor | None, Tensor | None] = (None, None),
        backend: str = "native",
    ) -> Tensor:
        """Queries [tokens, heads, head_dim] of sequences with ``new`` tokens behind ``past``."""
        return ops.get_backend(backend).rope_store_kv(
            qkv,
            *norms,
            self.cos,
            self.sin,
            *batch(past, new, pages),
            self.kv,
            self.kv_scale,
            self.kv_dtype,
        )

    def attend(
        self,
        q: Tensor,
        past: Sequence[int],
        new: Sequence[int],
        pages: Tensor,
        softcap: float = 0.0,
        window: int = 0,
        backend: str = "native",
    ) -> Tensor:
        return ops.get_backend(backend).paged_attention(
            q,
            *batch(past, new, pages),
            self.kv,
            self.kv_scale,
            self.kv_dtype,
            self.head_dim**-0.5,
            softcap,
            window,
        )

    def in_chunks(
        self,
        qkv: Tensor,
        chunks: Sequence[int],
        pages: Tensor,
        softcap: float = 0.0,
        window: int = 0,
    ) -> Tensor:
        """The attention of one sequence's tokens, ``chunks`` of them at a time."""
        outputs, past = [], 0
        for size in chunks:
            q = self.store(qkv[past : past + size], [past], [size], pages)
            outputs.append(self.attend(q, [past], [size], pages, softcap, window))
            past += size
        return torch.cat(outputs)

    def exact(
        self,
        q: Tensor,
        past: Sequence[int],
        new: Sequence[int],
        pages: Tensor,
        softcap: float = 0.0,
        window: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Attention in fp64 over what the pages hold; and the same of the values' magnitudes."""
        outputs, first = [], 0
        for s, (old, fresh) in enumerate(zip(past, new, strict=True)):
            tokens = old + fresh
            key, value = ops.read_kv_pages(self.kv, self.kv_scale, self.kv_dtype, pages[s], tokens)
            value = torch.cat((value, value.abs()), -1)
            group = self.heads // self.kv_heads
            key = key.double().repeat_interleave(group, 1).transpose(0, 1)
            value = value.double().repeat_interleave(group, 1).transpose(0, 1)
            query = q[first : first + fresh].double().transpose(0, 1)
            behind = torch.arange(old, tokens).unsqueeze(1) - torch.arange(tokens)
            seen = (behind >= 0) & (behind < (window or tokens))
            scale = self.head_dim**-0.5
            if softcap:
                scores = softcap * torch.tanh(query @ key.transpose(1, 2) * scale / softcap)
                y = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value
            else:
                y = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)
            outputs.append(y.transpose(0, 1))
            first += fresh
        y, mass = torch.cat(outputs).chunk(2, -1)
        return y, mass


def batch(past: Sequence[int], new: Sequence[int], pages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), torch.tensor(list(new)).cumsum(0)))
    return int32(starts), int32(list(past)), pages


def deal_pages(lengths: Sequence[int], pool: int) -> Tensor:
    """Page numbers of sequences of these lengths, drawn at random, none twice."""
    need = [-(-length // PAGE) for length in lengths]
    drawn = iter(torch.randperm(pool).tolist())
    pages = torch.full((len(need), max(need)), -1, dtype=torch.int32)
    for s, count in enumerate(need):
        pages[s, :count] = int32([next(drawn) for _ in range(count)])
    return pages


def cut(total: int, size: int) -> list[int]:
    """``total`` in chunks of ``size``, the last one shorter."""
    return [min(size, total - first) for first in range(0, total, size)]
