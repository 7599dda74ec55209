"""Does quantkit read what llm-compressor and AutoRound really write, and compute the same?

    python benchmarks/import_peers.py MODEL --peer-python peer/bin/python [--only NAME …] [-o FILE]

A Llama of two narrow blocks with random weights, and MODEL's tokenizer, is quantized by the peers
in an environment of their own (see `vs_peers_quality.py` for making one), saved by their own code,
and loaded by transformers there and by quantkit here, both computing in fp32. The error is
‖ours − theirs‖ / ‖theirs‖ of the logits of one text: in quantkit's reference kernels, which do what
the format says, and in the native ones. Beside it stands the reference kernels' error against what
the quantized model computed in the peer's memory, in bf16: it is what counts where transformers
there cannot load what its neighbour wrote, or loads it without rounding activations. A scheme that
quantkit does not run must be refused, in words that name it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import QuantkitError

#: Largest error. The reference kernels round scale times code to the scale's dtype, bf16, and some
#: native ones multiply in it, which costs 0.2–0.4 %; a wrong scale or code costs 5 % and up.
TOLERANCE = 0.01

#: Against what a peer had in memory, in bf16. Where activations are rounded, a last bit of bf16
#: puts some to another code in every layer.
MEMORY_TOLERANCE = 0.03

#: Runs in the peer's environment: quantize, keep the logits, save. IDS is ``[samples, tokens]``.
_QUANTIZE = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
{imports}

model_path, ids_path, out, logits_path = sys.argv[1:5]
ids = torch.load(ids_path)
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(model_path)
{quantize}
with torch.no_grad():
    torch.save(model(ids[:1]).logits[0].float(), logits_path)
{save}
tokenizer.save_pretrained(out)
"""

_LOAD = """
import sys
import torch
from transformers import AutoModelForCausalLM

folder, ids_path, logits_path = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    torch.save(model(torch.load(ids_path)[:1]).logits[0].float(), logits_path)
"""

_ONESHOT = """
data = Dataset.from_dict({{
    "input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(),
}})
recipe = {modifier}(scheme="{scheme}", targets=["Linear"], ignore=["lm_head"])
oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids), shuffle_calibration_samples=False)
"""

_AUTO_ROUND = """
rows = [{{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}} for row in ids]
tuner = AutoRound(model, tokenizer, bits=4, group_size=64, sym={symmetric}, iters=2,
                  nsamples=len(ids), seqlen=ids.shape[1], batch_size=2, dataset=rows,
                  device_map="cpu")
tuner.quantize()
model = tuner.model
"""


@dataclass(frozen=True)
class Case:
    """What a peer writes, and whether quantkit is to read it."""

    script: str
    refused: str | None = None  #: a part of the refusal, where quantkit runs no such scheme
    activations: bool = False  #: are rounded, too


def _llm_compressor(module: str, modifier: str, scheme: str, **facts: Any) -> Case:
    imports = (
        "from datasets import Dataset\nfrom llmcompressor import oneshot\n"
        f"from llmcompressor.modifiers.{module} import {modifier}"
    )
    quantize = _ONESHOT.format(modifier=modifier, scheme=scheme)
    save = "model.save_pretrained(out, save_compressed=True)"
    return Case(_QUANTIZE.format(imports=imports, quantize=quantize, save=save), **facts)


def _auto_round(fmt: str, *, symmetric: bool) -> Case:
    return Case(
        _QUANTIZE.format(
            imports="from auto_round import AutoRound",
            quantize=_AUTO_ROUND.format(symmetric=symmetric),
            save=f'tuner.save_quantized(out, format="{fmt}", inplace=True)',
        )
    )


CASES = {
    "llm-compressor GPTQ W4A16": _llm_compressor("gptq", "GPTQModifier", "W4A16"),
    "llm-compressor W4A16_ASYM": _llm_compressor(
        "quantization", "QuantizationModifier", "W4A16_ASYM"
    ),
    "llm-compressor W8A16": _llm_compressor("quantization", "QuantizationModifier", "W8A16"),
    "llm-compressor W8A8": _llm_compressor(
        "quantization", "QuantizationModifier", "W8A8", activations=True
    ),
    "llm-compressor FP8_DYNAMIC": _llm_compressor(
        "quantization", "QuantizationModifier", "FP8_DYNAMIC", activations=True
    ),
    "llm-compressor FP8": _llm_compressor(
        "quantization", "QuantizationModifier", "FP8", activations=True
    ),
    "llm-compressor NVFP4A16": _llm_compressor("quantization", "QuantizationModifier", "NVFP4A16"),
    "llm-compressor NVFP4": _llm_compressor(
        "quantization", "QuantizationModifier", "NVFP4", refused="input_activations"
    ),
    "AutoRound auto_round": _auto_round("auto_round", symmetric=True),
    "AutoRound auto_round, asymmetric": _auto_round("auto_round", symmetric=False),
    "AutoRound auto_gptq": _auto_round("auto_gptq", symmetric=True),
    "AutoRound auto_awq": _auto_round("auto_awq", symmetric=False),
}


