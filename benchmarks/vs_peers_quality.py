"""Quality at equal bits beside llm-compressor and AutoRound: same model, tokens, scheme and texts.

Every system quantizes the linear layers of the blocks under one scheme, head kept, on the same
calibration windows, one system after the other. All checkpoints are scored by the same code in the
same kernels against the same original. The peers live in an environment of their own, because their
pins differ: `python -m venv peer && peer/bin/pip install torch==2.13.0 llmcompressor auto-round`.

    python benchmarks/vs_peers_quality.py MODEL --data c4.jsonl --text a.txt --text b.txt \
        [--scheme w3a16-g64] --peer-python peer/bin/python -o results.json

The file holds the rows, and beside them what they were measured with: contents by hash, machine,
versions on both sides. A row is written when it is done; a second call with the same inputs
measures only rows that are missing. Seconds are those of calibrating and quantizing, without
loading and saving. KL's ± is one standard error over windows of text.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import quantkit
from quantkit.schemes import SCHEMES, QuantSpec, Scheme

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

#: Held-out text that all are scored on.
WINDOWS, WINDOW_TOKENS = 24, 1024

#: Activations as the scheme says, never int8 on top: the same for every system.
KERNELS = "native-float"

_FISHER = "{gptq: {fisher: 0.5, outputs: coupled}}"
_WEIGHT_ONLY = {
    "quantkit RTN": "rtn",
    "quantkit GPTQ": "gptq",
    "quantkit GPTQ, Fisher": _FISHER,
    "quantkit GPTQ, Fisher, distill": f"[{_FISHER}, distill]",
}
_SMOOTH = "{smoothquant: {alpha: auto, pairs: all}}"
_WITH_ACTIVATIONS = {
    "quantkit RTN": "rtn",
    "quantkit GPTQ": "gptq",
    "quantkit SmoothQuant, RTN": f"[{_SMOOTH}, rtn]",
    "quantkit SmoothQuant, GPTQ": f"[{_SMOOTH}, gptq]",
    "quantkit rotate, GPTQ": "[rotate, gptq]",
}
_STATIC = {
    "quantkit RTN": "rtn",
    "quantkit SmoothQuant, RTN": f"[{_SMOOTH}, rtn]",
    "quantkit outliers, RTN": "[outliers, rtn]",
    "quantkit outliers, RTN, distill": "[outliers, rtn, distill]",
}

#: Scheme → name → the recipe's ``algorithm``.
RECIPES: dict[str, dict[str, str]] = {
    "w4a16-g64": _WEIGHT_ONLY,
    "w3a16-g64": _WEIGHT_ONLY,
    "w8a8": _WITH_ACTIVATIONS,
    "w8a8-static": _STATIC,
    "fp8": _WITH_ACTIVATIONS,
    "fp8-static": _STATIC,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--text", required=True, action="append", help="held-out; several allowed")
    parser.add_argument("--scheme", choices=RECIPES, default="w4a16-g64")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of windows")
    parser.add_argument("--peer-python", help="interpreter of an environment with the peers")
    parser.add_argument("--only", action="append", help="names of rows to run")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()

    model = resolve(args.model)
    with tempfile.TemporaryDirectory() as scratch:
        ids = Path(scratch) / "ids.pt"
        facts = describe(args, model, write_tokens(model, args, ids))
        document = unfinished(args.output, facts)
        rows = document["rows"]
        for name in wanted(args):
            if name not in rows:
                rows[name] = measure(name, args, model, ids, Path(scratch))
                save(args.output, document)
    print("\n" + json.dumps(facts, indent=1))
    print(table(rows))


def wanted(args: argparse.Namespace) -> list[str]:
    """Names of the rows to measure, in order. SystemExit for one that is not known."""
    names = [*RECIPES[args.scheme], *(PEERS[args.scheme] if args.peer_python else ())]
    for name in args.only or ():
        if name not in names:
            raise SystemExit(f"--only {name!r}: known here: {', '.join(names)}")
    return [name for name in names if not args.only or name in args.only]


def unfinished(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The file to go on from, or a new one. SystemExit if it was measured with other inputs."""
    if not path.exists():
        return {**facts, "rows": {}}
    document: dict[str, Any] = json.loads(path.read_text())
    different = [key for key, value in facts.items() if document.get(key) != value]
    if different:
        raise SystemExit(f"{path}: was measured with another {different[0]}; give another -o")
    return document


