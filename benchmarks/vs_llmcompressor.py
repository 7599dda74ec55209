"""GPTQ beside llm-compressor: the same model, tokens and scheme, one after the other.

Both quantize every linear layer of the blocks to int4 in symmetric groups of 64, head kept,
on the same calibration windows; both checkpoints are scored by the same code in the same
kernels against the same original. llm-compressor lives in an environment of its own, because
its pins differ: `python -m venv peer && peer/bin/pip install torch==2.13.0 llmcompressor`.

    python benchmarks/vs_llmcompressor.py MODEL --data c4.jsonl --text held_out.txt \
        --peer-python peer/bin/python -o results.json

The file holds the rows, and beside them what they were measured with: contents by hash, machine,
versions on both sides. Seconds are those of calibrating and quantizing, without loading and saving.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import quantkit

#: Runs in the peer's environment. Tokens come from a file, so that both see the same.
PEER = """
import json, resource, sys, time
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from llmcompressor import oneshot
from llmcompressor.modifiers.{module} import {modifier}

model_path, ids_path, out = sys.argv[1:4]
ids = torch.load(ids_path)
began = time.monotonic()
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(model_path)
data = Dataset.from_dict({{
    "input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(),
}})
loaded = time.monotonic()
scheme = {{"group_0": {{"targets": ["Linear"], "weights": {{
    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}}}}}}
recipe = {modifier}(config_groups=scheme, ignore=["lm_head"])
oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids), shuffle_calibration_samples=False)
done = time.monotonic()
model.save_pretrained(out, save_compressed=True)
tokenizer.save_pretrained(out)
print("PEER " + json.dumps({{
    "quantize_seconds": done - loaded, "total_seconds": time.monotonic() - began,
    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}}))
"""

PEERS = {
    "llm-compressor GPTQ": ("gptq", "GPTQModifier"),
    "llm-compressor RTN": ("quantization", "QuantizationModifier"),
}

#: What the peer's interpreter is asked for.
PEER_VERSIONS = """
import json, platform
from importlib.metadata import version
names = ("llmcompressor", "compressed-tensors", "transformers", "torch")
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in names}}))
"""

#: Held-out text that both checkpoints are scored on.
WINDOWS, WINDOW_TOKENS = 24, 1024

RECIPES = {
    "quantkit GPTQ": "scheme: w4a16-g64\nalgorithm: gptq\nkeep: [lm_head]\n",
    "quantkit RTN": "scheme: w4a16-g64\nalgorithm: rtn\nkeep: [lm_head]\n",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--peer-python", help="interpreter of an environment with llmcompressor")
    parser.add_argument("--only", action="append", help="names of rows to run")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()

    model = resolve(args.model)
    with tempfile.TemporaryDirectory() as scratch:
        ids = Path(scratch) / "ids.pt"
        facts = describe(args, model, write_tokens(model, args, ids))
        rows = measure(args, model, ids, Path(scratch))
    header = f"{'system':22} {'s':>6} {'GB':>5} {'bits':>5} {'KL':>8} {'ppl':>7} {'top-1':>6}"
    print("\n" + json.dumps(facts, indent=1))
    print(header)
    for name, row in rows.items():
        print(
            f"{name:22} {row['seconds']:6.0f} {row['peak_rss_bytes'] / 1e9:5.2f} "
            f"{row['bits']:5.2f} {row['kl']:8.4f} {row['ppl']:7.2f} {row['top1']:6.1%}"
        )
    if args.output:
        args.output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


def describe(args: argparse.Namespace, model: Path, tokens_hash: str) -> dict[str, Any]:
    """What the rows were measured with."""
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
        "scheme": "int4, symmetric groups of 64, head kept",
        "calibration": {
            "file": Path(args.data).name,
            "samples": args.samples,
            "seq_len": args.seq_len,
            "tokens_sha256": tokens_hash,
        },
        "text": {
            "file": Path(args.text).name,
            "windows": WINDOWS,
            "seq_len": WINDOW_TOKENS,
            "sha256": models.hash_file(Path(args.text)),
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


def measure(
    args: argparse.Namespace, model: Path, ids: Path, scratch: Path
) -> dict[str, dict[str, float]]:
    rows = {}
    for name, recipe in RECIPES.items():
        if args.only and name not in args.only:
            continue
        path = scratch / "recipe.yaml"
        path.write_text(recipe)
        out = scratch / "ours"
        command = [
            sys.executable, "-m", "quantkit.cli.main", "calibrate", str(model), "-r", str(path),
            "--data", args.data, "--samples", str(args.samples), "--seq-len", str(args.seq_len),
            "--no-gate", "--json", "-o", str(out),
        ]  # fmt: skip
        began = time.monotonic()
        document = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        seconds = document["seconds"]
        print(name, json.dumps(seconds), f"whole process {time.monotonic() - began:.0f} s")
        rows[name] = {
            "seconds": seconds["calibrate"] + seconds["quantize"],
            "peak_rss_bytes": document["peak_rss_bytes"],
            **score(out, model, args),
        }
        shutil.rmtree(out)
    if args.peer_python:
        for name, (module, modifier) in PEERS.items():
            if args.only and name not in args.only:
                continue
            script = scratch / "peer.py"
            script.write_text(PEER.format(module=module, modifier=modifier))
            out = scratch / "theirs"
            command = [args.peer_python, str(script), str(model), str(ids), str(out)]
            text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            line = next(x for x in text.splitlines() if x.startswith("PEER "))
            document = json.loads(line.removeprefix("PEER "))
            print(name, json.dumps(document))
            rows[name] = {
                "seconds": document["quantize_seconds"],
                "peak_rss_bytes": document["peak_rss_bytes"],
                **score(out, model, args),
            }
            shutil.rmtree(out)
    return rows


def resolve(source: str) -> Path:
    from quantkit import model as models

    return models.resolve(source)


def write_tokens(model: Path, args: argparse.Namespace, path: Path) -> str:
    """Write the windows that both sides calibrate on; returns their hash."""
    import torch
    from transformers import AutoTokenizer

    from quantkit.data.sources import Source
    from quantkit.data.tokens import load_tokens

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = load_tokens(
        [Source(args.data)], tokenizer, samples=args.samples, seq_len=args.seq_len, seed=0
    )
    torch.save(tokens.ids, path)
    return tokens.hash


def score(checkpoint: Path, model: Path, args: argparse.Namespace) -> dict[str, float]:
    """KL, perplexity and top-1 on the held-out text."""
    command = [
        sys.executable, "-m", "quantkit.cli.main", "eval", str(checkpoint), "--text", args.text,
        "--seq-len", str(WINDOW_TOKENS), "--max-tokens", str(WINDOWS * WINDOW_TOKENS),
        "--reference", str(model), "--json",
    ]  # fmt: skip
    document = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return {
        "kl": document["kl_mean"],
        "ppl": document["perplexity"],
        "top1": document["top1_agreement"],
        "bits": document["cost"]["bits_per_weight"],
    }


if __name__ == "__main__":
    main()
