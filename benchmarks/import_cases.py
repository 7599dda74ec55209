"""What llm-compressor and AutoRound write in `import_peers.py`: Python that runs where they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: Runs in the peer's environment: quantize, keep the logits and weights, save. IDS is
#: ``[samples, tokens]``.
_QUANTIZE = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
{imports}

model_path, ids_path, out, kept_path = sys.argv[1:5]
ids = torch.load(ids_path)
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(model_path)
{quantize}
with torch.no_grad():
    logits = model(ids[:1]).logits[0].float()
torch.save({{"logits": logits, "weights": weights}}, kept_path)
{save}
tokenizer.save_pretrained(out)
"""

_ONESHOT = """
data = Dataset.from_dict({{
    "input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(),
}})
usual = dict(targets=["Linear"], ignore=["lm_head"])
oneshot(model=model, dataset=data, recipe={recipe}, max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids), shuffle_calibration_samples=False)
schemes = {{name: getattr(m, "quantization_scheme", None) for name, m in model.named_modules()}}
weights = {{
    name: forward_quantize(m, m.weight.data, "weight", schemes[name].weights)
    for name, m in model.named_modules() if schemes[name] and schemes[name].weights
}}
"""

_AUTO_ROUND = """
rows = [{{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}} for row in ids]
tuner = AutoRound(model, tokenizer, {options}, iters=2, nsamples=len(ids), seqlen=ids.shape[1],
                  batch_size=2, dataset=rows, device_map="cpu")
tuner.quantize()
model = tuner.model
weights = {{name: getattr(m, "orig_layer", m).weight.data.clone()
           for name, m in model.named_modules() if name.endswith("_proj")}}
"""


@dataclass(frozen=True)
class Case:
    """What a peer writes, and whether quantkit is to read it."""

    script: str
    refused: str | None = None  #: a part of the refusal, where quantkit runs no such scheme
    activations: bool = False  #: are rounded, too


def _llm_compressor(recipe: str, **facts: Any) -> Case:
    """A recipe as llm-compressor takes it, in Python; ``**usual`` are targets and what is kept."""
    imports = (
        "from datasets import Dataset\nfrom llmcompressor import oneshot\n"
        "from llmcompressor.modifiers.gptq import GPTQModifier\n"
        "from llmcompressor.modifiers.quantization import QuantizationModifier\n"
        "from compressed_tensors.quantization.lifecycle.forward import forward_quantize"
    )
    quantize = _ONESHOT.format(recipe=recipe)
    save = "model.save_pretrained(out, save_compressed=True)"
    return Case(_QUANTIZE.format(imports=imports, quantize=quantize, save=save), **facts)


def _preset(scheme: str, **facts: Any) -> Case:
    return _llm_compressor(f'QuantizationModifier(scheme="{scheme}", **usual)', **facts)


def _auto_round(fmt: str, options: str, **facts: Any) -> Case:
    return Case(
        _QUANTIZE.format(
            imports="from auto_round import AutoRound",
            quantize=_AUTO_ROUND.format(options=options),
            save=f'tuner.save_quantized(out, format="{fmt}", inplace=True)',
        ),
        **facts,
    )


def _bits(bits: int, *, symmetric: bool = True, more: str = "") -> str:
    return f"bits={bits}, group_size=64, sym={symmetric}{more}"


#: Two schemes in one config, the second for layers that the first one's targets hold, too.
_TWO_GROUPS = """QuantizationModifier(ignore=["lm_head", "re:.*layers.1.*k_proj"], config_groups={
    "group_0": dict(targets=["Linear"], weights=dict(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=64)),
    "group_1": dict(targets=["re:.*down_proj"], weights=dict(
        num_bits=8, type="int", symmetric=True, strategy="channel")),
})"""

#: One layer of eight bits and one of sixteen among layers of four.
_MIXED = """, layer_config={
    "model.layers.0.mlp.down_proj": {"bits": 8}, "model.layers.1.self_attn.o_proj": {"bits": 16}}"""

_FP8_CACHE = """QuantizationModifier(scheme="W4A16", **usual, kv_cache_scheme=dict(
    num_bits=8, type="float", strategy="tensor", dynamic=False, symmetric=True))"""

