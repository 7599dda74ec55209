"""What a request does to its logits before a token is sampled: biases, bans, penalties.

In vLLM's order: logit bias, ``min_tokens``, repetition penalty, frequency and presence penalty.
Reported log-probabilities are the model's own, before all of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from quantkit.serve.request import SamplingParams


class LogitsProcessor:
    """The state of one request: which tokens stand in its prompt and how often in its answer.

    Args:
        params: the request's settings.
        prompt_ids: its prompt.
        end_ids: tokens that would end the answer.
        vocab: number of logits.
        device: where they are.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        end_ids: Collection[int],
        vocab: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._params = params
        self._length = 0
        self._bias = self._prompt = self._counts = None
        if params.logit_bias:
            self._bias = torch.zeros(vocab, device=device, dtype=torch.float32)
            self._bias[list(params.logit_bias)] = torch.tensor(
                list(params.logit_bias.values()), dtype=torch.float32, device=device
            )
        self._end_ids = torch.tensor(sorted(end_ids), dtype=torch.int64, device=device)
        # Tokens for which some stay banned: none where there is nothing to ban.
        self._banned = params.min_tokens if end_ids else 0
        if params.repetition_penalty != 1:
            self._prompt = torch.zeros(vocab, dtype=torch.bool, device=device)
            self._prompt[list(prompt_ids)] = True
        if self._prompt is not None or params.frequency_penalty or params.presence_penalty:
            self._counts = torch.zeros(vocab, device=device, dtype=torch.float32)

    @property
    def idle(self) -> bool:
        """The next row will be left as it is."""
        return self._bias is None and self._counts is None and self._length >= self._banned

    def __call__(self, logits: Tensor) -> Tensor:
        """``[vocab]`` → fp32 ``[vocab]``; the same tensor where nothing was asked for."""
        params = self._params
        if self._bias is not None:
            logits = logits + self._bias
        if self._length < self._banned:
            logits = logits.index_fill(0, self._end_ids, -torch.inf)
        if self._counts is None:
            return logits
        logits = logits.float()
        if self._prompt is not None:
            penalty = params.repetition_penalty
            repeated = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._prompt | (self._counts > 0), repeated, logits)
        return logits - (
            params.frequency_penalty * self._counts + params.presence_penalty * (self._counts > 0)
        )

    def push(self, token: int) -> None:
        """A token was chosen."""
        self._length += 1
        if self._counts is not None:
            self._counts[token] += 1
