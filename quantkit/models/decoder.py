"""A model as one native call a forward pass, and what such a pass reads."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from quantkit.ops.decoder import NativeDecoder
from quantkit.ops.page_store import PageStore


@dataclass(frozen=True)
class Batch:
    """New tokens of several sequences, for one forward pass. All arrays are of C ints.

    A decode step has just streamed the model through the caches, so that every Python object that
    it touches next is cold: these are the lightest there are.

    Attributes:
        tokens: ids, sequence after sequence ``[tokens]``.
        starts: where each sequence's tokens begin ``[sequences + 1]``.
        past: tokens that a sequence's pages hold already ``[sequences]``.
        pages: page numbers ``[sequences, page_stride]``, row after row.
        page_stride: pages of the longest sequence.
        logit_rows: new tokens whose logits are wanted, ascending; None for none.
    """

    tokens: array[int]
    starts: array[int]
    past: array[int]
    pages: array[int]
    page_stride: int
    logit_rows: array[int] | None = None

    @staticmethod
    def of(
        tokens: Sequence[Sequence[int]],
        past: Sequence[int],
        pages: Sequence[Sequence[int]],
        *,
        rows: Sequence[int] | None = None,
    ) -> Batch:
        """A batch from lists; ``rows`` are the new tokens whose logits are wanted."""
        starts = array("i", [0])
        flat = array("i")
        for ids in tokens:
            flat.extend(ids)
            starts.append(len(flat))
        width = max(map(len, pages))
        numbers = array("i")
        for row in pages:
            numbers.extend(row)
            if len(row) < width:
                numbers.extend([0] * (width - len(row)))
        return Batch(
            tokens=flat,
            starts=starts,
            past=array("i", past),
            pages=numbers,
            page_stride=width,
            logit_rows=None if rows is None else array("i", rows),
        )


class Decoder:
    """A model as one native call a forward pass.

    Attributes:
        numerics: how products are computed, for fingerprints: each weight format with what its
            activations are, such as ``w4-int8g64+int8-int8g32``.
        shape: sizes.
        kv_dtype: what its caches hold; ``auto`` is the model's own.
    """

    def __init__(self, native: NativeDecoder, numerics: str, kv_dtype: str = "auto") -> None:
        self.native = native
        self.numerics = numerics
        self.shape = native.shape
        self.kv_dtype = kv_dtype

    def with_kv_dtype(self, dtype: str) -> Decoder:
        """The same decoder, whose caches hold another type."""
        return Decoder(self.native, self.numerics, dtype)

    def new_cache(self, pages: int) -> PageStore:
        """An empty key-value store of so many pages of `quantkit.ops.page_store.PAGE_TOKENS`."""
        return self.native.new_cache(pages, self.kv_dtype)

    def token_nbytes(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        return self.native.token_nbytes(self.kv_dtype)

    def logits(self, batch: Batch, cache: PageStore, out: Tensor | None = None) -> Tensor:
        """fp32 logits ``[logit rows, vocab]``, in ``out`` if given; keys and values go into the
        cache."""
        found, _ = self.native.forward(
            batch.tokens,
            batch.starts,
            batch.past,
            batch.pages,
            batch.page_stride,
            cache,
            logit_rows=batch.logit_rows,
            logits=out,
        )
        assert found is not None, "the batch names no logit rows"
        return found

    def states(self, batch: Batch, cache: PageStore) -> Tensor:
        """fp32 final states ``[tokens, hidden]``, for `head`."""
        _, found = self.native.forward(
            batch.tokens,
            batch.starts,
            batch.past,
            batch.pages,
            batch.page_stride,
            cache,
            states=True,
        )
        assert found is not None
        return found

    def head(self, states: Tensor) -> Tensor:
        """fp32 logits ``[rows, vocab]`` of states."""
        return self.native.head(states)
