"""What llm-compressor and AutoRound run: Python that is written here and runs where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quantkit.schemes import QuantSpec, Scheme

#: Runs in the peer's environment. Tokens come from a file, so that all see the same.
_PEER = """
import json, resource, sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
{imports}

model_path, ids_path, out = sys.argv[1:4]
ids = torch.load(ids_path)
began = time.monotonic()
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(model_path)
loaded = time.monotonic()
{quantize}
done = time.monotonic()
{save}
tokenizer.save_pretrained(out)
print("PEER " + json.dumps({{
    "quantize_seconds": done - loaded, "total_seconds": time.monotonic() - began,
    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}}))
"""

_LLM_COMPRESSOR = """
data = Dataset.from_dict({{
    "input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(),
}})
scheme = {{"group_0": {{"targets": ["Linear"], **{group!r}}}}}
settings = {{"config_groups": scheme, "ignore": ["lm_head"]}}
oneshot(model=model, dataset=data, recipe={recipe}, max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids), shuffle_calibration_samples=False)
"""

_COMPRESSED = "model.save_pretrained(out, save_compressed=True)"

#: Its defaults, but for the scheme and the length of its windows.
_AUTO_ROUND = """
rows = [{{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}} for row in ids]
tuner = AutoRound(model, tokenizer, bits={bits}, group_size={group_size}, sym={symmetric},
                  iters=200, nsamples=len(ids), seqlen=ids.shape[1], batch_size=8, dataset=rows,
                  device_map="cpu")
tuner.quantize()
"""


def _llm_compressor(recipe: str) -> Callable[[Scheme], str]:
    """A peer that runs llm-compressor's modifiers, written as Python over ``settings``."""
    imports = (
        "from datasets import Dataset\nfrom llmcompressor import oneshot\n"
        "from llmcompressor.modifiers.gptq import GPTQModifier\n"
        "from llmcompressor.modifiers.quantization import QuantizationModifier\n"
        "from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier"
    )

    def script(scheme: Scheme) -> str:
        group = {"weights": _arguments(scheme.weight)}
        if scheme.input is not None:
            group["input_activations"] = _arguments(scheme.input)
        quantize = _LLM_COMPRESSOR.format(group=group, recipe=recipe)
        return _PEER.format(imports=imports, quantize=quantize, save=_COMPRESSED)

    return script


def _arguments(spec: QuantSpec) -> dict[str, Any]:
    """A spec in the words of compressed-tensors' ``QuantizationArgs``."""
    return {
        "num_bits": spec.bits,
        "type": str(spec.dtype),
        "symmetric": spec.symmetric,
        "strategy": str(spec.granularity),
        "dynamic": spec.dynamic,
        **({} if spec.group_size is None else {"group_size": spec.group_size}),
    }


def _auto_round(scheme: Scheme) -> str:
    """Its weights, dequantized: scored like any 16-bit model, counted as the bits that they are."""
    return _PEER.format(
        imports="from auto_round import AutoRound",
        quantize=_AUTO_ROUND.format(
            bits=scheme.weight.bits,
            group_size=scheme.weight.group_size,
            symmetric=scheme.weight.symmetric,
        ),
        save='tuner.save_quantized(out, format="fake", inplace=True)',
    )


_RTN = {"llm-compressor RTN": _llm_compressor("QuantizationModifier(**settings)")}
_GPTQ = {"llm-compressor GPTQ": _llm_compressor("GPTQModifier(**settings)"), **_RTN}
_SMOOTH_GPTQ = "[SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(**settings)]"

#: Scheme → name → the script that runs in the peer's environment.
PEERS: dict[str, dict[str, Callable[[Scheme], str]]] = {
    "w4a16-g64": {**_GPTQ, "AutoRound": _auto_round},
    "w3a16-g64": {**_GPTQ, "AutoRound": _auto_round},
    "w2a16-g32": {**_GPTQ, "AutoRound": _auto_round},
    # What its documentation recommends for int8 and for fp8.
    "w8a8": {**_RTN, "llm-compressor SmoothQuant, GPTQ": _llm_compressor(_SMOOTH_GPTQ)},
    "w8a8-static": {**_RTN, "llm-compressor SmoothQuant, GPTQ": _llm_compressor(_SMOOTH_GPTQ)},
    "fp8": _RTN,
    "fp8-static": _RTN,
}

#: What the peer's interpreter is asked for.
PEER_VERSIONS = """
import json, platform
from importlib.metadata import version
names = ("llmcompressor", "auto-round", "compressed-tensors", "transformers", "torch")
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in names}}))
"""
