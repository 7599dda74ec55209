"""Greedy generation with a key/value cache, for tasks that compare written answers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.models.decoder import Decoder
from quantkit.models.paged import PagedRunner, PagedSequence, Work, pages_for
from quantkit.models.runtime import Runtime

#: Prompts decoded together. One token of a small model is bound by reading its weights, so a
#: batch is nearly free; prompts are sorted by length to keep padding small.
BATCH = 8


#: (index of the prompt, tokens written so far) → whether its text is done.
Finished = Callable[[int, list[int]], bool]


class Greedy(Protocol):
    """Decodes the most likely token, one after another, for up to ``batch`` prompts at once."""

    batch: int

    def __call__(
        self, prompts: Sequence[Sequence[int]], max_new: Sequence[int], finished: Finished
    ) -> list[list[int]]:
        """Continue prompts.

        Args:
            prompts: token ids.
            max_new: most tokens to write for each.
            finished: asked after each token.

        Returns:
            The tokens written for each prompt, without the stop token.
        """
        ...


def make_greedy(runtime: Runtime, stop_ids: frozenset[int], *, pads: bool) -> Greedy:
    """Greedy decoding on the native decoder, or in transformers' modules."""
    if runtime.decoder is not None:
        return DecoderGreedy(runtime.decoder, stop_ids)
    return ModuleGreedy(runtime.model, stop_ids, pads=pads)


class DecoderGreedy:
    """Greedy decoding on the native decoder. What is written does not depend on the batch."""

    def __init__(self, decoder: Decoder, stop_ids: frozenset[int]) -> None:
        self.decoder = decoder
        self.stop_ids = stop_ids
        self.batch = 2 * BATCH

    def __call__(
        self, prompts: Sequence[Sequence[int]], max_new: Sequence[int], finished: Finished
    ) -> list[list[int]]:
        pages = sum(pages_for(len(p) + n) for p, n in zip(prompts, max_new, strict=True))
        runner = PagedRunner(self.decoder, pages)
        written: list[list[int]] = [[] for _ in prompts]
        sequences = [PagedSequence() for _ in prompts]
        new: dict[int, Sequence[int]] = dict(enumerate(prompts))
        while new:
            works = [Work(sequences[i], ids) for i, ids in new.items()]
            logits = runner.logits(works).block
            if not torch.isfinite(logits).all():
                raise QuantkitError("generation: the logits hold NaN or infinity")
            alive: dict[int, Sequence[int]] = {}
            for i, token in zip(new, logits.argmax(-1).tolist(), strict=True):
                if token in self.stop_ids:
                    continue
                written[i].append(token)
                if len(written[i]) < max_new[i] and not finished(i, written[i]):
                    alive[i] = [token]
            new = alive
        return written


class ModuleGreedy:
    """Greedy decoding in a transformers model.

    Args:
        model: a transformers causal language model.
        stop_ids: tokens that end a sequence and are not part of its text.
        pads: the model honours a 2-D mask with explicit positions, so prompts of different
            lengths may share a batch. Otherwise they run one by one.
    """

    def __init__(self, model: Any, stop_ids: frozenset[int], *, pads: bool) -> None:
        self.model = model
        self.stop_ids = stop_ids
        self.batch = BATCH if pads else 1
        takes_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if takes_keep else {}

    @torch.inference_mode()
    def __call__(
        self, prompts: Sequence[Sequence[int]], max_new: Sequence[int], finished: Finished
    ) -> list[list[int]]:
        tokens, mask = self._left_pad(prompts)
        written: list[list[int]] = [[] for _ in prompts]
        alive = list(range(len(prompts)))
        cache = None
        while alive:
            padded = self.batch > 1
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            out = self.model(
                input_ids=tokens,
                attention_mask=mask if padded else None,
                position_ids=positions if padded else None,
                past_key_values=cache,
                use_cache=True,
                **self._last_only,
            )
            cache, logits = out.past_key_values, out.logits[:, -1]
            if not torch.isfinite(logits).all():
                raise QuantkitError("generation: the logits hold NaN or infinity")
            best = logits.argmax(-1).tolist()
            keep = []
            for slot, (index, token) in enumerate(zip(alive, best, strict=True)):
                if token in self.stop_ids:
                    continue
                written[index].append(token)
                if len(written[index]) < max_new[index] and not finished(index, written[index]):
                    keep.append(slot)
            if len(keep) < len(alive) and keep:
                # Finished rows leave the batch, or the longest answer would cost all of them.
                slots = torch.tensor(keep, device=mask.device)
                cache.batch_select_indices(slots)
                mask = mask[slots]
            alive = [alive[slot] for slot in keep]
            tokens = torch.tensor([[best[slot]] for slot in keep], device=mask.device)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return written

    def _left_pad(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(ids, mask), both ``[batch, longest]``; padding on the left, where the mask is 0."""
        longest = max(len(p) for p in prompts)
        tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        return tokens.to(self.model.device), mask.to(self.model.device)
