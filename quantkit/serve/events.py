"""What the engine says about a request: the events of its stream.

Every stream is ``[PromptScored] TokenEvent* (Finished | Failed)``: exactly one terminal event,
always the last one. Events carry token ids; turning ids into strings for a wire format is the
API's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class TokenLogprob:
    """The model's opinion of one token.

    Attributes:
        token_id: the token that stands at this position.
        logprob: its log-probability; None for the first prompt token, which nothing predicts.
        top: the most likely tokens here with their log-probabilities, best first.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptScored:
    """Log-probabilities of the prompt, one a prompt token; only when echo and logprobs are on."""

    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class TokenEvent:
    """One generated token.

    ``text`` is what became safe to show, which may be empty: a character or a possible stop
    string can still be incomplete. The concatenation over a stream is the generated text.
    """

    token_id: int
    text: str
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class Finished:
    """The request ended as asked.

    Attributes:
        reason: why.
        text: the rest that was held back.
        prompt_tokens: prompt tokens read; fewer than the prompt has if it was cancelled early.
        completion_tokens: tokens generated.
        cached_tokens: of the prompt, those whose keys and values were in the prefix cache.
    """

    reason: FinishReason
    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Failed:
    """The request could not be finished.

    Attributes:
        message: fit for the client.
        shutdown: because the server goes away.
        invalid: because of what the client asked for, which only showed on the way.
    """

    message: str
    shutdown: bool = False
    invalid: bool = False


Event = PromptScored | TokenEvent | Finished | Failed


def internal_error() -> Failed:
    """What a client may know of a bug or a lack of memory: the log has the rest."""
    return Failed("internal error while generating; the server's log has the details")
