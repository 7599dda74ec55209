"""Rotations of a whole model, folded into its weights.

`STREAMS` says for each architecture who reads and who writes the residual stream in a block. An
RMS norm without weights commutes with any rotation of its input, so that each norm's weight first
moves into the layers behind it. What is rotated then is, in fp64 and rounded once:

    the embedding E Q · norms' readers (W diag(γ)) Q · writers Qᵀ W · the head (W diag(γ)) Q

and between v_proj and o_proj, whose heads attention mixes by tokens and never by channels, each
head's own columns. The head is no longer the embedding's transpose: it needs bytes of its own.

Between up_proj and down_proj the gate multiplies channel by channel. It commutes with the signs of
Q = diag(s) H / √n, which fold into up_proj's rows, and not with H, which multiplies the input of
down_proj (W Q) at inference: `quantkit.ops.hadamard`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkit import hadamard, memory, numerics, ops
from quantkit import model as models
from quantkit.algorithms import ROTATE
from quantkit.algorithms.rotate import Rotation, filled_in, turned
from quantkit.errors import QuantkitError, UsageError
from quantkit.folding import ONE_PLUS_NORMS
from quantkit.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Streams:
    """A block's linear layers by what they have to do with rotated tensors.

    Attributes:
        readers: norm → the layers that read its output; all of them.
        writers: the layers whose output is added to the residual stream.
        values: the layer that makes the values of attention, and the one that reads its result.
        up: the layer whose last rows the gate is multiplied by.
        no_residual, no_heads: why the residual stream, or the heads, cannot be rotated.
    """

    readers: dict[str, tuple[str, ...]]
    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    values: tuple[str, str] = ("self_attn.v_proj", "self_attn.o_proj")
    up: str = "mlp.up_proj"
    no_residual: str = ""
    no_heads: str = ""


_LLAMA = Streams(
    {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
)
_BRANCH_NORMS = replace(
    _LLAMA,
    no_residual="norms behind attention and MLP scale what is added to the residual stream "
    "channel by channel, and no rotation passes through that",
)

#: Architecture (``config.model_type``) → its streams.
STREAMS: dict[str, Streams] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _BRANCH_NORMS,
    "gemma3_text": _BRANCH_NORMS,
    "olmo2": _BRANCH_NORMS,
    "phi3": Streams(
        {
            "input_layernorm": ("self_attn.qkv_proj",),
            "post_attention_layernorm": ("mlp.gate_up_proj",),
        },
        up="mlp.gate_up_proj",
        no_heads="the values are some rows of a fused layer",
    ),
}


@dataclass(frozen=True)
class PlannedRotation:
    """What is rotated.

    Attributes:
        residual, heads, mlp, seed: the options of `quantkit.algorithms.rotate`.
        head_bytes: what the untied head adds to the export; 0 if it was not tied, or is quantized.
        down: the layers whose inputs are multiplied by a Hadamard matrix at inference; those that
            are kept at 16 bits stay as they are.
    """

    residual: bool
    heads: bool
    seed: int
    mlp: bool = False
    head_bytes: int = 0
    down: tuple[str, ...] = ()

    def turns(self, name: str, model: PreTrainedModel) -> bool:
        """Whether a linear layer's weight is rotated: all of them, or those of the values and of
        the MLP."""
        streams = STREAMS[_kind(model)]
        folded = self.residual or (self.heads and name.endswith(streams.values))
        down = name.removesuffix(streams.up) + streams.writers[-1]
        return folded or name in self.down or down in self.down

    def order(self, name: str, inputs: int) -> int:
        """Of the Hadamard matrix that multiplies a layer's ``inputs`` channels at inference, 0 for
        none."""
        return hadamard.largest_order(inputs) if name in self.down else 0


def plan_rotation(
    recipe: Recipe, model: PreTrainedModel, quantized: Collection[str]
) -> PlannedRotation | None:
    """A recipe's rotation, or None.

    Args:
        recipe: its own algorithm list may begin with one.
        model: what will be rotated.
        quantized: names of the layers that the recipe quantizes.

    Raises:
        UsageError: it is not the first of the recipe's own list, or does not fold into this model.
    """
    for rule in recipe.rules:
        if any(step.name == ROTATE for step in rule.algorithm or ()):
            raise UsageError(
                f"rule {rule.match!r}: rotate turns the whole model, not single layers",
                remedy="name it first in the recipe's own algorithm list",
            )
    names = [step.name for step in recipe.algorithm]
    if ROTATE not in names:
        return None
    if names.count(ROTATE) > 1 or names[0] != ROTATE:
        raise UsageError(
            f"algorithm list {names}: rotate comes once, before everything else",
            remedy="write it first: rescalers and solvers work on the rotated model",
        )
    rotation = PlannedRotation(**filled_in(recipe.algorithm[0].options))
    _check_folds(model, rotation)
    if rotation.residual and models.is_tied(model) and models.head_name(model) not in quantized:
        weight: Any = model.get_output_embeddings().weight
        rotation = replace(rotation, head_bytes=weight.numel() * weight.element_size())
    return replace(rotation, down=_down(model, quantized)) if rotation.mlp else rotation


def _down(model: PreTrainedModel, quantized: Collection[str]) -> tuple[str, ...]:
    """The quantized layers behind a gate. Raises UsageError where there is none."""
    prefix, blocks = models.find_blocks(model)
    leaf = STREAMS[_kind(model)].writers[-1]
    names = [f"{prefix}.{index}.{leaf}" for index in range(len(blocks))]
    found = tuple(name for name in names if name in quantized)
    if not found:
        raise UsageError(
            f"rotate: mlp: turns the inputs of quantized layers, and no {leaf} is quantized",
            remedy="set `mlp: false`, or quantize it",
        )
    return found


def _check_folds(model: PreTrainedModel, rotation: PlannedRotation) -> None:
    """Refuse a model that cannot be rotated so.

    Raises:
        UsageError: an architecture that `STREAMS` does not know, or that no such rotation folds
            into; a block that is not as the table says.
    """
    kind = _kind(model)
    if kind not in STREAMS:
        raise UsageError(
            f"architecture {kind!r}: which layers a rotation folds into is known only for "
            f"{', '.join(STREAMS)}",
            remedy="take rotate out of the algorithm list, or add a row to "
            "quantkit.rotation.STREAMS",
        )
    streams = STREAMS[kind]
    if rotation.residual and model.config.get_text_config() is not model.config:
        raise UsageError(
            f"rotate: residual: {model.config.model_type!r} has other inputs than tokens, whose "
            "embeddings would enter the residual stream unrotated",
            remedy="set `residual: false`",
        )
    for option, reason in (("residual", streams.no_residual), ("heads", streams.no_heads)):
        if getattr(rotation, option) and reason:
            raise UsageError(
                f"rotate: {option}: architecture {kind!r}: {reason}",
                remedy=f"set `{option}: false`",
            )
    known = {name for names in streams.readers.values() for name in names} | {*streams.writers}
    prefix, blocks = models.find_blocks(model)
    for index, block in enumerate(blocks):
        found = {name for name, m in block.named_modules() if isinstance(m, nn.Linear)}
        if found != known:
            raise UsageError(
                f"rotate: {prefix}.{index} has the linear layers {sorted(found)} where {kind!r} "
                f"has {sorted(known)}",
                remedy="take rotate out of the algorithm list",
            )
    # A size without a Hadamard matrix is refused where the rotation is made.
    if rotation.residual:
        _residual(model, rotation)
    if rotation.heads:
        _heads(model, rotation, 0)
    if rotation.mlp:
        _middle(model, rotation, 0)


def rotate_ends(model: PreTrainedModel, rotation: PlannedRotation) -> None:
    """Rotate the embedding and the head, and fold the final norm into the head.

    Args:
        model: its parameters are replaced; the head must be untied.
        rotation: what was planned.

    Raises:
        QuantkitError: a weight that is not finite.
    """
    if not rotation.residual:
        return
    assert not models.is_tied(model), "a tied head would be rotated twice"
    residual = _residual(model, rotation)
    embedding: Any = model.get_input_embeddings()
    _replace(embedding, "weight", turned(embedding.weight, inputs=residual), "the embedding")
    norm: Any = model.base_model.norm
    _turn(model.get_output_embeddings(), "the head", _taken(norm, model), residual, None)
    _clear(norm, model)


def rotate_block(model: PreTrainedModel, index: int, rotation: PlannedRotation) -> None:
    """Rotate one block's weights and fold its norms; see `rotate_ends`.

    From now on the inputs of `PlannedRotation.down` are multiplied, in front of every other hook.
    """
    prefix, blocks = models.find_blocks(model)
    block = blocks[index]
    streams = STREAMS[_kind(model)]
    residual = _residual(model, rotation) if rotation.residual else None
    heads = _heads(model, rotation, index) if rotation.heads else None
    down = streams.writers[-1]
    online = f"{prefix}.{index}.{down}" in rotation.down
    middle = _middle(model, rotation, index) if online else None
    norms = {name: norm for norm, names in streams.readers.items() for name in names}
    for name in (*norms, *streams.writers):
        made, read = (heads if name == value else None for value in streams.values)
        scale = inputs = outputs = None
        if name in norms:
            inputs, outputs = residual, made
            scale = _taken(block.get_submodule(norms[name]), model) if residual else None
        else:
            inputs, outputs = middle if name == down else read, residual
        if inputs is not None or outputs is not None:
            layer = block.get_submodule(name)
            _turn(layer, f"{prefix}.{index}.{name}", scale, inputs, outputs)
    if residual is not None:
        for name in streams.readers:
            _clear(block.get_submodule(name), model)
    if middle is not None:
        _flip(block.get_submodule(streams.up), f"{prefix}.{index}.{streams.up}", middle.signs)
        _multiply_input(block.get_submodule(down), middle.order)


def residual_writer(model: PreTrainedModel) -> str | None:
    """The layer whose output ends a block, by its name in the block: what its errors cost is what
    the block's cost. None where a norm stands between, or the architecture has no table."""
    streams = STREAMS.get(_kind(model))
    return None if streams is None or streams.no_residual else streams.writers[-1]