@dataclass(frozen=True)
class Row:
    """One case.

    Attributes:
        ok: read with errors within tolerance, or refused where that is right.
        memory: error against what the peer had in memory; None where it was not read.
        reference, native: errors against transformers; None where that did not load it.
        said: by whoever failed, its last line.
    """

    ok: bool
    memory: float | None = None
    reference: float | None = None
    native: float | None = None
    said: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a Llama; its tokenizer and vocabulary are used")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--only", action="append", choices=list(CASES))
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ids = make_model(args.model, folder / "model")
        torch.save(ids, folder / "ids.pt")
        for name in args.only or CASES:
            rows[name] = measure(CASES[name], folder, args.peer_python, ids)
            print(line(name, rows[name]), flush=True)
    if args.output is not None:
        document = {name: asdict(row) for name, row in rows.items()}
        args.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if all(row.ok for row in rows.values()) else 1


def make_model(source: str, folder: Path) -> Tensor:
    """A narrow random model with a folder's tokenizer; returns token ids int64 ``[8, 64]``."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(source)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Initial weights are so small that every logit is noise; these give real contrast.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2.0)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return torch.randint(0, len(tokenizer), (8, 64), generator=torch.Generator().manual_seed(1))


def measure(case: Case, folder: Path, python: str, ids: Tensor) -> Row:
    """Have a peer quantize, and hold quantkit against what it, or transformers there, computes."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out, kept, loaded = (Path(scratch) / name for name in ("out", "memory.pt", "loaded.pt"))
        made = ask(python, case.script, folder / "model", folder / "ids.pt", out, kept)
        if made:
            return Row(ok=False, said=f"not made: {made}")
        out = written(out)
        unread = ask(python, _LOAD, out, folder / "ids.pt", loaded)
        try:
            ours = {kernels: logits(out, kernels, ids) for kernels in ("reference", "native")}
        except QuantkitError as e:
            right = case.refused is not None and case.refused in e.message
            return Row(ok=right, said=f"refused: {e.message}")
        memory = error(ours["reference"], torch.load(kept))
        if unread:
            ok = case.refused is None and memory <= MEMORY_TOLERANCE
            return Row(ok, memory, said=f"transformers: {unread}")
        reference, native = (error(ours[kernels], torch.load(loaded)) for kernels in ours)
    same = max(reference, native) <= TOLERANCE
    ok = case.refused is None and (same or (case.activations and memory <= MEMORY_TOLERANCE))
    return Row(ok, memory, reference, native)


def written(out: Path) -> Path:
    """The checkpoint's folder; AutoRound puts some formats into one below."""
    if (out / "config.json").exists():
        return out
    [found] = [path.parent for path in out.glob("*/config.json")]
    return found


def ask(python: str, script: str, *arguments: Any) -> str:
    """Run a script in the peer's environment; returns the last line of what stopped it, or ""."""
    command = [python, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [text for text in done.stderr.splitlines() if text.strip()]
    return "" if done.returncode == 0 else (lines or ["no message"])[-1].strip()


def logits(folder: Path, kernels: str, ids: Tensor) -> Tensor:
    """Ours of the first text, fp32 ``[tokens, vocabulary]``."""
    from quantkit.models.load import load_runtime

    runtime = load_runtime(folder, kernels=kernels, dtype=torch.float32)
    return runtime.logits(ids[0].tolist()).float()


def error(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖."""
    return float((ours - theirs).norm() / theirs.norm())


def line(name: str, row: Row) -> str:
    verdict = "ok  " if row.ok else "FAIL"
    numbers = {"memory": row.memory, "reference": row.reference, "native": row.native}
    told = [f"{key} {value:.1e}" for key, value in numbers.items() if value is not None]
    return "  ".join([f"{verdict} {name:34}", *told, row.said])


if __name__ == "__main__":
    sys.exit(main())
