"""Per-channel scalings of a layer's input that fold into the weights on both sides of it.

Where every channel j of a tensor x is made by one *producer* (a norm's weight, a row of a linear
layer) and read only by linear *consumers*, dividing the producer by s_j and multiplying the
consumers' columns by s_j leaves the model's function unchanged. Rescalers choose s so that what
is quantized afterwards rounds better.

`PAIRS` says for each architecture which producers and consumers there are in a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantkit import memory, numerics
from quantkit import model as models
from quantkit.errors import QuantkitError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Pair:
    """A producer and its consumers, by module name inside a block.

    Attributes:
        producer: a norm or a linear layer.
        consumers: the linear layers that read its output, all of them.
        refused: why no scaling folds here, for a tensor that looks as if one did.
    """

    producer: str
    consumers: tuple[str, ...]
    refused: str = ""


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj")
# Attention mixes tokens, never channels of v; the gate multiplies up_proj channel by channel.
_INNER = (
    Pair("self_attn.v_proj", ("self_attn.o_proj",)),
    Pair("mlp.up_proj", ("mlp.down_proj",)),
)
_LLAMA = (Pair("input_layernorm", _QKV), Pair("post_attention_layernorm", _GATED), *_INNER)
_GEMMA2 = (Pair("input_layernorm", _QKV), Pair("pre_feedforward_layernorm", _GATED), *_INNER)
_NO_NORM = "these layers read the residual stream itself, which no norm precedes"
_FUSED = "the producer is some rows of a fused layer"

#: Architecture (``config.model_type``) → its pairs, in the order in which they are scaled.
PAIRS: dict[str, tuple[Pair, ...]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "olmo2": (
        Pair("residual", _QKV, _NO_NORM),
        Pair("residual", _GATED, _NO_NORM),
        *_INNER,
    ),
    "phi3": (
        Pair("input_layernorm", ("self_attn.qkv_proj",)),
        Pair("post_attention_layernorm", ("mlp.gate_up_proj",)),
        Pair("self_attn.qkv_proj", ("self_attn.o_proj",), _FUSED),
        Pair("mlp.gate_up_proj", ("mlp.down_proj",), _FUSED),
    ),
}

#: Architectures whose norms multiply by 1 + weight.
ONE_PLUS_NORMS = frozenset({"gemma", "gemma2", "gemma3_text"})


def norm_offset(model: PreTrainedModel) -> float:
    """What the model's norms add to their weight before they multiply."""
    return 1.0 if model.config.get_text_config().model_type in ONE_PLUS_NORMS else 0.0


@dataclass(frozen=True)
class Fold:
    """One place of one block where a scaling folds.

    Attributes:
        block: index of the decoder block.
        producer, consumers: dotted module names.
        outputs: P, the producer's channels; a scaling has one value for each.
        of_norm: the producer is a norm, not a linear layer.
        repeats: consumers read each run of ``run`` channels this many times in a row: the query
            heads of one key-value head. K = P · repeats columns.
        run: channels in such a run (a head).
        offset: what the producer adds to its weight before it multiplies: 1 for Gemma's norms.
    """

    block: int
    producer: str
    consumers: tuple[str, ...]
    outputs: int
    of_norm: bool
    repeats: int = 1
    run: int = 1
    offset: float = 0.0

    @property
    def label(self) -> str:
        """``producer → consumers``, for people."""
        return _label(self.producer, self.consumers)

    def channels(self) -> Tensor:
        """The producer's channel behind each column of the consumers, int64 ``[K]``."""
        return torch.arange(self.outputs).view(-1, 1, self.run).repeat(1, self.repeats, 1).flatten()


@dataclass(frozen=True)
class Refused:
    """A pair of one block that cannot take a scaling, and why."""

    producer: str
    consumers: tuple[str, ...]
    reason: str

    @property
    def label(self) -> str:
        """``producer → consumers``, for people."""
        return _label(self.producer, self.consumers)