def save(path: Path, document: dict[str, Any]) -> None:
    staging = path.with_name(path.name + ".tmp")
    staging.write_text(json.dumps(document, indent=1) + "\n")
    staging.replace(path)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One line a row and text."""
    width = max(map(len, rows), default=0)
    lines = [
        f"{'system':{width}} {'s':>6} {'GB':>5} {'bits':>5} {'text':16} {'KL':>15} "
        f"{'ppl':>7} {'top-1':>6}"
    ]
    for name, row in rows.items():
        for text, score in row["texts"].items():
            lines.append(
                f"{name:{width}} {row['seconds']:6.0f} {row['peak_rss_bytes'] / 1e9:5.2f} "
                f"{row['bits']:5.2f} {text:16} {score['kl']:.4f} ± {score['kl_error']:.4f} "
                f"{score['ppl']:7.2f} {score['top1']:6.1%}"
            )
    return "\n".join(lines)


def describe(args: argparse.Namespace, model: Path, tokens_hash: str) -> dict[str, Any]:
    """What the rows are measured with."""
    from quantkit import model as models
    from quantkit import ops
    from quantkit.evals.evaluate import cpu_model

    facts: dict[str, Any] = {
        "model": {
            "name": Path(args.model).name,
            "weights_sha256": models.combine_hashes(
                {path.name: models.hash_file(path) for path in model.glob("*.safetensors")}
            ),
        },
        "scheme": f"{args.scheme}, {SCHEMES[args.scheme].describe()}, head kept",
        "calibration": {
            "file": Path(args.data).name,
            "samples": args.samples,
            "seq_len": args.seq_len,
            "tokens_sha256": tokens_hash,
        },
        "kernels": KERNELS,
        "texts": {
            label(text): {
                "windows": WINDOWS,
                "seq_len": WINDOW_TOKENS,
                "sha256": models.hash_file(Path(text)),
            }
            for text in args.text
        },
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "kernels": ops.get_isa(),
            "system": platform.system(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "compressed-tensors")},
            "quantkit": quantkit.__version__,
        },
    }
    if args.peer_python:
        command = [args.peer_python, "-c", PEER_VERSIONS]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        facts["peer_versions"] = json.loads(answer)
    return facts


def label(text: str) -> str:
    """Short name of a text file: its folder, where files are all called alike."""
    path = Path(text)
    return f"{path.parent.name}/{path.stem}" if path.parent.name else path.stem


def measure(
    name: str, args: argparse.Namespace, model: Path, ids: Path, scratch: Path
) -> dict[str, Any]:
    """One row: quantize, then score on every text."""
    out = scratch / "checkpoint"
    run = _run_ours if name in RECIPES[args.scheme] else _run_peer
    row = run(name, args, model, ids, out)
    row["texts"] = {label(text): score(out, model, text) for text in args.text}
    shutil.rmtree(out)
    return row


def _run_ours(
    name: str, args: argparse.Namespace, model: Path, ids: Path, out: Path
) -> dict[str, Any]:
    recipe = out.with_name("recipe.yaml")
    recipe.write_text(
        f"scheme: {args.scheme}\nalgorithm: {RECIPES[args.scheme][name]}\nkeep: [lm_head]\n"
        f"calibrate: {{seed: {args.seed}}}\n"
    )
    command = [
        sys.executable, "-m", "quantkit.cli.main", "calibrate", str(model), "-r", str(recipe),
        "--data", args.data, "--samples", str(args.samples), "--seq-len", str(args.seq_len),
        "--no-gate", "--json", "-o", str(out),
    ]  # fmt: skip
    began = time.monotonic()
    document = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    seconds = document["seconds"]
    print(name, json.dumps(seconds), f"whole process {time.monotonic() - began:.0f} s", flush=True)
    return {
        "seconds": seconds["calibrate"] + seconds["quantize"],
        "peak_rss_bytes": document["peak_rss_bytes"],
        "bits": document["bits_per_weight"],
    }


def _run_peer(
    name: str, args: argparse.Namespace, model: Path, ids: Path, out: Path
) -> dict[str, Any]:
    script = out.with_name("peer.py")
    script.write_text(PEERS[args.scheme][name](SCHEMES[args.scheme]))
    command = [args.peer_python, str(script), str(model), str(ids), str(out)]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    line = next(x for x in text.splitlines() if x.startswith("PEER "))
    document = json.loads(line.removeprefix("PEER "))
    print(name, json.dumps(document), flush=True)
    return {
        "seconds": document["quantize_seconds"],
        "peak_rss_bytes": document["peak_rss_bytes"],
        "bits": bits_per_weight(SCHEMES[args.scheme].weight, model),
    }


def bits_per_weight(spec: QuantSpec, model: Path) -> float:
    """Stored bits of a block's linear weight, with its share of scales and zero points."""
    from safetensors import safe_open

    shapes = []
    for path in model.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            found = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
        shapes += [x for key, x in found.items() if ".layers." in key and len(x) == 2]
    return sum(map(spec.stored_bits, shapes)) / sum(n * k for n, k in shapes)


def resolve(source: str) -> Path:
    from quantkit import model as models

    return models.resolve(source)


def write_tokens(model: Path, args: argparse.Namespace, path: Path) -> str:
    """Write the windows that all calibrate on; returns their hash."""
    import torch
    from transformers import AutoTokenizer

    from quantkit.data.sources import Source
    from quantkit.data.tokens import load_tokens

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = load_tokens(
        [Source(args.data)],
        tokenizer,
        samples=args.samples,
        seq_len=args.seq_len,
        seed=args.seed,
    )
    torch.save(tokens.ids, path)
    return tokens.hash


def score(checkpoint: Path, model: Path, text: str) -> dict[str, float]:
    """KL with its standard error, perplexity and top-1 on one held-out text."""
    results = checkpoint.with_name("results.json")
    command = [
        sys.executable, "-m", "quantkit.cli.main", "eval", str(checkpoint), "--text", text,
        "--seq-len", str(WINDOW_TOKENS), "--max-tokens", str(WINDOWS * WINDOW_TOKENS),
        "--reference", str(model), "--kernels", KERNELS, "--json", "-o", str(results),
    ]  # fmt: skip
    summary = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    windows = json.loads(results.read_text())["text"]["windows"]
    results.unlink()
    return {
        "kl": summary["kl_mean"],
        "kl_error": standard_error([(tokens, kl) for tokens, _, kl, _ in windows]),
        "ppl": summary["perplexity"],
        "top1": summary["top1_agreement"],
    }


def standard_error(windows: list[tuple[int, float]]) -> float:
    """Of a mean over tokens, from each window's (tokens, sum): the linearized ratio."""
    if len(windows) < 2:
        return math.nan
    tokens = sum(n for n, _ in windows)
    mean = sum(s for _, s in windows) / tokens
    spread = sum((s - mean * n) ** 2 for n, s in windows)
    return math.sqrt(spread * len(windows) / (len(windows) - 1)) / tokens


if __name__ == "__main__":
    main()
