"""The text of an answer that no stop string can end.

Only stop strings make text a matter of the engine's: what comes next does not depend on the text
of other answers. It is written where their events are read, on the event loop while the model
computes the next tokens, and not between two passes, when everybody waits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from quantkit.serve.detokenizer import Detokenizer
from quantkit.serve.events import Event, Failed, Finished, PromptScored, TokenEvent, internal_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quantkit.serve.request import Request

logger = logging.getLogger(__name__)


class Transcript:
    """Adds the text to the events of one request, in their order.

    Args:
        tokenizer: the model's.
        request: whose events come. One with stop strings has its text already.
        cancel: stops the request, whose text cannot be written.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, request: Request, cancel: Callable[[], None]
    ) -> None:
        self._tokenizer = tokenizer
        self._request = request
        self._cancel = cancel
        self._detokenizer: Detokenizer | None = None
        self._over = False

    def __call__(self, event: Event) -> Event | None:
        """The event with its text, or a failure if that raises; nothing after a last one."""
        if self._over:
            return None
        self._over = isinstance(event, Finished | Failed)
        if self._request.sampling.stop or isinstance(event, PromptScored | Failed):
            return event
        try:
            return self._write(event)
        except Exception:
            logger.exception("request %s failed", self._request.id)
            if not self._over:
                self._over = True
                self._cancel()
            return internal_error()

    def _write(self, event: TokenEvent | Finished) -> Event:
        detokenizer = self._detokenizer
        if isinstance(event, Finished):
            rest = detokenizer.finish() if detokenizer else ""
            return replace(event, text=rest) if rest else event
        if detokenizer is None:
            params = self._request.sampling
            detokenizer = self._detokenizer = Detokenizer(
                self._tokenizer, self._request.prompt_ids, hidden=params.hidden_ids
            )
        text = detokenizer.push(event.token_id)
        return TokenEvent(event.token_id, text, event.logprob) if text else event