def find_folds(model: PreTrainedModel) -> tuple[list[Fold], list[Refused]]:
    """Every place of the model's blocks where a scaling folds.

    Returns:
        the folds in the order in which they are scaled, and the pairs that cannot be.

    Raises:
        UsageError: `PAIRS` does not know the architecture.
    """
    config = model.config.get_text_config()
    kind = config.model_type
    if kind not in PAIRS:
        raise UsageError(
            f"architecture {kind!r}: which layers a scaling folds into is known only for "
            f"{', '.join(PAIRS)}",
            remedy="take the rescalers out of the algorithm list, or add a row to "
            "quantkit.folding.PAIRS",
        )
    prefix, blocks = models.find_blocks(model)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    folds: list[Fold] = []
    refused: list[Refused] = []
    for index, block in enumerate(blocks):
        for pair in PAIRS[kind]:
            producer = f"{prefix}.{index}.{pair.producer}"
            consumers = tuple(f"{prefix}.{index}.{name}" for name in pair.consumers)
            modules = dict(block.named_modules())
            reason = pair.refused or _cannot(pair, modules)
            if reason:
                refused.append(Refused(producer, consumers, reason))
                continue
            outputs = modules[pair.producer].weight.shape[0]
            columns = modules[pair.consumers[0]].in_features
            grouped = columns != outputs
            if grouped and columns * kv_heads != outputs * heads:
                reason = (
                    f"{outputs} channels are read as {columns} columns by {heads} query heads "
                    f"of {kv_heads} key-value heads"
                )
                refused.append(Refused(producer, consumers, reason))
                continue
            of_norm = not isinstance(modules[pair.producer], nn.Linear)
            folds.append(
                Fold(
                    index,
                    producer,
                    consumers,
                    outputs,
                    of_norm,
                    repeats=heads // kv_heads if grouped else 1,
                    run=outputs // kv_heads if grouped else 1,
                    offset=1.0 if kind in ONE_PLUS_NORMS and of_norm else 0.0,
                )
            )
    return folds, refused


def apply_scales(model: nn.Module, folds: Sequence[Fold], scales: Mapping[str, Tensor]) -> None:
    """Divide each producer's channels by its scales and multiply the consumers' columns by them.

    A norm's weight is rounded first, and the consumers get the ratio that the rounded weight
    really stands for, so that its rounding costs nothing. A channel whose weight is zero, or
    would become so, stays as it is.

    Args:
        model: its parameters are replaced.
        folds: in the order of `find_folds`: a layer may be one fold's producer and another's
            consumer, and rounds once for each.
        scales: fp32 ``[P]`` by producer.

    Raises:
        QuantkitError: a scale that is not positive and finite, or a weight that overflows.
    """
    for fold in folds:
        scale = scales[fold.producer].float()
        bad = ~(scale.isfinite() & (scale > 0))
        if scale.shape != (fold.outputs,) or bool(bad.any()):
            raise QuantkitError(
                f"{fold.label}: {int(bad.sum())} of {tuple(scale.shape)} scales are not positive "
                f"and finite, where {fold.outputs} are needed"
            )
        producer = model.get_submodule(fold.producer)
        scale = scale.to(_tensor(producer, "weight").device)
        if fold.of_norm:
            scale = _scale_norm(producer, scale, fold)
        else:
            weight = _tensor(producer, "weight").float()
            _replace(producer, "weight", weight / scale[:, None], fold)
        if getattr(producer, "bias", None) is not None:
            _replace(producer, "bias", _tensor(producer, "bias").float() / scale, fold)
        columns = scale[fold.channels().to(scale.device)]
        for name in fold.consumers:
            consumer = model.get_submodule(name)
            _replace(consumer, "weight", _tensor(consumer, "weight").float() * columns, fold)


def _scale_norm(norm: nn.Module, scale: Tensor, fold: Fold) -> Tensor:
    """Fold into a norm's weight; returns the scales that the rounded weight stands for."""
    weight = _tensor(norm, "weight")
    before = weight.float() + fold.offset
    after = (before / scale - fold.offset).to(weight.dtype)
    exact = before / (after.float() + fold.offset)
    usable = exact.isfinite() & (exact > 0)
    _replace(norm, "weight", torch.where(usable, after, weight), fold)
    return torch.where(usable, exact, torch.ones_like(exact))


def _replace(module: nn.Module, name: str, value: Tensor, fold: Fold) -> None:
    old = _tensor(module, name)
    new = value.to(old.dtype)
    if not numerics.is_finite(new):
        raise QuantkitError(
            f"{fold.label}: a scaled {name} is not finite in {old.dtype}",
            remedy="load the model in bfloat16, or check the checkpoint",
        )
    setattr(module, name, nn.Parameter(new, requires_grad=False))
    memory.forget_pages(old)


def _tensor(module: nn.Module, name: str) -> Tensor:
    tensor: Tensor = getattr(module, name)
    return tensor


def _cannot(pair: Pair, modules: Mapping[str, nn.Module]) -> str:
    """Why these modules are not what the table takes them for; empty if they are."""
    for name in (pair.producer, *pair.consumers):
        if name not in modules:
            return f"this block has no {name}"
    if getattr(modules[pair.producer], "weight", None) is None:
        return f"{pair.producer} has no weight"
    strange = [name for name in pair.consumers if not isinstance(modules[name], nn.Linear)]
    return f"{strange[0]} is not a linear layer" if strange else ""


def _label(producer: str, consumers: Sequence[str]) -> str:
    parent = consumers[0].rpartition(".")[0]
    leaves = ", ".join(name.removeprefix(f"{parent}.") for name in consumers)
    return f"{producer} → {leaves}"