def _kind(model: PreTrainedModel) -> str:
    return str(model.config.get_text_config().model_type)


def _residual(model: PreTrainedModel, rotation: PlannedRotation) -> Rotation:
    return Rotation.random(models.embedding_shape(model)[1], rotation.seed, "the residual stream")


def _heads(model: PreTrainedModel, rotation: PlannedRotation, index: int) -> Rotation:
    """One for all heads of a block: query heads share the values of their key-value head."""
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Rotation.random(width, rotation.seed, f"the heads of block {index}")


def _middle(model: PreTrainedModel, rotation: PlannedRotation, index: int) -> Rotation:
    down: Any = models.find_blocks(model)[1][index].get_submodule(STREAMS[_kind(model)].writers[-1])
    return Rotation.random(down.in_features, rotation.seed, f"the MLP of block {index}")


def _flip(layer: Any, name: str, signs: Tensor) -> None:
    """Multiply a layer's last outputs by signs: exact in every dtype."""
    rows = torch.ones(layer.out_features, dtype=signs.dtype)
    rows[-len(signs) :] = signs
    rows = rows.to(layer.weight)
    _replace(layer, "weight", layer.weight * rows[:, None], name)
    if layer.bias is not None:
        _replace(layer, "bias", layer.bias * rows, name)


