"""Keys and values of the tokens seen so far, and how many of them memory has room for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch
from transformers import DynamicCache

from quantkit.errors import UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from quantkit.models.runtime import Runtime

#: Share of the memory free at start that the cache may grow into; the rest is for activations.
MEMORY_SHARE = 0.5


class KVCache:
    """One sequence's keys and values: ``[1, kv_heads, tokens, head_dim]`` a layer."""

    def __init__(self, config: PretrainedConfig) -> None:
        self._config = config
        self.past = DynamicCache(config=config)

    def clear(self) -> None:
        """Forget every token and free what they held."""
        self.past = DynamicCache(config=self._config)

    def __len__(self) -> int:
        return int(self.past.get_seq_length())

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        tensors = (
            getattr(layer, name, None) for layer in self.past.layers for name in ("keys", "values")
        )
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class Capacity:
    """What an engine can hold: tokens of one sequence, and of all together."""

    max_context: int
    kv_tokens: int


def bytes_per_token(model: PreTrainedModel) -> int:
    """KV cache bytes of one token over all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize


def token_bytes(runtimes: Sequence[Runtime]) -> int | None:
    """Bytes of one token's keys and values in native decoders, of all models together; None where
    there is no decoder."""
    decoders = [runtime.decoder for runtime in runtimes]
    return sum(decoder.token_nbytes() for decoder in decoders if decoder) or None


def plan_capacity(
    model: PreTrainedModel,
    *,
    max_context: int | None,
    max_sequences: int,
    token_bytes: int | None = None,
    kv_tokens: int | None = None,
) -> Capacity:
    """Fit context length and cache size to the model and to the memory that is free.

    An explicit ``max_context`` is a promise, so it is refused when it cannot be kept; without
    one the context is as long as the model and the memory allow. ``token_bytes``: keys and
    values of one token; by default what transformers' cache takes. ``kv_tokens``: tokens of all
    together; by default what memory allows and ``max_sequences`` of full length can use.
    """
    trained = int(model.config.get_text_config().max_position_embeddings)
    if max_context is not None and not 2 <= max_context <= trained:
        raise UsageError(f"max context {max_context} is not between 2 and the model's {trained}")
    affordable = int(_free_memory(model.device) * MEMORY_SHARE) // (
        token_bytes or bytes_per_token(model)
    )
    if affordable < (max_context or 2):
        raise UsageError(
            f"max context {max_context or 2} needs more KV cache than memory allows "
            f"({affordable} tokens)",
            remedy="lower --max-context or free memory",
        )
    if kv_tokens is not None:
        if not (max_context or 2) <= kv_tokens <= affordable:
            raise UsageError(
                f"a KV cache of {kv_tokens} tokens is not between one request's "
                f"{max_context or 2} and the {affordable} that memory allows"
            )
        affordable = kv_tokens
    context = max_context or min(trained, affordable)
    return Capacity(context, kv_tokens or min(affordable, context * max_sequences))


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
