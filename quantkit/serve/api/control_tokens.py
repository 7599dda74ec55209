"""Keys from clients that could become control tokens in a chat template's output.

transformers encodes control tokens in strings of messages and tools as text, but leaves the keys
of objects as they are, and templates write keys out: of a tool's schema, of a call's arguments. A
template may also put a key between brackets of its own, ``'<' ~ key ~ '>'``, and so complete a
token of which the key is a part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantkit.serve.request import RequestError, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Of all keys of a request that are more than a word: looking through them takes time.
MAX_KEY_CHARACTERS = 64 * 1024
_WORD = re.compile(r"[\w-]*")
#: A template that writes something between angle brackets: a word may be all that a token lacks.
_GLUES = re.compile(r"""<(?:['"]\s*[~+]|\{\{)""")


class KeyGuard:
    """Refuses keys that are, hold, or could complete a control token.

    Args:
        tokenizer: the model's.
        template: its chat template; of added tokens that are not special, those it writes count.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        tokens = {
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special or (token.content in template and not token.content.isspace())
        }
        self._whole = re.compile("|".join(map(re.escape, sorted(tokens))) or r"(?!)")
        self._inner = {token[1:-1] for token in tokens} if _GLUES.search(template) else set()
        self._parts = "\0".join(sorted(tokens))
        self._longest = max(map(len, tokens), default=0)
        sizes = [(token, size) for token in tokens for size in range(1, len(token))]
        self._heads = {token[:size] for token, size in sizes if not _is_word(token[:size])}
        self._tails = {token[-size:] for token, size in sizes if not _is_word(token[-size:])}

    def check(self, value: object, param: str) -> None:
        """Raise `RequestError` about ``param`` if such a key is anywhere in ``value``."""
        left = MAX_KEY_CHARACTERS
        for key in _keys(value):
            if not _is_word(key):
                left -= len(key)
                require(left >= 0, param, f"keys hold over {MAX_KEY_CHARACTERS} characters")
            if self._completes(key):
                raise RequestError(
                    f"{param}: the key {key[:64]!r} could become a control token of this model",
                    param=param,
                    remedy="rename it",
                )

    def _completes(self, key: str) -> bool:
        if _is_word(key):
            return key != "" and key in self._inner
        sizes = range(1, min(len(key), self._longest) + 1)
        return (
            self._whole.search(key) is not None
            or key in self._parts
            or any(key[-size:] in self._heads or key[:size] in self._tails for size in sizes)
        )


def _keys(value: object) -> Iterator[str]:
    level = [value]
    while level:
        item = level.pop()
        if isinstance(item, dict):
            yield from map(str, item)
            level += item.values()
        elif isinstance(item, list | tuple):
            level += item


def _is_word(text: str) -> bool:
    return _WORD.fullmatch(text) is not None
