"""Answers that follow a grammar: which tokens may come next, by llguidance.

A grammar is compiled once and kept, least recently used ones go first; each answer walks through
it with a matcher of its own. What is compiled comes from clients, so its size, its depth and the
work that a step may cost are bounded.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.serve.request import RequestError, StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

MAX_GRAMMARS = 64
#: Characters of a compiler's message that a client gets to see.
MAX_REASON = 300
#: JSON without a schema; an object, as OpenAI's ``json_object`` promises.
ANY_OBJECT = '{"type": "object"}'
_BITS = torch.arange(32, dtype=torch.int32)


class Constraint:
    """One answer's way through a grammar.

    Args:
        matcher: its own, not shared.
        end_ids: tokens that may end the answer where the grammar is complete.
    """

    def __init__(self, matcher: LLMatcher, end_ids: Collection[int]) -> None:
        self._matcher = matcher
        self._end_ids = sorted(end_ids)

    def mask(self, logits: Tensor) -> Tensor:
        """``[vocab]`` logits → a copy with -inf where the grammar does not go on.

        Raises:
            RequestError: the grammar is too expensive to follow.
            QuantkitError: it leaves no token.
        """
        words = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)
        self._check()
        allowed = ((words[:, None] >> _BITS) & 1).bool().flatten()[: logits.numel()]
        # A complete text may end with any token that ends one, whichever llguidance knows of.
        allowed[self._end_ids] = self._matcher.is_accepting()
        if not allowed.any():
            raise QuantkitError("the grammar leaves no token to go on with")
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def push(self, token: int) -> None:
        """A token was chosen."""
        if token not in self._end_ids:
            self._matcher.consume_token(token)
            self._check()

    def prefix(self, tokens: Sequence[int]) -> int:
        """How many of these tokens the grammar allows next, one after the other."""
        return int(self._matcher.validate_tokens(list(tokens)))

    @property
    def complete(self) -> bool:
        """Nothing but an end can follow."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            # What follows the first line is the compiler's own state.
            reason = self._matcher.get_error().partition("\n")[0][:MAX_REASON]
            raise RequestError(f"structured_outputs: {reason}", param="structured_outputs")


@dataclass(frozen=True)
class _Source:
    """A grammar and where a client wrote it."""

    text: str
    param: str


class GrammarCompiler:
    """Compiles grammars for one model. Callable from any thread.

    Args:
        tokenizer: the model's.
        vocab: number of logits.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab: int) -> None:
        self._hf = tokenizer
        self._vocab = vocab
        self._tokens: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def __len__(self) -> int:
        return len(self._compiled)

    def check(self, asked: StructuredOutputs) -> None:
        """Raise `RequestError` unless the grammar compiles."""
        self._matcher(asked)

    def constraint(self, asked: StructuredOutputs, end_ids: Collection[int]) -> Constraint:
        """A new walk through a grammar."""
        return Constraint(self._matcher(asked).deep_copy(), end_ids)

    def _matcher(self, asked: StructuredOutputs) -> LLMatcher:
        source = _source(asked)
        with self._lock:  # two compilations at once would only fight for the CPU
            matcher = self._compiled.get(source.text)
            if matcher is None:
                matcher = self._compile(source)
                self._compiled[source.text] = matcher
                if len(self._compiled) > MAX_GRAMMARS:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(source.text)
            return matcher

    def _compile(self, source: _Source) -> LLMatcher:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer(), source.text, log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())[:MAX_REASON]
            raise RequestError(f"{source.param}: {reason}", param=source.param)
        return matcher

    def _tokenizer(self) -> LLTokenizer:
        if self._tokens is None:
            from llguidance.hf import from_tokenizer
            from transformers import PreTrainedTokenizerFast

            if not isinstance(self._hf, PreTrainedTokenizerFast):
                raise RequestError(
                    "structured_outputs: this model's tokenizer is not a fast one, which "
                    "following a grammar needs",
                    param="structured_outputs",
                )
            try:
                self._tokens = from_tokenizer(self._hf, n_vocab=self._vocab)
            except ValueError as error:
                raise RequestError(
                    f"structured_outputs: this model's tokenizer cannot follow a grammar: {error}",
                    param="structured_outputs",
                ) from error
        return self._tokens


def _source(asked: StructuredOutputs) -> _Source:
    from llguidance import LLMatcher

    if asked.regex is not None:
        return _Source(LLMatcher.grammar_from_regex(asked.regex), "regex")
    if asked.grammar is not None:
        return _Source(LLMatcher.grammar_from_lark(asked.grammar), "grammar")
    schema: dict[str, Any] = json.loads(ANY_OBJECT if asked.json is None else asked.json)
    try:
        # Whitespace between tokens is where small models go on for ever.
        text = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
    except ValueError as error:
        raise RequestError(f"json: {error}", param="json") from error
    return _Source(text, "json")
