"""Sequences whose keys and values live in shared pages, and forward passes over many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.models.decoder import Batch, Decoder
from quantkit.models.page_pool import PagedSequence, PagePool, pages_for
from quantkit.models.pass_logits import PassLogits
from quantkit.ops.page_store import PAGE_TOKENS

__all__ = ["PagedRunner", "PagedSequence", "Work", "pages_for"]


@dataclass(frozen=True)
class Work:
    """New tokens of one sequence. ``all_logits``: of each token, not of the last alone."""

    sequence: PagedSequence
    token_ids: Sequence[int]
    all_logits: bool = False


class PagedRunner:
    """A decoder with a store of pages.

    A page may belong to several sequences (`fork`); it is free again when the last lets go.

    Args:
        decoder: the model.
        pages: how many pages there are.
        kept_rows: so many rows of logits are written to the same memory each time, where a pass
            asks for no more: they hold until the next one. New memory is cleared by the system a
            page at a time, inside the pass.
    """

    def __init__(self, decoder: Decoder, pages: int, *, kept_rows: int = 0) -> None:
        self.decoder = decoder
        self._kept = torch.empty(kept_rows, decoder.shape.vocab, dtype=torch.float32)
        self.cache = decoder.new_cache(pages)
        self.pool = PagePool(pages)

    @property
    def free_pages(self) -> int:
        return self.pool.free

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page over all layers."""
        return self.cache.page_nbytes

    def fork(self, sequence: PagedSequence) -> PagedSequence:
        """A second sequence with the same tokens: full pages are shared, a partial one copied."""
        whole = sequence.length // PAGE_TOKENS
        pages = sequence.pages[:whole]
        for page in pages:
            self.pool.share(page)
        child = PagedSequence(sequence.length, list(pages))
        if sequence.length % PAGE_TOKENS:
            child.pages.append(self.pool.take())
            self.cache.copy_page(sequence.pages[whole], child.pages[-1])
        return child

    def truncate(self, sequence: PagedSequence, length: int) -> None:
        """Forget a sequence's tokens from position ``length`` on; see `PagePool.truncate`."""
        self.pool.truncate(sequence, length)

    def release(self, sequence: PagedSequence) -> None:
        """Give back a sequence's pages. It holds no token afterwards."""
        self.pool.release(sequence)

    def logits(self, works: Sequence[Work]) -> PassLogits:
        """Append each work's tokens to its sequence.

        Returns:
            fp32 logits of each work: ``[1, vocab]`` after its last token, or ``[n, vocab]``.

        Raises:
            QuantkitError: no page is free, or an argument is out of range. No sequence changed.
        """
        rows: list[int] = []
        counts = []
        start = 0
        for work in works:
            end = start + len(work.token_ids)
            first = start if work.all_logits else end - 1
            rows += range(first, end)
            counts.append(end - first)
            start = end
        batch = self._batch(works, rows)
        kept = self._kept[: len(rows)] if len(rows) <= len(self._kept) else None
        logits = self.decoder.logits(batch, self.cache, kept)
        self._grow(works)
        return PassLogits(logits, counts)

    def states(self, works: Sequence[Work]) -> list[Tensor]:
        """The same for final states: fp32 ``[n, hidden]`` of each work, for `Decoder.head`."""
        states = self.decoder.states(self._batch(works, None), self.cache)
        self._grow(works)
        return list(states.split([len(work.token_ids) for work in works]))

    def _batch(self, works: Sequence[Work], rows: list[int] | None) -> Batch:
        needs = [
            max(0, pages_for(w.sequence.length + len(w.token_ids)) - len(w.sequence.pages))
            for w in works
        ]
        if sum(needs) > self.pool.free:
            raise QuantkitError(
                f"the key-value cache has {self.pool.free} free pages of {PAGE_TOKENS} tokens, "
                f"{sum(needs)} are needed"
            )
        for work in works:
            self.pool.extend(work.sequence, work.sequence.length + len(work.token_ids))
        return Batch.of(
            [w.token_ids for w in works],
            [w.sequence.length for w in works],
            [w.sequence.pages for w in works],
            rows=rows,
        )

    def _grow(self, works: Sequence[Work]) -> None:
        for work in works:
            work.sequence.length += len(work.token_ids)
