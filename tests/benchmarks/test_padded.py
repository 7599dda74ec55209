"""A padded model is the same function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.padded import GROUP, padded


def llama(**options: int) -> LlamaForCausalLM:
    """Like SmolLM2: three query heads a key-value head, and a hidden size that 128 divides not."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 64, "hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "tie_word_embeddings": True, "rms_norm_eps": 1e-3,
        }
        | options
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(weight, 1.0, 0.2)
    return model


def test_a_padded_model_says_the_same(tmp_path: Path) -> None:
    model = llama()
    padded(model).save_pretrained(tmp_path)  # which checks its shape
    wide = LlamaForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(wide(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    inputs = [m.in_features for m in wide.model.modules() if isinstance(m, torch.nn.Linear)]
    assert inputs
    assert all(width % GROUP == 0 for width in inputs)
    assert wide.config.tie_word_embeddings
    assert model.config.hidden_size == 192


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"intermediate_size": 250}, "intermediate_size 250 is no multiple of 128"),
        ({"attention_bias": True}, "have biases"),
        ({"mlp_bias": True}, "have biases"),
    ],
)
def test_what_cannot_be_filled_up_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        padded(llama(**options))
