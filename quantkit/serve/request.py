"""A request as it was asked (frozen) and as it stands (the mutable `Sequence`)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantkit.errors import UsageError
from quantkit.serve.events import Event, TokenLogprob

if TYPE_CHECKING:
    from quantkit.serve.answer import Answer
    from quantkit.serve.speculation import Draft
    from quantkit.serve.structured import Grammar
    from quantkit.serve.tool_grammar import CallForm

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 128
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_REPETITION_PENALTY = 10
MAX_SCHEMA_DEPTH = 32
MAX_GRAMMAR_BYTES = {"json": 65536, "regex": 4096, "grammar": 65536}
#: torch.Generator takes 64-bit seeds; the OpenAI field is a signed integer.
MAX_SEED = 2**63 - 1


class RequestError(UsageError):
    """A request that breaks a rule. ``param`` names the field, ``code`` the kind of fault."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.param = param
        self.code = code


class ContextOverflowError(RequestError):
    """Prompt and answer together do not fit into the context."""


def require(condition: bool, param: str, message: str) -> None:
    """Raise `RequestError` about ``param`` unless ``condition`` holds."""
    if not condition:
        raise RequestError(f"{param}: {message}", param=param)


@dataclass(frozen=True)
class StructuredOutputs:
    """What an answer must look like: exactly one of the fields. Named as in vLLM.

    Attributes:
        json: a JSON schema, as JSON text.
        json_object: any JSON object.
        regex: a regular expression that the whole answer matches.
        grammar: a context-free grammar in llguidance's variant of Lark.
        calls: tool calls.
        reasoning_end: the prompt ends inside reasoning, which ends with this; the form begins
            behind it.

    Raises:
        RequestError: not exactly one, too large, too deep, or no JSON.
    """

    json: str | None = None
    json_object: bool = False
    regex: str | None = None
    grammar: str | None = None
    calls: CallForm | None = None
    reasoning_end: str | None = None

    def __post_init__(self) -> None:
        given = [self.json is not None, self.json_object, self.regex is not None]
        given += [self.grammar is not None, self.calls is not None]
        require(
            sum(given) == 1,
            "structured_outputs",
            "exactly one of json, json_object, regex and grammar is needed",
        )
        for name, limit in MAX_GRAMMAR_BYTES.items():
            text = getattr(self, name)
            if text is not None:
                size = len(text.encode(errors="replace"))
                require(size <= limit, name, f"{size} bytes; at most {limit}")
                require(text.isascii() or _is_unicode(text), name, "holds half a surrogate pair")
        if self.json is not None:
            try:
                schema = json.loads(self.json)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"json: {error}", param="json") from error
            require(isinstance(schema, dict), "json", "a schema is an object")
            deep = is_deeper(schema, MAX_SCHEMA_DEPTH)
            require(not deep, "json", f"nested deeper than {MAX_SCHEMA_DEPTH}")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def is_deeper(value: object, limit: int) -> bool:
    """Objects and arrays are nested more than ``limit`` deep."""
    level = [value]
    for _ in range(limit + 1):
        inner: list[object] = []
        for item in level:
            inner += (
                item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
            )
        level = inner
        if not level:
            return False
    return any(isinstance(item, dict | list) for item in level)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    Attributes:
        temperature: 0 is greedy.
        top_p: smallest set of tokens whose probability reaches this, with all that are as likely
            as its last; 1 is off.
        top_k: number of most likely tokens to keep; 0 is off.
        min_p: drop tokens less likely than this share of the most likely one; 0 is off.
        frequency_penalty: subtracted from a token's logit for each time it stands in the answer.
        presence_penalty: subtracted once if it stands there at all.
        repetition_penalty: logits of tokens that stand in prompt or answer are divided by it
            where positive, multiplied where negative (Keskar et al. 2019, section 4.1); 1 is off.
        logit_bias: added to the logits of these token ids.
        max_tokens: tokens to generate at most; 0 only scores the prompt.
        min_tokens: tokens to generate before anything but ``max_tokens`` may end the answer.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: tokens that end the answer, beside the model's own.
        ignore_eos: the model's own do not end it.
        seed: same request, same seed, same text; None draws a fresh one.
        logprobs: how many alternatives to report beside each token; None reports nothing.
        echo: with ``logprobs``, score the prompt's own tokens too.
        structured_outputs: what the answer must look like; None is free.
        hidden_ids: tokens whose text is left out; None leaves out all special ones.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    echo: bool = False
    structured_outputs: StructuredOutputs | None = None
    hidden_ids: frozenset[int] | None = None

    def __post_init__(self) -> None:
        finite = math.isfinite(self.temperature)
        require(finite and self.temperature >= 0, "temperature", f"{self.temperature} is below 0")
        require(0 < self.top_p <= 1, "top_p", f"{self.top_p} is not in (0, 1]")
        require(self.top_k >= 0, "top_k", f"{self.top_k} is below 0; 0 switches it off")
        require(0 <= self.min_p <= 1, "min_p", f"{self.min_p} is not in [0, 1]")
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            require(-2 <= value <= 2, name, f"{value} is not between -2 and 2")
        require(
            0 < self.repetition_penalty <= MAX_REPETITION_PENALTY,
            "repetition_penalty",
            f"{self.repetition_penalty} is not above 0 and up to {MAX_REPETITION_PENALTY}",
        )
        require(
            len(self.logit_bias) <= MAX_LOGIT_BIAS,
            "logit_bias",
            f"{len(self.logit_bias)} tokens; at most {MAX_LOGIT_BIAS}",
        )
        require(
            all(-100 <= bias <= 100 for bias in self.logit_bias.values()),
            "logit_bias",
            "each bias must lie between -100 and 100",
        )
        require(self.max_tokens >= 0, "max_tokens", f"{self.max_tokens} is below 0")
        require(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"{self.min_tokens} is not between 0 and max_tokens, {self.max_tokens}",
        )
        require(
            self.structured_outputs is None or not self.min_tokens,
            "min_tokens",
            "an answer in a given form ends where the form does",
        )
        require(
            self.structured_outputs is None or not self.ignore_eos,
            "ignore_eos",
            "an answer in a given form ends where the form does",
        )
        require(
            len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
            "stop_token_ids",
            f"{len(self.stop_token_ids)} tokens; at most {MAX_STOP_TOKEN_IDS}",
        )
        require(
            len(self.stop) <= MAX_STOP_STRINGS,
            "stop",
            f"{len(self.stop)} strings; at most {MAX_STOP_STRINGS}",
        )
        require(
            all(0 < len(stop) <= MAX_STOP_LENGTH for stop in self.stop),
            "stop",
            f"each string needs 1 to {MAX_STOP_LENGTH} characters",
        )
        require(
            self.seed is None or -MAX_SEED <= self.seed <= MAX_SEED,
            "seed",
            f"{self.seed} does not fit into 64 bits",
        )
        require(
            self.logprobs is None or 0 <= self.logprobs <= MAX_TOP_LOGPROBS,
            "logprobs",
            f"{self.logprobs} is not between 0 and {MAX_TOP_LOGPROBS}",
        )

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Every token id that the client named."""
        return (*self.logit_bias, *self.stop_token_ids)

    def end_ids(self, eos_ids: Iterable[int]) -> frozenset[int]:
        """Tokens that end the answer of a model whose own are these."""
        return frozenset(() if self.ignore_eos else eos_ids) | {*self.stop_token_ids}

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    @property
    def scores_prompt(self) -> bool:
        return self.echo and self.logprobs is not None


@dataclass(frozen=True)
class Request:
    """One prompt to continue. ``id`` is unique among the requests an engine holds.

    Attributes:
        arrival: seconds of the monotonic clock.
        tenant: whose it is: what he sends is never visible to another.
        tier: class of service, for policies.
        deadline: when its first token is due, on the same clock; None is never.
        grammar: its structured outputs, compiled; `structured.GrammarCompiler` adds it.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    arrival: float = field(default_factory=time.monotonic)
    tenant: str = ""
    tier: str = ""
    deadline: float | None = None
    grammar: Grammar | None = None

    @property
    def max_length(self) -> int:
        """Tokens that it can occupy in the KV cache."""
        return len(self.prompt_ids) + self.sampling.max_tokens


