"""Pages found again by the text that leads up to their end.

A page of keys and values depends on its own tokens and on all tokens before them, and on nothing
else (a row's bits depend neither on the batch nor on chunks). So its name is a hash chain:

    key(page) = blake2b(key(page before it) ‖ its token ids)

and the chain of a tenant begins with a hash of his name: nobody can learn from latencies what
another tenant has sent. Tokens are compared on a hit all the same, so that a collision costs a
miss and never a wrong answer.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from quantkit.models.page_pool import PagePool
from quantkit.ops.page_store import PAGE_TOKENS

_DIGEST = 32


def root_key(tenant: str) -> bytes:
    """What the chain of a tenant begins with."""
    return blake2b(tenant.encode(), digest_size=_DIGEST, person=b"tenant").digest()


def page_key(parent: bytes, token_ids: array[int]) -> bytes:
    """Name of the page of these tokens behind the page ``parent``."""
    return blake2b(parent + token_ids.tobytes(), digest_size=_DIGEST, person=b"page").digest()


def extend_keys(keys: list[bytes], tenant: str, tokens: Sequence[int]) -> None:
    """Append the names of those full pages of a text that ``keys`` does not hold yet."""
    for start in range(len(keys) * PAGE_TOKENS, len(tokens) - PAGE_TOKENS + 1, PAGE_TOKENS):
        parent = keys[-1] if keys else root_key(tenant)
        keys.append(page_key(parent, array("q", tokens[start : start + PAGE_TOKENS])))


@dataclass(frozen=True)
class _Content:
    key: bytes
    token_ids: tuple[int, ...]


class PrefixCache:
    """Full pages by name. A page that the pool hands out anew is forgotten."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._pages: dict[bytes, int] = {}
        self._contents: dict[int, _Content] = {}
        pool.on_forget = self._forget

    def __len__(self) -> int:
        return len(self._pages)

    def find(self, key: bytes, token_ids: Sequence[int]) -> int | None:
        """The page of that name, if it holds these tokens indeed."""
        page = self._pages.get(key)
        if page is None or self._contents[page].token_ids != tuple(token_ids):
            return None
        return page

    def store(self, key: bytes, token_ids: Sequence[int], page: int) -> None:
        """Name a full page. A second page of the same tokens stays its owner's alone."""
        if key not in self._pages:
            self._pages[key] = page
            self._contents[page] = _Content(key, tuple(token_ids))
            self._pool.remember(page)

    def drop(self, page: int) -> None:
        """Never hand out this page again as it is; one without a name is ignored."""
        if page in self._contents:
            self._forget(page)
            self._pool.unremember(page)

    def _forget(self, page: int) -> None:
        del self._pages[self._contents.pop(page).key]
