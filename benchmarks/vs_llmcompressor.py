"""GPTQ beside llm-compressor: the same model, tokens and scheme, one after the other.

Both quantize every linear layer of the blocks to int4 in symmetric groups of 64, head kept,
on the same calibration windows; both checkpoints are scored by the same code in the same
kernels against the same original. llm-compressor lives in an environment of its own, because
its pins differ: `python -m venv peer && peer/bin/pip install torch==2.13.0 llmcompressor`.

    python benchmarks/vs_llmcompressor.py MODEL --data c4.jsonl --text held_out.txt \
        --peer-python peer/bin/python -o results.json
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
from pathlib import Path

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

    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(args, Path(scratch))
    header = f"{'system':22} {'s':>6} {'GB':>5} {'bits':>5} {'KL':>8} {'ppl':>7} {'top-1':>6}"
    print(
        f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores; "
        f"{args.samples}×{args.seq_len} calibration tokens"
    )
    print(header)
    for name, row in rows.items():
        print(
            f"{name:22} {row['seconds']:6.0f} {row['peak_rss_bytes'] / 1e9:5.2f} "
            f"{row['bits']:5.2f} {row['kl']:8.4f} {row['ppl']:7.2f} {row['top1']:6.1%}"
        )
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + "\n")


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, dict[str, float]]:
    model = resolve(args.model)
    ids = scratch / "ids.pt"
    write_tokens(model, args, ids)
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


def write_tokens(model: Path, args: argparse.Namespace, path: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    from quantkit.data.sources import Source
    from quantkit.data.tokens import load_tokens

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = load_tokens(
        [Source(args.data)], tokenizer, samples=args.samples, seq_len=args.seq_len, seed=0
    )
    torch.save(tokens.ids, path)


def score(checkpoint: Path, model: Path, args: argparse.Namespace) -> dict[str, float]:
    """KL, perplexity and top-1 on 24 windows of 1,024 held-out tokens."""
    command = [
        sys.executable, "-m", "quantkit.cli.main", "eval", str(checkpoint), "--text", args.text,
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
