"""One forward pass of the model for one sequence: a chunk of its prompt or its next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.serve.kv_cache import KVCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Runner:
    """Calls the model; owns neither requests nor policy.

    Sequences run one at a time: without padding, a sequence's result cannot depend on its
    neighbours.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def new_cache(self) -> KVCache:
        return KVCache(self.model.config)

    @torch.inference_mode()
    def forward(
        self, token_ids: Sequence[int], cache: KVCache, *, all_logits: bool = False
    ) -> Tensor:
        """Append ``token_ids`` to the sequence in ``cache``.

        Returns:
            Logits after the last token ``[1, vocab]``, or after each one ``[n, vocab]``.
        """
        output = self.model(
            input_ids=torch.tensor([token_ids], device=self.model.device),
            past_key_values=cache.past,
            use_cache=True,
            logits_to_keep=0 if all_logits else 1,
        )
        return output.logits[0]
