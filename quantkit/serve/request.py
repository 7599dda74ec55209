"""A request as it was asked (frozen) and as it stands (the mutable `Sequence`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantkit.errors import UsageError
from quantkit.serve.events import Event, TokenLogprob

if TYPE_CHECKING:
    import torch

    from quantkit.serve.detokenizer import Detokenizer

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_TOP_LOGPROBS = 20
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
class SamplingParams:
    """How to choose tokens and when to stop.

    Attributes:
        temperature: 0 is greedy.
        top_p: smallest set of tokens whose probability reaches this; 1 is off.
        top_k: number of most likely tokens to keep; 0 is off.
        min_p: drop tokens less likely than this share of the most likely one; 0 is off.
        max_tokens: tokens to generate at most; 0 only scores the prompt.
        stop: strings that end the text; they are not part of it.
        seed: same request, same seed, same text; None draws a fresh one.
        logprobs: how many alternatives to report beside each token; None reports nothing.
        echo: with ``logprobs``, score the prompt's own tokens too.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 16
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    echo: bool = False

    def __post_init__(self) -> None:
        finite = math.isfinite(self.temperature)
        require(finite and self.temperature >= 0, "temperature", f"{self.temperature} is below 0")
        require(0 < self.top_p <= 1, "top_p", f"{self.top_p} is not in (0, 1]")
        require(self.top_k >= 0, "top_k", f"{self.top_k} is below 0; 0 switches it off")
        require(0 <= self.min_p <= 1, "min_p", f"{self.min_p} is not in [0, 1]")
        require(self.max_tokens >= 0, "max_tokens", f"{self.max_tokens} is below 0")
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
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    arrival: float = field(default_factory=time.monotonic)
    tenant: str = ""
    tier: str = ""
    deadline: float | None = None

    @property
    def max_length(self) -> int:
        """Tokens that it can occupy in the KV cache."""
        return len(self.prompt_ids) + self.sampling.max_tokens


Sink = Callable[[Event], None]


@dataclass(eq=False)
class Sequence:
    """A request's progress. Only the engine thread touches it once it was submitted.

    ``prefilled``, ``output_ids`` and ``prompt_logprobs`` grow as the engine runs steps;
    ``cache``, ``generator`` and ``detokenizer`` are set by the engine on the first step and
    dropped at the end, so a waiting request costs no more than its prompt.
    """

    request: Request
    sink: Sink
    prefilled: int = 0
    output_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    done: bool = False
    cache: Any = None
    generator: torch.Generator | None = None
    detokenizer: Detokenizer | None = None

    @property
    def prompt_left(self) -> int:
        """Prompt tokens that the model has not seen yet."""
        return len(self.request.prompt_ids) - self.prefilled

    @property
    def decoding(self) -> bool:
        return self.prompt_left == 0