CASES = {
    "llm-compressor GPTQ W4A16": _llm_compressor('GPTQModifier(scheme="W4A16", **usual)'),
    "llm-compressor GPTQ W4A16, actorder": _llm_compressor(
        'GPTQModifier(scheme="W4A16", actorder="static", **usual)'
    ),
    "llm-compressor W4A16_ASYM": _preset("W4A16_ASYM"),
    "llm-compressor W8A16": _preset("W8A16"),
    "llm-compressor W3A16": _preset("W3A16"),
    "llm-compressor two groups": _llm_compressor(_TWO_GROUPS),
    "llm-compressor W4A16, fp8 cache": _llm_compressor(_FP8_CACHE, activations=True),
    "llm-compressor W8A8": _preset("W8A8", activations=True),
    "llm-compressor W4A8": _preset("W4A8", activations=True),
    "llm-compressor W4AFP8": _preset("W4AFP8", activations=True),
    "llm-compressor W4A4": _preset("W4A4", refused="input_activations"),
    "llm-compressor FP8_DYNAMIC": _preset("FP8_DYNAMIC", activations=True),
    "llm-compressor FP8": _preset("FP8", activations=True),
    "llm-compressor FP8_BLOCK": _preset("FP8_BLOCK", activations=True),
    "llm-compressor NVFP4A16": _preset("NVFP4A16"),
    "llm-compressor NVFP4": _preset("NVFP4", refused="input_activations"),
    "llm-compressor MXFP4A16": _preset("MXFP4A16"),
    "llm-compressor MXFP4": _preset("MXFP4", refused="input_activations"),
    "llm-compressor MXFP8A16": _preset("MXFP8A16", refused="mxfp8"),
    "AutoRound auto_round": _auto_round("auto_round", _bits(4)),
    "AutoRound auto_round, asymmetric": _auto_round(
        "auto_round:gptqmodel", _bits(4, symmetric=False)
    ),
    "AutoRound auto_round, 2 bits": _auto_round("auto_round", _bits(2)),
    "AutoRound auto_round, 3 bits": _auto_round("auto_round", _bits(3)),
    "AutoRound auto_round, 8 bits": _auto_round("auto_round", _bits(8)),
    "AutoRound auto_round, mixed": _auto_round("auto_round", _bits(4, more=_MIXED)),
    "AutoRound auto_gptq": _auto_round("auto_gptq", _bits(4)),
    "AutoRound auto_gptq, asymmetric": _auto_round("auto_gptq", _bits(4, symmetric=False)),
    "AutoRound auto_gptq, mixed": _auto_round("auto_gptq", _bits(4, more=_MIXED)),
    "AutoRound auto_awq": _auto_round("auto_awq", _bits(4, symmetric=False)),
    "AutoRound auto_awq, symmetric": _auto_round("auto_awq", _bits(4)),
    "AutoRound llm_compressor, 4 bits": _auto_round("llm_compressor", _bits(4)),
    "AutoRound llm_compressor, mixed": _auto_round("llm_compressor", _bits(4, more=_MIXED)),
    "AutoRound llm_compressor INT8": _auto_round(
        "llm_compressor", 'scheme="INT8"', activations=True
    ),
    "AutoRound llm_compressor FP8_STATIC": _auto_round(
        "llm_compressor", 'scheme="FP8_STATIC"', activations=True
    ),
    "AutoRound llm_compressor FP8_BLOCK": _auto_round(
        "llm_compressor", 'scheme="FP8_BLOCK"', activations=True
    ),
    "AutoRound llm_compressor MXFP4": _auto_round(
        "llm_compressor", 'scheme="MXFP4"', refused="input_activations"
    ),
    "AutoRound llm_compressor NVFP4": _auto_round(
        "llm_compressor", 'scheme="NVFP4"', refused="input_activations"
    ),
    "AutoRound auto_round FP8_STATIC": _auto_round(
        "auto_round", 'scheme="FP8_STATIC"', refused="packing_format"
    ),
    "AutoRound auto_round MXFP4": _auto_round(
        "auto_round", 'scheme="MXFP4"', refused="packing_format"
    ),
    "AutoRound fp8 FP8_BLOCK": _auto_round(
        "fp8", 'scheme="FP8_BLOCK"', refused="quant_method 'fp8'"
    ),
}
