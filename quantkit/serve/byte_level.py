"""Tokens of byte-level vocabularies (GPT-2's and its heirs') to text, a token at a time.

Such a token stands for the same bytes wherever it is, so that nothing has to be decoded twice:
what its neighbours decide is only whether a character is complete.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast


class ByteLevelVocabulary:
    """What each token of a byte-level vocabulary stands for, as tokenizers' ``ByteLevel`` decoder
    has it.

    Args:
        backend: see `of`.
        skip_special_tokens: whether they stand for nothing.
    """

    def __init__(self, backend: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder().values() if skip_special_tokens else ()
        self._skipped = {token.content for token in added if token.special}
        self._known: dict[int, bytes] = {}

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerFast, *, skip_special_tokens: bool
    ) -> ByteLevelVocabulary | None:
        """That of a tokenizer, made once; None if it is not byte-level alone."""
        if not isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
            return None
        made = _MADE.setdefault(tokenizer, {})
        if skip_special_tokens not in made:
            made[skip_special_tokens] = cls(
                tokenizer.backend_tokenizer, skip_special_tokens=skip_special_tokens
            )
        return made[skip_special_tokens]

    def __getitem__(self, token_id: int) -> bytes:
        """A token that the vocabulary does not have stands for nothing."""
        found = self._known.get(token_id)
        return self._look_up(token_id) if found is None else found

    def _look_up(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        self._known[token_id] = found = b"" if token in self._skipped else spelled(token)
        return found


_MADE: WeakKeyDictionary[PreTrainedTokenizerFast, dict[bool, ByteLevelVocabulary]] = (
    WeakKeyDictionary()
)


class ByteLevelText:
    """The text of a growing answer: whole characters as they complete, U+FFFD where none can.

    Args:
        vocabulary: of the tokenizer.
        context: tokens in front of the answer, the last of which may have begun a character.
        hidden: tokens that stand for nothing.
    """

    def __init__(
        self, vocabulary: ByteLevelVocabulary, context: Iterable[int], hidden: frozenset[int]
    ) -> None:
        self._vocabulary = vocabulary
        self._hidden = hidden
        self._begun = b""
        for token_id in context:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The characters that a token completes."""
        if token_id in self._hidden:
            return ""
        given = self._begun + self._vocabulary[token_id]
        text, used = codecs.utf_8_decode(given, "replace", False)
        self._begun = given[used:]
        return text

    def finish(self) -> str:
        """What stands for a character that was not completed."""
        text, _ = codecs.utf_8_decode(self._begun, "replace", True)
        self._begun = b""
        return text


def spelled(token: str) -> bytes:
    """The bytes that a token spells, one a character; text that spells none stands for itself."""
    try:
        return bytes(map(_BYTES.__getitem__, token))
    except KeyError:
        return token.encode()


def _alphabet() -> dict[str, int]:
    """GPT-2's (Radford et al. 2019; ``bytes_to_unicode`` of its code): what is printable in Latin-1
    stands for itself, and the other bytes, in their order, for the characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    found = {chr(byte): byte for byte in printable}
    return found | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _alphabet()