def _multiply_input(layer: Any, order: int) -> None:
    """Multiply a layer's input by H / √order, in what the reference kernels compute."""
    factor = hadamard.factor(order).to(layer.weight.device)
    product = ops.get_backend("reference").hadamard

    def turn(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (product(inputs[0], factor, order), *inputs[1:])

    layer.register_forward_pre_hook(turn, prepend=True)


def _taken(norm: Any, model: PreTrainedModel) -> Tensor:
    """What a norm multiplies by, fp64 ``[hidden]``."""
    weight: Tensor = norm.weight
    return weight.double() + _offset(model)


def _clear(norm: Any, model: PreTrainedModel) -> None:
    """Let a norm multiply by one."""
    one = torch.full_like(norm.weight, 1.0 - _offset(model))
    norm.weight = nn.Parameter(one, requires_grad=False)


def _offset(model: PreTrainedModel) -> float:
    """What a norm adds to its weight before it multiplies."""
    return 1.0 if _kind(model) in ONE_PLUS_NORMS else 0.0


def _turn(
    layer: Any,
    name: str,
    scale: Tensor | None,
    inputs: Rotation | None,
    outputs: Rotation | None,
) -> None:
    weight = turned(layer.weight, scale=scale, inputs=inputs, outputs=outputs)
    _replace(layer, "weight", weight, name)
    if outputs is not None and layer.bias is not None:
        bias = turned(layer.bias[None], inputs=outputs)[0]
        _replace(layer, "bias", bias, name)


def _replace(module: Any, leaf: str, new: Tensor, name: str) -> None:
    old = getattr(module, leaf)
    if not numerics.is_finite(new):
        raise QuantkitError(
            f"{name}: the rotated {leaf} is not finite in {new.dtype}",
            remedy="load the model in bfloat16, or check the checkpoint",
        )
    setattr(module, leaf, nn.Parameter(new, requires_grad=False))
    memory.forget_pages(old)
