"""Scoring and continuing token ids through an OpenAI-compatible server.

``/v1/completions`` with ``echo``, ``logprobs: 1`` and ``max_tokens: 1`` gives the log-probability
of every token of a prompt but the first. Prompts are sent as token ids, so that no other split of
the text is scored than the one that was asked for; every answer must echo as many tokens as were
sent. A server that does not do all of this would score chance without an error.

Only the most likely token's log-probability comes with each position: enough for perplexity and
for suites, not for KL, which needs the whole distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.models.utils import postprocess_generated_text

from quantkit.errors import QuantkitError, UsageError
from quantkit.evals.endpoint import Endpoint, Json
from quantkit.evals.token_model import Pair, TokenLM
from quantkit.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: The OpenAI API takes so many stop strings; the text is cut at the others here.
MAX_STOPS = 4

#: vLLM's spelling of a token by its id, asked for by ``return_tokens_as_token_ids``.
ID_PREFIX = "token_id:"

#: So many equal log-probabilities in a row are no model's.
SUSPICIOUS = 8

#: A log-probability may be above 0 by rounding, and by no more.
ROUNDING = 1e-3


class EndpointLM(TokenLM):
    """A server that lm-eval can ask.

    Args:
        endpoint: see `quantkit.evals.endpoint.connect`.
        tokenizer: the served model's.
        max_length: longest prompt and answer together where the server does not say.
        progress: told of finished requests.

    Raises:
        UsageError: nobody knows the longest input.
    """

    remedy = "the server's log-probabilities are not the model's; check what it serves and how"

    def __init__(
        self,
        endpoint: Endpoint,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        progress: Progress = silent,
    ) -> None:
        limit = endpoint.max_length or max_length
        if limit is None:
            raise UsageError(
                f"{endpoint.model}: the server does not say how many tokens it takes",
                remedy="give a CKPT whose config.json has max_position_embeddings",
            )
        # A prompt holds its last scored token, which a model that runs here is never given, and
        # leaves room for the one token that the server must write.
        super().__init__(tokenizer, limit - 2, progress=progress)
        self.endpoint = endpoint

    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """See `TokenLM.score`. A tie with the most likely token counts as greedy."""
        prompts = [(context + scored)[-(self.max_length + 1) :] for context, scored in pairs]

        def read(index: int, answer: Json) -> tuple[float, bool]:
            values, best = self._echoed(prompts[index], answer)
            count = len(pairs[index][1])
            own, top = values[-count:], best[-count:]
            return math.fsum(own), all(v >= b for v, b in zip(own, top, strict=True))

        return self.endpoint.complete([_scoring(p) for p in prompts], read, self._count(prompts))

    def continue_greedily(
        self, prompts: Sequence[list[int]], stops: Sequence[list[str]], limits: Sequence[int]
    ) -> list[str]:
        """See `TokenLM.continue_greedily`."""
        bodies: list[Json] = [
            {
                "prompt": prompt,
                "max_tokens": limit,
                "temperature": 0,
                "top_p": 1,
                "n": 1,
                "stop": stop[:MAX_STOPS],
                "seed": 0,
            }
            for prompt, stop, limit in zip(prompts, stops, limits, strict=True)
        ]

        def read(index: int, answer: Json) -> str:
            choice = self._choice(answer)
            if not isinstance(choice.get("text"), str):
                raise self._broken(f"an answer without text: {str(answer)[:200]}")
            self._check_usage(prompts[index], answer)
            return postprocess_generated_text(choice["text"], stops[index], None)

        return self.endpoint.complete(bodies, read, self._count(prompts))

    def entropy_share(self, ids: list[int]) -> float:
        """See `TokenLM.entropy_share`: the min-entropy -log max p, a lower bound."""
        body = {**_scoring(ids), "echo": False}

        def read(_: int, answer: Json) -> float:
            logprobs = self._choice(answer).get("logprobs")
            values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
            if not isinstance(values, list) or not values:
                raise self._broken("an answer without log-probabilities")
            return self._numbers(values[:1])[0]

        (best,) = self.endpoint.complete([body], read, lambda _: None)
        return -best / math.log(len(self.tokenizer))

    # --- reading answers -------------------------------------------------------------------

    def _echoed(self, sent: list[int], answer: Json) -> tuple[list[float], list[float]]:
        """(own, best) log-probability of each token of a prompt but the first."""
        logprobs = self._choice(answer).get("logprobs")
        if not isinstance(logprobs, dict):
            raise self._broken("an answer without log-probabilities of the prompt")
        tokens = self._list(logprobs, "tokens")
        own = self._list(logprobs, "token_logprobs")
        top = self._list(logprobs, "top_logprobs")
        # The server may write one token, or none where the first it chose ends the text.
        lengths = {len(tokens), len(own), len(top)}
        if len(lengths) > 1 or lengths.pop() not in (len(sent), len(sent) + 1):
            raise self._broken(
                f"{len(tokens)} tokens echoed ({len(own)} log-probabilities) where {len(sent)} "
                "were sent"
            )
        self._check_usage(sent, answer)
        n = len(sent)
        if str(tokens[0]).startswith(ID_PREFIX):
            echoed = [str(token).removeprefix(ID_PREFIX) for token in tokens[:n]]
            if echoed != [str(i) for i in sent]:
                raise self._broken("other token ids echoed than were sent")
        values = self._numbers(own[1:n])
        if len(values) >= SUSPICIOUS and len(set(values)) == 1:
            raise self._broken(f"{len(values)} log-probabilities that are all {values[0]}")
        best = []
        for value, alternatives in zip(values, top[1:n], strict=True):
            if not isinstance(alternatives, dict) or not alternatives:
                raise self._broken("a prompt token without its most likely alternative")
            best.append(max(value, *self._numbers(list(alternatives.values()))))
        return values, best

    def _choice(self, answer: Json) -> Json:
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self._broken(f"an answer without exactly one choice: {str(answer)[:200]}")
        return choices[0]

    def _list(self, logprobs: Json, key: str) -> list[Any]:
        found = logprobs.get(key)
        if not isinstance(found, list):
            raise self._broken(f"an answer without {key}")
        return found

    def _check_usage(self, sent: list[int], answer: Json) -> None:
        usage = answer.get("usage")
        counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if counted != len(sent):
            raise self._broken(f"{counted} prompt tokens counted where {len(sent)} were sent")

    def _numbers(self, values: list[Any]) -> list[float]:
        for value in values:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value > ROUNDING:
                raise self._broken(f"{value!r} where a log-probability belongs")
        return [float(value) for value in values]

    def _count(self, requests: Sequence[object]) -> Any:
        return lambda done: self.progress(done, len(requests), self.label)

    def _broken(self, what: str) -> QuantkitError:
        return QuantkitError(
            f"{self.endpoint.server} at {self.endpoint.config.base} gave {what}",
            remedy="suites need a server whose /v1/completions honours token ids as prompt, echo "
            "and logprobs",
        )


def _scoring(prompt: list[int]) -> Json:
    return {
        "prompt": prompt,
        "echo": True,
        "logprobs": 1,
        "max_tokens": 1,
        "temperature": 0,
        "return_tokens_as_token_ids": True,
    }
