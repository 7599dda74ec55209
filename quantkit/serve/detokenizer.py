"""From a growing list of token ids to text that is safe to show.

Two things must not leak: half of a character (tokens may split UTF-8 sequences) and the
beginning of a stop string that may still complete. Both are held back until they are decided.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from quantkit.serve.byte_level import ByteLevelText, ByteLevelVocabulary

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Prompt tokens decoded in front of the answer, so that a tokenizer which strips the space of
#: the first word does not strip it from the middle of a sentence.
CONTEXT_TOKENS = 5
#: No character spans so many tokens: beyond this, undecodable bytes are shown as they are.
MAX_PENDING_TOKENS = 64
REPLACEMENT = "\ufffd"


class Detokenizer:
    """Incremental decoding of one answer; ``stop`` strings count behind ``min_tokens`` tokens.

    The text of special tokens is left out, or that of ``hidden`` ones if they are given.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: tuple[int, ...],
        stop: tuple[str, ...] = (),
        min_tokens: int = 0,
        hidden: frozenset[int] | None = None,
    ) -> None:
        self._text = growing_text(tokenizer, prompt_ids[-CONTEXT_TOKENS:], hidden)
        self._deaf = min_tokens  # tokens whose text no stop string is looked for in
        self.stop = StopStrings(stop)

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that became safe. Check `stopped` afterwards."""
        new = self._text.push(token_id)
        if self._deaf:
            self._deaf -= 1
            return new
        return self.stop.push(new)

    def finish(self) -> str:
        """The text still held back; nothing after a stop string was found."""
        rest = self._text.finish()
        return (rest if self._deaf else self.stop.push(rest)) + self.stop.finish()

    @property
    def stopped(self) -> bool:
        return self.stop.found


def growing_text(
    tokenizer: PreTrainedTokenizerBase, context: Sequence[int], hidden: frozenset[int] | None
) -> ByteLevelText | WindowedText:
    """The text behind ``context``: by bytes where tokens are bytes, or by what decoding says."""
    skip = hidden is None
    if backend_decodes(tokenizer):
        vocabulary = ByteLevelVocabulary.of(tokenizer, skip_special_tokens=skip)
        if vocabulary is not None:
            return ByteLevelText(vocabulary, context, hidden or frozenset())
    read = reader(tokenizer, skip_special_tokens=skip)
    return WindowedText(read, context, hidden or frozenset())


class WindowedText:
    """The text of a growing answer, by any tokenizer.

    Decodes a short window ``ids[start:]`` each time and emits what is new in it, because a
    token's text depends on its neighbours and decoding everything anew would be quadratic.
    """

    def __init__(
        self, read: Callable[[Sequence[int]], str], context: Sequence[int], hidden: frozenset[int]
    ) -> None:
        self._read = read
        self._hidden = hidden
        self._window = list(context)
        self._shown = self._decode().rstrip(REPLACEMENT)
        # Tokens at the front of the window that are context only: their text is out already.
        self._context = len(self._window)

    def push(self, token_id: int) -> str:
        """The text that a token makes safe."""
        self._window.append(token_id)
        text = self._decode()
        overdue = len(self._window) > self._context + MAX_PENDING_TOKENS
        safe = text if overdue else text.rstrip(REPLACEMENT)
        new = safe[len(self._shown) :]
        if safe == text:
            # A clean boundary: the tokens since the last one become the context of the next.
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._shown = self._decode()
        elif new:
            self._shown = safe
        return new

    def finish(self) -> str:
        """The text still held back."""
        return self._decode()[len(self._shown) :]

    def _decode(self) -> str:
        return self._read([token for token in self._window if token not in self._hidden])


def reader(
    tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool
) -> Callable[[Sequence[int]], str]:
    """Tokens to text, as ``tokenizer.decode`` without any cleaning up.

    Where that only passes on what the tokenizers library says, the library itself is asked: what
    lies between is two thirds of the time, twice a token.
    """
    if backend_decodes(tokenizer):
        decode = tokenizer.backend_tokenizer.decode
        return partial(decode, skip_special_tokens=skip_special_tokens)
    plain: Any = tokenizer
    return partial(
        plain.decode,
        skip_special_tokens=skip_special_tokens,
        clean_up_tokenization_spaces=False,
    )


def backend_decodes(tokenizer: PreTrainedTokenizerBase) -> TypeGuard[PreTrainedTokenizerFast]:
    """Whether ``decode`` only passes on what the tokenizers library says."""
    kind: Any = type(tokenizer)
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.decode is PreTrainedTokenizerBase.decode
        and kind._decode is PreTrainedTokenizerFast._decode
    )


class StopStrings:
    """Cuts a stream of text at the first stop string to complete.

    The result depends only on the text, not on how it is split into pieces: of several matches
    the one that ends first wins, and of those the longest.
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self.strings = strings
        self.found = False
        self._held = ""

    def push(self, text: str) -> str:
        """Add text; returns what can no longer be part of a stop string."""
        if self.found:
            return ""
        self._held += text
        matches = []
        for string in self.strings:
            start = self._held.find(string)
            if start >= 0:
                matches.append((start + len(string), start))
        if matches:
            self.found = True
            safe, self._held = self._held[: min(matches)[1]], ""
            return safe
        keep = self._undecided()
        safe, self._held = self._held[: len(self._held) - keep], self._held[-keep:] if keep else ""
        return safe

    def finish(self) -> str:
        """No more text will come: what was held back is text after all."""
        rest, self._held = self._held, ""
        return rest

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(string) for string in self.strings), default=1)
        for length in range(min(longest - 1, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(string.startswith(end) for string in self.strings):
                return length
        return 0
