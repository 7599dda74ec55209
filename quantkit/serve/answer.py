"""One request's answer as it grows: from rows of logits to events.

It outlives a preemption: what was said stays said, and the random stream goes on where it stood.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from quantkit.serve import sampler
from quantkit.serve.detokenizer import Detokenizer
from quantkit.serve.events import FinishReason, TokenEvent, TokenLogprob
from quantkit.serve.logits import LogitsProcessor

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from quantkit.serve.request import Request
    from quantkit.serve.sampler import Likeliest
    from quantkit.serve.structured import Constraint


class Answer:
    """Chooses tokens, and turns them into text where that may end the answer.

    Args:
        request: what was asked.
        tokenizer: the model's.
        end_ids: tokens that end the answer.
        vocab: number of logits.
        device: where they are.
        constraint: its way through a grammar; None is free.

    Attributes:
        finish_reason: why it is over; None while it is not.
        greedy: tokens are the likeliest ones, of logits that nobody else looks at.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Collection[int],
        vocab: int,
        device: torch.device | str,
        constraint: Constraint | None = None,
    ) -> None:
        self.finish_reason: FinishReason | None = None
        self._params = params = request.sampling
        self._end_ids = end_ids
        self._constraint = constraint
        self.greedy = params.greedy and params.logprobs is None and constraint is None
        self._left = params.max_tokens
        self._generator = sampler.make_generator(params.seed, device)
        self._logits = LogitsProcessor(params, request.prompt_ids, self._end_ids, vocab, device)
        # All other text is `transcript.Transcript`'s.
        self._detokenizer = (
            Detokenizer(
                tokenizer, request.prompt_ids, params.stop, params.min_tokens, params.hidden_ids
            )
            if params.stop
            else None
        )

    @property
    def plain(self) -> bool:
        """The next token is the likeliest, and its logits stay as they are: see `take`."""
        return self.greedy and self._logits.idle

    def take(self, found: Likeliest) -> TokenEvent:
        """`choose` where it is `plain`, by what was found in a row.

        Raises:
            NotFiniteError: there was a NaN or an infinity.
        """
        return self._push(found.token(), None)

    def choose(self, logits: Tensor) -> TokenEvent:
        """Sample a token from its logits ``[vocab]``; look at `finish_reason` afterwards.

        Raises:
            NotFiniteError: there is a NaN or an infinity among them.
        """
        params = self._params
        row = self._logits(logits)
        if self._constraint is not None:
            row = self._constraint.mask(row)
        token = sampler.sample(row, params, self._generator)
        logprob = None
        if params.logprobs is not None:
            logprob = sampler.score(logits[None], [token], params.logprobs)[0]
        return self._push(token, logprob)

    def _push(self, token: int, logprob: TokenLogprob | None) -> TokenEvent:
        self._logits.push(token)
        if self._constraint is not None:
            self._constraint.push(token)
        self._left -= 1
        text, stopped = "", self._constraint is not None and self._constraint.complete
        if self._detokenizer is not None:
            text = self._detokenizer.push(token)
            stopped = stopped or self._detokenizer.stopped
        if stopped or token in self._end_ids:
            self.finish_reason = "stop"
        elif self._left == 0:
            self.finish_reason = "length"
        return TokenEvent(token, text, logprob)

    def possible(self, guesses: list[int]) -> list[int]:
        """The first of these tokens, as many as may be chosen one after the other.

        None from one on that ends the answer: the pass that checks those before it gives it anyway.
        """
        ends = (i for i, token in enumerate(guesses) if token in self._end_ids)
        guesses = guesses[: next(ends, len(guesses))]
        if self._constraint is None:
            return guesses
        return guesses[: self._constraint.prefix(guesses)]

    def rest(self) -> str:
        """The text still held back."""
        return self._detokenizer.finish() if self._detokenizer is not None else ""
