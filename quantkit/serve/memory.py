"""Who may hold keys and values: what the scheduler asks before a sequence runs on.

`PageMemory` gives pages of the native decoder's store as a sequence grows and shares those of
texts that begin alike. `ReservedMemory` is for transformers' modules: their caches are neither
paged nor independent of how a prompt was cut, so whoever starts has room for his longest answer.
"""

from __future__ import annotations

import logging
from typing import Protocol

from quantkit.models.page_pool import PagedSequence, PagePool, pages_for
from quantkit.ops.page_store import PAGE_TOKENS
from quantkit.serve.counters import Counters
from quantkit.serve.prefix_cache import PrefixCache, extend_keys
from quantkit.serve.request import Sequence
from quantkit.serve.runner import DecoderRunner, ModuleRunner, Runner

logger = logging.getLogger(__name__)


class Memory(Protocol):
    """Room for the tokens of running sequences.

    Attributes:
        growing: sequences take more as they grow and can be read again to the bit: they may be
            stopped for each other, and their prompts may be cut anywhere.
        total: tokens that there is room for.
    """

    growing: bool
    total: int

    @property
    def used(self) -> int:
        """Tokens that there is no more room for."""
        ...

    def admit(self, sequence: Sequence, spare: int) -> bool:
        """Give a sequence a cache with room to read what it knows; False if there is none.

        ``spare``: pages that must stay free beside it, for the others that run.
        """
        ...

    def reuse(self, sequence: Sequence) -> None:
        """Skip what another sequence has read meanwhile; before a chunk of a prompt."""
        ...

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Make room for so many tokens behind those computed; False if there is none."""
        ...

    def settle(self, sequence: Sequence) -> None:
        """Hold what is ``sequence.computed`` and no more, now that it is known to be sound."""
        ...

    def release(self, sequence: Sequence, *, sound: bool = True) -> None:
        """Take back all that a sequence holds, if anything; nothing unsound is reused."""
        ...


def make_memory(
    runner: DecoderRunner | ModuleRunner,
    kv_tokens: int,
    counters: Counters,
    *,
    prefix_caching: bool,
) -> Memory:
    """The memory that fits a runner with room for so many tokens."""
    if isinstance(runner, DecoderRunner):
        return PageMemory(runner.pool, counters, prefix_caching=prefix_caching)
    if prefix_caching:
        logger.info("no prefix cache: transformers' modules keep each request's own")
    return ReservedMemory(runner, kv_tokens)


class ReservedMemory:
    """Accountant of tokens: prompt and longest answer of each sequence that runs."""

    growing = False

    def __init__(self, runner: Runner, total: int) -> None:
        self.total = total
        self._runner = runner
        self._reserved: dict[Sequence, int] = {}

    @property
    def used(self) -> int:
        return sum(self._reserved.values())

    def admit(self, sequence: Sequence, spare: int) -> bool:
        tokens = sequence.request.max_length
        if self.used + tokens > self.total:
            return False
        self._reserved[sequence] = tokens
        sequence.cache = self._runner.new_cache()
        return True

    def reuse(self, sequence: Sequence) -> None:
        pass

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        return True

    def settle(self, sequence: Sequence) -> None:
        pass

    def release(self, sequence: Sequence, *, sound: bool = True) -> None:
        if self._reserved.pop(sequence, None) is not None:
            self._runner.release(sequence.cache)
            sequence.cache = None


class PageMemory:
    """Pages, taken one by one.

    Args:
        pool: the pages of the runner's store.
        counters: where prefix hits are counted.
        prefix_caching: keep full pages for later texts with the same beginning.
    """

    growing = True

    def __init__(self, pool: PagePool, counters: Counters, *, prefix_caching: bool = True) -> None:
        self.total = pool.pages * PAGE_TOKENS
        self.prefix = PrefixCache(pool) if prefix_caching else None
        self._pool = pool
        self._counters = counters

    @property
    def used(self) -> int:
        return self._pool.used * PAGE_TOKENS

    def admit(self, sequence: Sequence, spare: int) -> bool:
        hits = self._hits(sequence, 0)
        # One token more than is known, so that whoever starts can say something.
        tokens = min(len(sequence.tokens) + 1, sequence.request.max_length)
        # Kept pages count as free until they are shared.
        kept = sum(self._pool.is_free(page) for page in hits)
        if pages_for(tokens) - len(hits) + spare > self._pool.free - kept:
            return False
        for page in hits:
            self._pool.share(page)
        sequence.cache = PagedSequence(len(hits) * PAGE_TOKENS, hits)
        sequence.computed = sequence.cache.length
        self._pool.extend(sequence.cache, tokens)
        if self.prefix is not None and not sequence.preempted:
            self._counters.prefix_queries += len(sequence.request.prompt_ids)
            self._count_hits(sequence, sequence.computed)
        return True

    def reuse(self, sequence: Sequence) -> None:
        cache, done = sequence.cache, sequence.computed // PAGE_TOKENS
        if sequence.computed % PAGE_TOKENS:
            return
        hits = self._hits(sequence, done)
        for i, page in enumerate(hits, start=done):
            self._pool.share(page)
            self._pool.give_back(cache.pages[i])
            cache.pages[i] = page
        cache.length = sequence.computed = sequence.computed + len(hits) * PAGE_TOKENS
        if not sequence.preempted:
            self._count_hits(sequence, len(hits) * PAGE_TOKENS)

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        return self._pool.extend(sequence.cache, sequence.computed + tokens)

    def settle(self, sequence: Sequence) -> None:
        cache = sequence.cache
        if cache.length != sequence.computed:
            self._pool.truncate(cache, sequence.computed)
        if self.prefix is None:
            return
        full = sequence.computed // PAGE_TOKENS
        extend_keys(sequence.page_keys, sequence.request.tenant, sequence.tokens)
        for i in range(sequence.stored_pages, full):
            tokens = sequence.tokens[i * PAGE_TOKENS : (i + 1) * PAGE_TOKENS]
            self.prefix.store(sequence.page_keys[i], tokens, cache.pages[i])
        sequence.stored_pages = full

    def release(self, sequence: Sequence, *, sound: bool = True) -> None:
        if sequence.cache is None:
            return
        if self.prefix is not None and not sound:
            for page in sequence.cache.pages:
                self.prefix.drop(page)
        self._pool.release(sequence.cache)
        sequence.cache, sequence.stored_pages = None, 0

    def _hits(self, sequence: Sequence, first: int) -> list[int]:
        """Kept pages of the text from page ``first`` on. At least one token is left to compute."""
        if self.prefix is None or sequence.request.sampling.scores_prompt:
            return []  # whoever scores a prompt needs the logits of each of its tokens
        extend_keys(sequence.page_keys, sequence.request.tenant, sequence.tokens)
        hits: list[int] = []
        for i in range(first, (len(sequence.tokens) - 1) // PAGE_TOKENS):
            tokens = sequence.tokens[i * PAGE_TOKENS : (i + 1) * PAGE_TOKENS]
            page = self.prefix.find(sequence.page_keys[i], tokens)
            if page is None:
                break
            hits.append(page)
        return hits

    def _count_hits(self, sequence: Sequence, tokens: int) -> None:
        sequence.cached_tokens += tokens
        self._counters.prefix_hits += tokens
