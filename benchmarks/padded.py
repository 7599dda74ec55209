"""The same Llama with inputs of whole groups of 128 columns.

    python -m benchmarks.padded MODEL OUT

SmolLM2-135M has 576 columns, which no group of 128 divides, so schemes with such groups cannot be
tried on it. This writes a model that computes what it does: hidden states are filled up with
zeros, and each key-value head gets query heads of zeros, whose columns in ``o_proj`` are zeros,
too. Norms divide by the root of a mean over more columns, so their weights and epsilon shrink.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

GROUP = 128


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a Llama")
    parser.add_argument("out", type=Path, help="folder that is written")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, local_files_only=True)
    if not isinstance(model, LlamaForCausalLM):
        raise SystemExit(f"{args.model}: is a {type(model).__name__}, and only a Llama is padded")
    try:
        wide = padded(model)
    except ValueError as e:
        raise SystemExit(f"{args.model}: {e}") from None
    wide.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model, local_files_only=True).save_pretrained(args.out)
    return 0


def padded(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A model of the same function whose linear layers have multiples of `GROUP` inputs.

    Raises:
        ValueError: its MLP is not of such a width, or its layers have biases, which are not filled
            up here.
    """
    config = copy.deepcopy(model.config)
    if config.attention_bias or config.mlp_bias:
        raise ValueError("its linear layers have biases")
    if config.intermediate_size % GROUP:
        raise ValueError(f"intermediate_size {config.intermediate_size} is no multiple of {GROUP}")
    head_dim = model.model.layers[0].self_attn.head_dim
    shared = config.num_attention_heads // config.num_key_value_heads
    heads = shared
    while heads * config.num_key_value_heads * head_dim % GROUP:
        heads += 1
    config.num_attention_heads = heads * config.num_key_value_heads
    old = new = config.hidden_size
    # transformers wants the heads to divide the hidden size, whatever head_dim is.
    while new % GROUP or new % config.num_attention_heads:
        new += 1
    config.hidden_size, config.head_dim = new, head_dim
    config.rms_norm_eps *= old / new
    wide = LlamaForCausalLM(config).to(model.dtype).eval()

    def with_heads(weight: Tensor) -> Tensor:
        """``[heads · head_dim, K]`` with the new query heads."""
        each = weight.view(config.num_key_value_heads, shared * head_dim, -1)
        return _filled(each, 1, heads * head_dim).flatten(0, 1)

    state = {}
    for name, value in model.state_dict().items():
        if name.endswith("norm.weight"):
            found = _filled(value * (old / new) ** 0.5, 0, new)
        elif name.endswith("q_proj.weight"):
            found = _filled(with_heads(value), 1, new)
        elif name.endswith("o_proj.weight"):
            found = _filled(with_heads(value.t()).t(), 0, new)
        elif name.endswith("down_proj.weight"):
            found = _filled(value, 0, new)
        else:  # what reads hidden states
            found = _filled(value, 1, new)
        state[name] = found.contiguous()
    wide.load_state_dict(state)
    wide.generation_config = model.generation_config
    return wide


def _filled(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Zeros behind a dimension."""
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


if __name__ == "__main__":
    sys.exit(main())
