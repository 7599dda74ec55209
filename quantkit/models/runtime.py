"""A model that is ready to be scored or served: the noun that evals and serve share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from quantkit.kv_cache import CacheEntry
    from quantkit.models.decoder import Decoder


@dataclass(frozen=True)
class Runtime:
    """A loaded model with its tokenizer and the facts that identify the system.

    Attributes:
        model: a transformers causal language model in eval mode; its linear layers are
            `quantkit.layers.QuantLinear` when it came from a quantized checkpoint. With a
            ``decoder`` it is a description: its own forward pass has lost weights to it.
        tokenizer: the checkpoint's tokenizer.
        name: what the user called it (path or hub id).
        fingerprint: ``model`` (sha256 of the weights), ``tokenizer``, ``chat_template``,
            ``kernels`` (name of the numerics, such as ``native/w4-bf16``), ``dtype``,
            ``device``. Goes into every results file.
        size_bytes: bytes of the weights as stored on disk.
        bits_per_weight: size of the quantized layers against their number of weights,
            scales included; 16 for bf16.
        manifest: the checkpoint's ``quantkit.json``, empty for an original model.
        decoder: the model as one native call; None where transformers' modules run it.
        fallback: why there is no decoder, or None.
        caches: by attention module, what rounds its keys and values; empty where nothing does.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: Mapping[str, Any]
    size_bytes: int
    bits_per_weight: float
    manifest: Mapping[str, Any] = field(default_factory=dict)
    decoder: Decoder | None = None
    fallback: str | None = None
    caches: Mapping[str, CacheEntry] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a text, as generation config and tokenizer name them."""
        config = getattr(self.model, "generation_config", None)
        ids = getattr(config, "eos_token_id", None)
        listed = (*(ids if isinstance(ids, list) else [ids]), self.tokenizer.eos_token_id)
        return frozenset(int(i) for i in listed if i is not None)

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """fp32 logits ``[n, vocab]`` after each of a text's tokens."""
        import torch

        if self.decoder is not None:
            from quantkit.models.paged import PagedRunner, PagedSequence, Work, pages_for

            runner = PagedRunner(self.decoder, pages_for(len(token_ids)))
            return runner.logits([Work(PagedSequence(), token_ids, all_logits=True)])[0]
        ids = torch.tensor([list(token_ids)], device=self.device)
        with torch.inference_mode():
            return self.model(input_ids=ids, use_cache=False).logits[0].float()
