"""Scalings that fold: any positive one leaves the model's function alone, in every family."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quantkit.errors import QuantkitError, UsageError
from quantkit.folding import PAIRS, apply_scales, find_folds

COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
#: (model type, what differs from COMMON)
VARIANTS = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 6, "head_dim": 16}),
    ("mistral", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 16}),
    ("smollm3", {}),
    ("gemma", {"head_dim": 16, "tie_word_embeddings": True}),
    ("gemma2", {"head_dim": 16}),
    ("gemma3_text", {"head_dim": 16}),
    ("olmo2", {}),
    ("phi3", {}),
]
IDS = torch.randint(1, 97, (2, 24), generator=torch.Generator().manual_seed(1))


def make(kind: str, extra: dict, dtype: torch.dtype = torch.float32) -> PreTrainedModel:  # type: ignore[type-arg]
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **{**COMMON, **extra})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases are 1 and 0 until trained
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "proj" in name:
                parameter.mul_(4.0)
    return model.to(dtype)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS).logits.float()


def random_scales(folds: list, spread: float, seed: int) -> dict[str, torch.Tensor]:  # type: ignore[type-arg]
    generator = torch.Generator().manual_seed(seed)
    return {
        fold.producer: torch.exp(torch.randn(fold.outputs, generator=generator) * spread)
        for fold in folds
    }


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def test_every_architecture_has_a_variant() -> None:
    assert {kind for kind, _ in VARIANTS} == set(PAIRS)


@pytest.mark.parametrize(("kind", "extra"), VARIANTS)
@settings(max_examples=8, deadline=None)
@given(spread=st.floats(0.0, 1.5), seed=st.integers(0, 2**31 - 1))
def test_any_scaling_keeps_the_function(kind: str, extra: dict, spread: float, seed: int) -> None:  # type: ignore[type-arg]
    model = make(kind, extra)
    before = logits(model)
    folds, _ = find_folds(model)
    changed = {name: p.clone() for name, p in model.named_parameters()}
    apply_scales(model, folds, random_scales(folds, spread + 0.05, seed))
    after = dict(model.named_parameters())
    for fold in folds:
        for name in (fold.producer, *fold.consumers):
            assert not torch.equal(after[f"{name}.weight"], changed[f"{name}.weight"])
    assert relative(logits(model), before) < 1e-5


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize(("kind", "extra"), VARIANTS)
def test_sixteen_bit_weights_change_by_their_rounding(
    kind: str,
    extra: dict,  # type: ignore[type-arg]
    dtype: torch.dtype,
    rounding: float,
) -> None:
    """The function of the 16-bit weights, computed in fp32, so that only they are rounded."""
    model = make(kind, extra, dtype).float()
    before = logits(model)
    model = make(kind, extra, dtype)
    folds, _ = find_folds(model)
    apply_scales(model, folds, random_scales(folds, 0.7, 0))
    # Layers that are producer and consumer are rounded twice; norms not at all.
    assert relative(logits(model.float()), before) < 4 * rounding


@pytest.mark.parametrize(("kind", "extra"), VARIANTS)
def test_powers_of_two_cost_no_rounding(kind: str, extra: dict) -> None:  # type: ignore[type-arg]
    model = make(kind, extra, torch.bfloat16).float()
    before = logits(model)
    model = make(kind, extra, torch.bfloat16)
    folds, _ = find_folds(model)
    # 1 + w is not a power-of-two multiple in Gemma's stored form: its norms get ratios of 1.
    scales = {
        fold.producer: torch.full((fold.outputs,), 1.0 if fold.offset else 4.0) for fold in folds
    }
    apply_scales(model, folds, scales)
    assert relative(logits(model.float()), before) < 1e-5


def test_query_heads_share_their_key_value_heads_scales() -> None:
    model = make("llama", {})
    fold = next(f for f in find_folds(model)[0] if f.producer.endswith("v_proj"))
    assert (fold.outputs, fold.repeats, fold.run) == (16, 3, 8)
    channels = fold.channels().reshape(6, 8)
    expected = [[kv * 8 + i for i in range(8)] for kv in (0, 0, 0, 1, 1, 1)]
    assert channels.tolist() == expected


def test_a_norm_channel_of_zero_stays_as_it_is() -> None:
    for kind, dead in (("llama", 0.0), ("gemma", -1.0)):
        model = make(kind, {})
        folds, _ = find_folds(model)
        norm = model.get_submodule(folds[0].producer)
        norm.weight.data[5] = dead
        q = model.get_submodule(folds[0].consumers[0]).weight.clone()
        before = logits(model)
        apply_scales(model, folds, random_scales(folds, 0.5, 2))
        assert float(norm.weight[5]) == dead
        assert torch.equal(model.get_submodule(folds[0].consumers[0]).weight[:, 5], q[:, 5])
        assert relative(logits(model), before) < 1e-5


def test_pairs_that_cannot_take_a_scaling_are_reported() -> None:
    folds, found = find_folds(make("olmo2", {}))
    refused = {r.label: r.reason for r in found}
    assert [f.producer.rpartition(".")[2] for f in folds] == ["v_proj", "up_proj"] * 2
    assert refused["model.layers.1.residual → q_proj, k_proj, v_proj"].startswith("these layers")
    refused = {r.label: r.reason for r in find_folds(make("phi3", {}))[1]}
    assert refused["model.layers.0.mlp.gate_up_proj → down_proj"] == (
        "the producer is some rows of a fused layer"
    )
    model = make("llama", {})
    model.model.layers[0].input_layernorm.weight = None
    folds, found = find_folds(model)
    assert len(folds) == 7
    assert {r.label: r.reason for r in found} == {
        "model.layers.0.input_layernorm → q_proj, k_proj, v_proj": "input_layernorm has no weight"
    }


def test_unknown_architectures_are_named() -> None:
    config = AutoConfig.for_model("gpt_neox", hidden_size=32, num_attention_heads=2)
    config.num_hidden_layers, config.intermediate_size = 1, 64
    with pytest.raises(UsageError, match=r"'gpt_neox'.*known only for llama, .*; take the resc"):
        find_folds(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_scales_must_be_positive_and_finite(bad: float) -> None:
    model = make("llama", {})
    folds, _ = find_folds(model)
    scales = random_scales(folds, 0.1, 0)
    scales[folds[0].producer][7] = bad
    with pytest.raises(QuantkitError, match=r"1 of \(48,\) scales are not positive and finite"):
        apply_scales(model, folds, scales)


def test_a_weight_that_overflows_is_an_error() -> None:
    model = make("llama", {}, torch.float16)
    folds, _ = find_folds(model)
    scales = random_scales(folds, 0.1, 0)
    scales[folds[2].producer][0] = 1e7
    with pytest.raises(QuantkitError, match=r"scaled weight is not finite in torch\.float16"):
        apply_scales(model, folds, scales)
