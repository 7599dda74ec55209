"""Answers that follow a grammar: which tokens may come next, by llguidance.

A grammar is compiled once, on a thread that does nothing else, and kept; least recently used ones
go first. A request holds on to its own, so what happens to others never makes the engine compile.
Each answer walks through it with a matcher of its own. What is compiled comes from clients, so its
size, its depth, the time it takes and the work that a step may cost are bounded.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.serve.daemon_executor import DaemonExecutor
from quantkit.serve.request import Request, RequestError, StructuredOutputs
from quantkit.serve.tool_grammar import Special, reasoning_then

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

MAX_GRAMMARS = 64
#: Grammars that wait for the compiler, the one it works at included.
MAX_WAITING = 32
#: How long a client waits for its grammar. llguidance's own limits end most of them in less.
COMPILE_SECONDS = 30.0
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


class CompilerBusyError(QuantkitError):
    """Too many grammars wait to be compiled."""


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar. May be used from any thread."""

    matcher: LLMatcher

    def constraint(self, end_ids: Collection[int]) -> Constraint:
        """A new walk through it."""
        return Constraint(self.matcher.deep_copy(), end_ids)


class GrammarCompiler:
    """Compiles grammars for one model. Callable from any thread.

    Args:
        tokenizer: the model's.
        vocab: number of logits.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab: int) -> None:
        self._hf = tokenizer
        self._vocab = vocab
        self._tokens: LLTokenizer | None = None  # of the compiling thread
        self._thread = DaemonExecutor("quantkit-grammar")
        self._began = 0.0  # when that thread came to the grammar that it works at
        self._lock = threading.Lock()  # never held while something is compiled
        self._compiled: OrderedDict[StructuredOutputs, Future[Grammar]] = OrderedDict()
        self._waiting = 0

    def __len__(self) -> int:
        return len(self._compiled)

    def compile(self, asked: StructuredOutputs) -> Grammar:
        """The grammar, compiled if it was not yet. Blocks.

        Raises:
            RequestError: it does not compile, leaves nothing to say, or takes too long.
            CompilerBusyError: too many others wait.
        """
        future = self._begin(asked)
        try:
            return future.result(COMPILE_SECONDS)
        except TimeoutError:
            raise self._too_late(future, asked) from None

    async def compile_soon(self, asked: StructuredOutputs) -> Grammar:
        """`compile` for an event loop, which goes on meanwhile."""
        future = self._begin(asked)
        waiter = asyncio.wrap_future(future)
        # An error that comes after everybody has left is nobody's business.
        waiter.add_done_callback(lambda done: done.cancelled() or done.exception())
        done, _ = await asyncio.wait({waiter}, timeout=COMPILE_SECONDS)
        if not done:
            raise self._too_late(future, asked)
        return waiter.result()

    def attach(self, request: Request) -> Request:
        """The request with its grammar; the same one if it has no need of that. Blocks."""
        asked = request.sampling.structured_outputs
        if asked is None or request.grammar is not None:
            return request
        return replace(request, grammar=self.compile(asked))

    async def attach_soon(self, request: Request) -> Request:
        """`attach` for an event loop."""
        asked = request.sampling.structured_outputs
        if asked is None or request.grammar is not None:
            return request
        return replace(request, grammar=await self.compile_soon(asked))

    def _begin(self, asked: StructuredOutputs) -> Future[Grammar]:
        with self._lock:
            future = self._compiled.get(asked)
            if future is None:
                if self._waiting >= MAX_WAITING:
                    raise CompilerBusyError(
                        f"{self._waiting} grammars wait to be compiled", remedy="retry later"
                    )
                self._waiting += 1
                if self._tokens is None:
                    self._thread.submit(self._tokenizer)  # takes long once, and nobody's time
                future = self._thread.submit(partial(self._work, asked))
                self._compiled[asked] = future
                if len(self._compiled) > MAX_GRAMMARS:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(asked)
            return future

    def _work(self, asked: StructuredOutputs) -> Grammar:
        self._began = time.monotonic()
        try:
            return self._compile(asked)
        except BaseException:
            with self._lock:
                self._compiled.pop(asked, None)  # an error would grow with each time it is raised
            raise
        finally:
            with self._lock:
                self._waiting -= 1

    def _too_late(self, future: Future[Grammar], asked: StructuredOutputs) -> QuantkitError:
        # One that spent most of its time behind others did nothing wrong.
        if future.running() and time.monotonic() - self._began >= COMPILE_SECONDS / 2:
            param = _param(asked)
            return RequestError(
                f"{param}: takes too long to compile", param=param, remedy="make it simpler"
            )
        return CompilerBusyError("the compiler of grammars is busy", remedy="retry later")

    def _compile(self, asked: StructuredOutputs) -> Grammar:
        tokens = self._tokenizer()
        special = _specials(self._hf, tokens)
        param = _param(asked)
        if asked.calls is not None:  # one by one, so that a fault names its function
            for function in asked.calls.functions:
                self._matcher(asked.calls.arguments(function), f"{param}: {function.name}", param)
        text = _source(asked, special)
        if asked.reasoning_end is not None:
            is_lark = asked.calls is not None or asked.grammar is not None
            answer = {"lark_grammar": text} if is_lark else json.loads(text)["grammars"][0]
            head = {"lark_grammar": reasoning_then(asked.reasoning_end, special)}
            text = json.dumps({"grammars": [head, answer | {"name": "answer"}]})
        return Grammar(self._matcher(text, param, param))

    def _matcher(self, text: str, where: str, param: str) -> LLMatcher:
        """A matcher that has something to say: what refers to itself compiles and says nothing."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer(), text, log_level=0)
        trial = matcher
        if not matcher.is_error():
            trial = matcher.deep_copy()
            trial.compute_bitmask()
            key = self._tokenizer().tokenize_str('{"')
            if trial.validate_tokens(key) == len(key):  # where an object's keys are laid out
                trial.consume_tokens(key)
                trial.compute_bitmask()
        if trial.is_error():
            reason = " ".join(_reason(trial.get_error()).split())[:MAX_REASON]
            raise RequestError(f"{where}: {reason}", param=param)
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


def _param(asked: StructuredOutputs) -> str:
    """Where a client wrote it."""
    if asked.calls is not None:
        return "tools"
    return next((name for name in ("regex", "grammar") if getattr(asked, name) is not None), "json")


def _reason(error: str) -> str:
    """What a client may read of a compiler's message: not its own state, nor the grammar again."""
    told = error.partition("\n<state>")[0].partition("\n   1 |")[0]
    return told.partition("failed to compile JSON schema: ")[2] or told


def _specials(hf: PreTrainedTokenizerBase, tokens: LLTokenizer) -> Special:
    """Id of a text that llguidance takes for a special token."""
    added = {text: i for text, i in hf.get_added_vocab().items() if tokens.is_special_token(i)}
    return added.get


def _source(asked: StructuredOutputs, special: Special) -> str:
    from llguidance import LLMatcher

    if asked.calls is not None:
        return LLMatcher.grammar_from_lark(asked.calls.lark(special))
    if asked.regex is not None:
        return LLMatcher.grammar_from_regex(asked.regex)
    if asked.grammar is not None:
        return LLMatcher.grammar_from_lark(asked.grammar)
    schema: dict[str, Any] = json.loads(ANY_OBJECT if asked.json is None else asked.json)
    try:
        # Whitespace between tokens is where small models go on for ever.
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
    except ValueError as error:
        raise RequestError(f"json: {error}", param="json") from error
