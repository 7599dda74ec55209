"""A model that is ready to be scored or served: the noun that evals and serve share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Runtime:
    """A loaded model with its tokenizer and the facts that identify the system.

    Attributes:
        model: a transformers causal language model in eval mode; its linear layers are
            `quantkit.layers.QuantLinear` when it came from a quantized checkpoint.
        tokenizer: the checkpoint's tokenizer.
        name: what the user called it (path or hub id).
        fingerprint: ``model`` (sha256 of the weights), ``tokenizer``, ``chat_template``,
            ``kernels`` (name of the numerics, such as ``native/w4-bf16``), ``dtype``,
            ``device``. Goes into every results file.
        size_bytes: bytes of the weights as stored on disk.
        bits_per_weight: size of the quantized layers against their number of weights,
            scales included; 16 for bf16.
        manifest: the checkpoint's ``quantkit.json``, empty for an original model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: Mapping[str, Any]
    size_bytes: int
    bits_per_weight: float
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.model.device