Sink = Callable[[Event], None]


@dataclass(eq=False)
class Sequence:
    """A request's progress. Only the engine thread touches it once it was submitted.

    What was generated survives a preemption; what was computed of it does not.

    Attributes:
        tokens: the prompt, then the answer as far as it is known.
        computed: how many of them have keys and values in ``cache``.
        cached_tokens: prompt tokens that came out of the prefix cache.
        answer: random stream and text; made at the first token, dropped at the end.
        cache: what the runner reads and writes; None while it waits.
        page_keys: names of its full pages, made as they are needed.
        stored_pages: how many of its pages the prefix cache has seen.
        preempted: it was stopped at least once.
        barren: how often in a row it was stopped without having said a token.
        draft: what speculation knows of it.
    """

    request: Request
    sink: Sink
    tokens: list[int] = field(init=False)
    computed: int = 0
    cached_tokens: int = 0
    answer: Answer | None = None
    cache: Any = None
    page_keys: list[bytes] = field(default_factory=list)
    stored_pages: int = 0
    preempted: bool = False
    barren: int = 0
    draft: Draft | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    done: bool = False

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)

    @property
    def output_tokens(self) -> int:
        """Tokens generated."""
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def left(self) -> int:
        """Known tokens that the model has yet to read."""
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        """All is read but the token that was generated last."""
        known = len(self.tokens)
        return known - self.computed == 1 and known > len(self.request.prompt_ids)

    @property
    def prompt_read(self) -> int:
        """Prompt tokens that were read at least once since it started."""
        whole = len(self.request.prompt_ids)
        return whole if self.output_tokens else min(self.computed, whole)
