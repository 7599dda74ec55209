"""Which pages of a key-value store are whose, and which are worth keeping when nobody's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from quantkit.errors import QuantkitError
from quantkit.ops.page_store import PAGE_TOKENS


def pages_for(tokens: int) -> int:
    """Pages that so many tokens of one sequence fill."""
    return -(-tokens // PAGE_TOKENS)


@dataclass(eq=False)
class PagedSequence:
    """Tokens that have been read: where their keys and values are.

    Attributes:
        length: tokens held.
        pages: page numbers, in order; the last may be partly filled, and some behind it blank.
    """

    length: int = 0
    pages: list[int] = field(default_factory=list)


class PagePool:
    """Owner counts of pages. It knows numbers only: the store itself is the runner's.

    A page without owners is blank, or kept if somebody asked to `remember` it. Blank pages are
    handed out first, the last one back first, then kept ones, least recently used first.

    Args:
        pages: how many there are.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        #: Called with a remembered page before it is handed out for other tokens.
        self.on_forget: Callable[[int], None] = lambda page: None
        self._owners = [0] * pages
        self._blank = list(range(pages - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._remembered: set[int] = set()

    @property
    def free(self) -> int:
        """Pages without an owner, kept ones among them."""
        return len(self._blank) + len(self._kept)

    @property
    def used(self) -> int:
        """Pages with an owner."""
        return self.pages - self.free

    def is_free(self, page: int) -> bool:
        """Nobody owns it."""
        return self._owners[page] == 0

    def take(self) -> int:
        """A page for new tokens, with one owner.

        Raises:
            QuantkitError: no page is free.
        """
        if self._blank:
            page = self._blank.pop()
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            self._remembered.discard(page)
            self.on_forget(page)
        else:
            raise QuantkitError("the key-value cache has no free page")
        self._owners[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more owner of a page that is owned or kept."""
        if page in self._kept:
            del self._kept[page]
        self._owners[page] += 1

    def give_back(self, page: int) -> None:
        """One owner fewer."""
        self._owners[page] -= 1
        if self._owners[page]:
            return
        if page in self._remembered:
            self._kept[page] = None
        else:
            self._blank.append(page)

    def remember(self, page: int) -> None:
        """Keep a page's tokens readable after its last owner, for as long as there is room."""
        self._remembered.add(page)

    def unremember(self, page: int) -> None:
        """The opposite, for a page that is owned: it will be blank."""
        self._remembered.discard(page)

    def extend(self, sequence: PagedSequence, tokens: int) -> bool:
        """Take the pages that a sequence needs to hold so many tokens in all.

        Returns:
            False, and nothing changed, if there are too few.
        """
        missing = pages_for(tokens) - len(sequence.pages)
        if missing <= 0:  # nearly always: a token a step
            return True
        if missing > self.free:
            return False
        sequence.pages += [self.take() for _ in range(missing)]
        return True

    def truncate(self, sequence: PagedSequence, length: int) -> None:
        """Forget a sequence's tokens from position ``length`` on, and its pages behind them.

        What is cut from a page stays in it, unseen: its values are finite, and the next tokens
        overwrite it (csrc/cpu/kv_pages.h).

        Raises:
            QuantkitError: there are fewer tokens, or others read the page that would be cut.
        """
        if not 0 <= length <= sequence.length:
            raise QuantkitError(f"a sequence of {sequence.length} tokens cannot be cut to {length}")
        whole = pages_for(length)
        if length < sequence.length and length % PAGE_TOKENS:
            page = sequence.pages[whole - 1]
            if self._owners[page] > 1 or page in self._remembered:
                raise QuantkitError(f"page {page} is shared and cannot be cut to {length} tokens")
        # From the end, so that of the kept pages the end of a text goes before its beginning.
        while len(sequence.pages) > whole:
            self.give_back(sequence.pages.pop())
        sequence.length = length

    def release(self, sequence: PagedSequence) -> None:
        """Give back a sequence's pages. It holds no token afterwards."""
        self.truncate(sequence, 0)
