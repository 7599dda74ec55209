"""A transformers model of the Llama family as a native decoder.

One table says what a family does differently; everything else is read off the model's modules.
A model that the table does not hold, or that has a part the native decoder does not know, is not
an error: `why_not` says what stands in the way and the model runs in transformers' own modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.layers import QuantLinear
from quantkit.models.decoder import Decoder
from quantkit.models.linears import Linears, unknown_input
from quantkit.ops.decoder import Hadamard, Layer, NativeDecoder, Shape
from quantkit.ops.page_store import CacheScales

#: Positions that every decoder has tables for.
LEAST_POSITIONS = 4096

#: Scalings of rotary positions that do not depend on the length of the text.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Family:
    """What one architecture does differently from Llama.

    Attributes:
        norm_offset: norms multiply by ``offset + weight``.
        branch_norms: norms stand behind attention and MLP, too, and have Gemma 2's names.
        head_norms: queries and keys are normalized a head at a time.
        rope_by_layer_type: each layer type has its own rotary frequencies.
        window: what slides: "never", "all" layers, or those of "layer_types".
    """

    norm_offset: float = 0.0
    branch_norms: bool = False
    head_norms: bool = False
    rope_by_layer_type: bool = False
    window: str = "never"


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(),
        "mistral": Family(window="all"),
        "qwen2": Family(window="layer_types"),
        "qwen3": Family(head_norms=True, window="layer_types"),
        "gemma": Family(norm_offset=1.0),
        "gemma2": Family(norm_offset=1.0, branch_norms=True, window="layer_types"),
        "gemma3_text": Family(
            norm_offset=1.0,
            branch_norms=True,
            head_norms=True,
            rope_by_layer_type=True,
            window="layer_types",
        ),
    }
)

_GATES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def why_not(model: Any) -> str | None:
    """What keeps a transformers model from running natively, or None."""
    config = model.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        return f"architecture {config.model_type!r} has no native decoder"
    if model.device.type != "cpu":
        return f"the native decoder runs on the CPU, the model is on {model.device}"
    head_dim = _head_dim(config)
    if head_dim % 16 or head_dim > 512:
        return f"head_dim {head_dim} is not a multiple of 16 up to 512"
    if _activation(config) not in _GATES:
        return f"activation {_activation(config)!r} is not one of {', '.join(_GATES)}"
    for kind in _rope_types(config):
        if kind not in STATIC_ROPE:
            return f"rotary scaling {kind!r} depends on the length of the text"
    if getattr(config, "use_bidirectional_attention", False):
        return "attention is bidirectional"
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            if module.kind == "reference":
                return "the reference kernels were asked for"
            reason = unknown_input(module)
            if module.hadamard and not name.endswith("mlp.down_proj"):
                reason = "its input is rotated, which is native in front of down_proj only"
            if reason:
                return f"{name}: {reason}"
    return None


def build_decoder(
    model: Any, *, activations: str = "auto", cache_scales: CacheScales | None = None
) -> Decoder:
    """Make a native decoder of a transformers model for which `why_not` is None.

    The weights move: quantized layers go on sharing them, while the model's other linear layers
    are left without (on the meta device), so that nothing is held twice.

    Args:
        model: a causal language model on the CPU; its linear layers are `QuantLinear` or
            ``nn.Linear``. bf16 models multiply floats in bf16, others in fp32.
        activations: of weight-only schemes: "int8" rounds them to int8 with a scale for each
            group of columns, "float" leaves them as they are, "auto" is int8 for bf16 models.
        cache_scales: of the checkpoint's keys and values, if it has some.
    """
    config = model.config
    family = FAMILIES[config.model_type]
    base = model.model
    precision = "bf16" if model.dtype == torch.bfloat16 else "fp32"
    if activations == "auto":
        activations = "int8" if precision == "bf16" else "float"
    embedding = base.embed_tokens.weight.detach().contiguous()
    shape = _shape(config, base)
    ropes = _rope_tables(base, config, family, shape.max_positions)
    linears = Linears(precision, activations)
    for block in base.layers:
        for module in _projections(block):
            linears.add(module)
    linears.add(model.get_output_embeddings())
    linears.place()
    # A linear layer without its weight would not fail, but compute nonsense.
    model.forward = _moved
    native = NativeDecoder(
        shape,
        precision,
        [
            _layer(block, index, config, family, linears, ropes)
            for index, block in enumerate(base.layers)
        ],
        embedding,
        _norm(base.norm, family),
        linears[model.get_output_embeddings()],
        cache_scales,
    )
    numerics = linears.numerics()
    if any(_hadamard(block.mlp.down_proj) for block in base.layers):
        numerics += "+rotated-down"
    if cache_scales is not None:
        numerics += f"+kv-{cache_scales.dtype}-static"
    return Decoder(native, numerics)


def _moved(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError("this model's weights have moved to its native decoder: ask Runtime.logits")


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _rope_types(config: Any) -> set[str]:
    parameters = config.rope_parameters or {}
    if "rope_type" in parameters:
        return {str(parameters["rope_type"])}
    return {str(p["rope_type"]) for p in parameters.values() if p is not None}


def _shape(config: Any, base: Any) -> Shape:
    head_dim = _head_dim(config)
    scale = getattr(config, "query_pre_attn_scalar", None) or head_dim
    embed_scale = getattr(base.embed_tokens, "embed_scale", None)
    if embed_scale is not None:
        # The model multiplies in its own dtype, and so by a rounded factor.
        embed_scale = float(embed_scale.to(base.embed_tokens.weight.dtype))
    rotary = int(head_dim * (getattr(config, "partial_rotary_factor", None) or 1.0))
    return Shape(
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        vocab=base.embed_tokens.weight.shape[0],
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=head_dim,
        rotary_dim=rotary,
        # Rotary positions go on beyond what the model was trained for, as in transformers: texts
        # are scored in windows that may be longer than a small model's own.
        max_positions=max(config.max_position_embeddings, LEAST_POSITIONS),
        norm_epsilon=config.rms_norm_eps,
        attention_scale=float(scale) ** -0.5,
        gate=_GATES[_activation(config)],
        attention_softcap=getattr(config, "attn_logit_softcapping", None) or 0.0,
        logit_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
        embedding_scale=1.0 if embed_scale is None else embed_scale,
    )


def _rope_tables(
    base: Any, config: Any, family: Family, positions: int
) -> dict[str | None, tuple[Tensor, Tensor]]:
    """(cos, sin), each ``[positions, rotary_dim / 2]``, by layer type or for all (None)."""
    # fp32, whatever the model's dtype: the module takes the dtype of what it is given.
    like = torch.zeros(1, dtype=torch.float32)
    ids = torch.arange(positions)[None]
    kinds = set(config.layer_types) if family.rope_by_layer_type else {None}
    tables = {}
    for kind in kinds:
        extra = () if kind is None else (kind,)
        cos, sin = base.rotary_emb(like, ids, *extra)
        half = cos.shape[-1] // 2
        tables[kind] = (cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
    return tables


def _norm(module: Any, family: Family) -> Tensor:
    return module.weight.detach().float() + family.norm_offset


def _projections(block: Any) -> list[nn.Module]:
    """The block's linear layers in the order of use."""
    attention, mlp = block.self_attn, block.mlp
    inputs = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*inputs, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _layer(
    block: Any,
    index: int,
    config: Any,
    family: Family,
    linears: Linears,
    ropes: Mapping[str | None, tuple[Tensor, Tensor]],
) -> Layer:
    attention = block.self_attn
    query, key, value, out, gate, up, down = (linears[m] for m in _projections(block))
    layer_types = getattr(config, "layer_types", None)
    kind = layer_types[index] if layer_types else None
    window = 0
    if family.window == "all" or (family.window == "layer_types" and kind == "sliding_attention"):
        window = config.sliding_window or 0
    cos, sin = ropes[kind if family.rope_by_layer_type else None]
    # Gemma 2 and 3 norm a branch's output, too; then the norm before the MLP has another name.
    before_mlp = (
        block.pre_feedforward_layernorm if family.branch_norms else block.post_attention_layernorm
    )
    return Layer(
        attention_norm=_norm(block.input_layernorm, family),
        qkv=(query, key, value),
        attention_out=(out,),
        mlp_norm=_norm(before_mlp, family),
        gate_up=(gate, up),
        down=(down,),
        rope_cos=cos,
        rope_sin=sin,
        window=window,
        q_norm=_norm(attention.q_norm, family) if family.head_norms else None,
        k_norm=_norm(attention.k_norm, family) if family.head_norms else None,
        post_attention_norm=(
            _norm(block.post_attention_layernorm, family) if family.branch_norms else None
        ),
        post_mlp_norm=(
            _norm(block.post_feedforward_layernorm, family) if family.branch_norms else None
        ),
        down_hadamard=_hadamard(block.mlp.down_proj),
    )


def _hadamard(module: nn.Module) -> Hadamard | None:
    """What multiplies a linear layer's input."""
    if not isinstance(module, QuantLinear) or module.factor is None:
        return None
    return Hadamard(module.hadamard, module.factor)
