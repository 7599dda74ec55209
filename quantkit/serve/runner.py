"""Forward passes for the engine: chunks of prompts and next tokens, of many sequences at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from quantkit import model as models
from quantkit.models.page_pool import PagePool
from quantkit.models.paged import PagedRunner, PagedSequence, pages_for
from quantkit.models.paged import Work as PagedWork
from quantkit.serve.kv_cache import KVCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantkit.models.decoder import Decoder
    from quantkit.models.runtime import Runtime


#: Sequences and guesses of a step of decoding that gets its logits in memory that is there.
KEPT_ROWS = 32


#: Of each work its logits, or what went wrong with it alone: a `PassLogits`, if nothing did.
Results = Sequence[Tensor | Exception]


@dataclass(frozen=True)
class Work:
    """New tokens of one sequence.

    Attributes:
        cache: what `Runner.new_cache` returned for it.
        all_logits: logits after each token are wanted, not only after the last.
    """

    cache: Any
    token_ids: Sequence[int]
    all_logits: bool = False


class Runner(Protocol):
    """Calls the model; owns neither requests nor policy.

    A sequence's result depends neither on who else is in the call nor on how its prompt was cut.
    """

    def new_cache(self) -> Any:
        """The memory of a new sequence."""
        ...

    def release(self, cache: Any) -> None:
        """Free a sequence's memory."""
        ...

    def nbytes(self, cache: Any) -> int:
        """Bytes that a sequence holds."""
        ...

    def run(self, works: Sequence[Work]) -> Results:
        """Append each work's tokens to its sequence.

        Returns:
            For each work fp32 logits ``[1, vocab]`` after its last token or ``[n, vocab]``, or
            what went wrong with it alone. They hold until the next call.
        """
        ...


def make_runner(runtime: Runtime, kv_tokens: int) -> DecoderRunner | ModuleRunner:
    """The native decoder with pages for so many tokens, or transformers' modules.

    Args:
        runtime: the model.
        kv_tokens: tokens that there must be room for.

    Raises:
        UsageError: the model predicts no next tokens.
    """
    models.require_logits(runtime.model.config, "quantkit serve samples")
    if runtime.decoder is not None:
        return DecoderRunner(runtime.decoder, kv_tokens)
    return ModuleRunner(runtime.model)


class DecoderRunner:
    """All sequences in one native call."""

    def __init__(self, decoder: Decoder, kv_tokens: int) -> None:
        self._paged = PagedRunner(decoder, pages_for(kv_tokens), kept_rows=KEPT_ROWS)

    @property
    def pool(self) -> PagePool:
        """Whose its pages are."""
        return self._paged.pool

    def new_cache(self) -> PagedSequence:
        return PagedSequence()

    def release(self, cache: PagedSequence) -> None:
        self._paged.release(cache)

    def nbytes(self, cache: PagedSequence) -> int:
        return len(cache.pages) * self._paged.page_nbytes

    def run(self, works: Sequence[Work]) -> Results:
        paged = [PagedWork(w.cache, w.token_ids, w.all_logits) for w in works]
        try:
            return self._paged.logits(paged)
        except Exception:
            # A pass that fails has moved no sequence; one by one it shows whose fault it was.
            return [self._alone(work) for work in paged]

    def _alone(self, work: PagedWork) -> Tensor | Exception:
        try:
            return self._paged.logits([work])[0].clone()  # the next one is written there, too
        except Exception as error:
            return error


class ModuleRunner:
    """A transformers model, one sequence after the other: without padding they cannot mix."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def new_cache(self) -> KVCache:
        return KVCache(self.model.config)

    def release(self, cache: KVCache) -> None:
        cache.clear()

    def nbytes(self, cache: KVCache) -> int:
        return cache.nbytes

    def run(self, works: Sequence[Work]) -> Results:
        results: list[Tensor | Exception] = []
        for work in works:
            try:
                results.append(self._forward(work))
            except Exception as error:
                results.append(error)
        return results

    @torch.inference_mode()
    def _forward(self, work: Work) -> Tensor:
        output = self.model(
            input_ids=torch.tensor([list(work.token_ids)], device=self.model.device),
            past_key_values=work.cache.past,
            use_cache=True,
            logits_to_keep=0 if work.all_logits else 1,
        )
        logits: Tensor = output.logits[0]
        return logits
