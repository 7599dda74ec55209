"""Quality at equal bits beside llm-compressor and AutoRound: same model, tokens, scheme and texts.

Every system quantizes the linear layers of the blocks under one scheme, head kept, on the same
calibration windows, one system after the other. All checkpoints are scored by the same code in the
same kernels against the same original. The peers live in an environment of their own, because their
pins differ: `python -m venv peer && peer/bin/pip install torch==2.13.0 llmcompressor auto-round`.

    python -m benchmarks.vs_peers_quality MODEL --data c4.jsonl --text a.txt --text b.txt \\
        [--scheme w3a16-g64] --peer-python peer/bin/python [--gguf Q4_K_M=m.gguf] -o results.json

``--scheme mixed-3.25``, ``mixed-4.5`` and ``mixed-5.5`` hold mixtures of schemes beside uniform
ones of as many bits. The sensitivity that mixtures are chosen by is measured once, on windows of
the same file, and kept in a file of its own; what that costs is said apart from the rows. The
larger two budgets may share it: ``--sensitivity s.json``.

``--gguf`` adds a file that llama-quantize made: its blocks' matrices, dequantized, in an otherwise
untouched original. So its embedding and head are kept like everyone's, whatever the file has there.
Mind ``original_on_a_grid`` in its row: see `benchmarks.quality_gguf`.

The file holds the rows, and beside them what they were measured with: contents by hash, machine,
versions on both sides. A row is written when it is done; a second call with the same inputs
measures only rows that are missing. Seconds are those of calibrating and quantizing, without
loading and saving. KL's ± is one standard error over windows of text. `benchmarks.quality_table`
prints several files.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import quantkit
from benchmarks import quality_recipes
from benchmarks.quality_gguf import block_bits, graft, is_matrix, on_a_grid
from benchmarks.quality_mixture import measure_once, write_mixture
from benchmarks.quality_peers import PEER_VERSIONS, PEERS
from benchmarks.quality_recipes import BUDGETS, INGREDIENTS, RECIPES
from benchmarks.quality_table import table
from benchmarks.systems import named
from quantkit.schemes import SCHEMES, QuantSpec

#: Held-out text that all are scored on.
WINDOWS, WINDOW_TOKENS = 24, 1024

#: Activations as the scheme says, never int8 on top: the same for every system.
KERNELS = "native-float"

#: Facts that files of before lack. What they say shows in others: the seed in the windows' hash.
ADDED = ("seed",)


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
    parser.add_argument(
        "--gguf", metavar="NAME=FILE", type=named, action="append", default=[], help="a row more"
    )
    parser.add_argument(
        "--sensitivity", type=Path, help="of mixtures; default: beside the results; made if missing"
    )
    parser.add_argument("--sensitivity-samples", type=int, default=256)
    parser.add_argument("--sensitivity-seq-len", type=int, default=128)
    parser.add_argument("--only", action="append", help="names of rows to run")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    if args.sensitivity is None:
        stem = args.output.name.removesuffix(".json")
        args.sensitivity = args.output.with_name(f"{stem}.sensitivity.json")

    model = resolve(args.model)
    with tempfile.TemporaryDirectory() as scratch:
        ids = Path(scratch) / "ids.pt"
        facts = describe(args, model, write_tokens(model, args, ids))
        document = unfinished(args.output, facts)
        rows = document["rows"]
        check_files(args.gguf, rows)
        missing = [name for name in wanted(args) if name not in rows]
        if any(is_mixed(args.scheme, name) for name in missing):
            document["sensitivity_run"] = measure_once(args, model, document.get("sensitivity_run"))
            save(args.output, document)
        for name in missing:
            rows[name] = measure(name, args, model, ids, Path(scratch))
            save(args.output, document)
    print("\n" + json.dumps(facts, indent=1))
    if "sensitivity_run" in document:
        print(json.dumps({"sensitivity, apart from all rows": document["sensitivity_run"]}))
    print(table(rows))


def is_mixed(scheme: str, name: str) -> bool:
    """Whether a row takes the sensitivity file."""
    return name in RECIPES[scheme] and RECIPES[scheme][name].mixed


def check_files(files: list[tuple[str, str]], rows: dict[str, dict[str, Any]]) -> None:
    """SystemExit where a row is of another GGUF file than the one that is given now."""
    from quantkit import model as models

    for name, path in files:
        if name in rows and rows[name].get("sha256") != models.hash_file(Path(path)):
            raise SystemExit(f"--gguf {name}={path}: the row is of another file; name it otherwise")


def wanted(args: argparse.Namespace) -> list[str]:
    """Names of the rows to measure, in order. SystemExit for one that is not known."""
    peers = PEERS.get(args.scheme, {}) if args.peer_python else {}
    names = [*RECIPES[args.scheme], *peers, *(name for name, _ in args.gguf)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise SystemExit(f"--gguf {twice[0]}: there is a row of this name; choose another one")
    for name in args.only or ():
        if name not in names:
            raise SystemExit(f"--only {name!r}: known here: {', '.join(names)}")
    return [name for name in names if not args.only or name in args.only]


def unfinished(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The file to go on from, or a new one. SystemExit if it was measured with other inputs."""
    if not path.exists():
        return {**facts, "rows": {}}
    document: dict[str, Any] = json.loads(path.read_text())
    document = {key: facts[key] for key in ADDED if key in facts} | document
    different = [key for key, value in facts.items() if document.get(key) != value]
    if different:
        raise SystemExit(f"{path}: was measured with another {different[0]}; give another -o")
    return {**facts, **document}


def save(path: Path, document: dict[str, Any]) -> None:
    staging = path.with_name(path.name + ".tmp")
    staging.write_text(json.dumps(document, indent=1) + "\n")
    staging.replace(path)


def describe(args: argparse.Namespace, model: Path, tokens_hash: str) -> dict[str, Any]:
    """What the rows are measured with."""
    from quantkit import model as models

    facts: dict[str, Any] = {
        "model": {
            "name": Path(args.model).name,
            "weights_sha256": models.combine_hashes(
                {path.name: models.hash_file(path) for path in model.glob("*.safetensors")}
            ),
        },
        "scheme": quality_recipes.describe(args.scheme),
        "seed": args.seed,
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
        "machine": machine(),
        "versions": versions(),
    }
    if args.scheme in BUDGETS:
        facts["sensitivity"] = {
            "samples": args.sensitivity_samples,
            "seq_len": args.sensitivity_seq_len,
            "solver": "gptq",
        }
        if args.scheme in INGREDIENTS:
            facts["sensitivity"]["schemes"] = list(INGREDIENTS[args.scheme])
    if args.peer_python:
        command = [args.peer_python, "-c", PEER_VERSIONS]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        facts["peer_versions"] = json.loads(answer)
    return facts


def machine() -> dict[str, Any]:
    """What it ran on."""
    from quantkit import ops
    from quantkit.evals.evaluate import cpu_model

    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "kernels": ops.get_isa(),
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    """Of what computes on quantkit's side."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "compressed-tensors")},
        "quantkit": quantkit.__version__,
    }


def label(text: str) -> str:
    """Short name of a text file: its folder, where files are all called alike."""
    path = Path(text)
    return f"{path.parent.name}/{path.stem}" if path.parent.name else path.stem


def measure(
    name: str, args: argparse.Namespace, model: Path, ids: Path, scratch: Path
) -> dict[str, Any]:
    """One row: quantize, then score on every text."""
    out = scratch / "checkpoint"
    files = dict(args.gguf)
    run = _run_ours if name in RECIPES[args.scheme] else _read_gguf if name in files else _run_peer
    row = run(name, args, model, ids, out)
    row["texts"] = {label(text): score(out, model, text) for text in args.text}
    shutil.rmtree(out)
    return row


def _run_ours(
    name: str, args: argparse.Namespace, model: Path, ids: Path, out: Path
) -> dict[str, Any]:
    ours, recipe = RECIPES[args.scheme][name], out.with_name("recipe.yaml")
    facts: dict[str, Any] = {}
    if ours.mixed:
        facts["mixture"] = write_mixture(args.sensitivity, ours, recipe)
    else:
        recipe.write_text(ours.recipe())
    command = [
        sys.executable, "-m", "quantkit.cli.main", "calibrate", str(model), "-r", str(recipe),
        "--data", args.data, "--samples", str(args.samples), "--seq-len", str(args.seq_len),
        "--seed", str(args.seed), "--no-gate", "--json", "-o", str(out),
    ]  # fmt: skip
    began = time.monotonic()
    document = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    seconds = document["seconds"]
    print(name, json.dumps(seconds), f"whole process {time.monotonic() - began:.0f} s", flush=True)
    return {
        "seconds": seconds["calibrate"] + seconds["quantize"],
        "peak_rss_bytes": document["peak_rss_bytes"],
        "bits": document["bits_per_weight"],
        **facts,
    }


def _read_gguf(
    name: str, args: argparse.Namespace, model: Path, ids: Path, out: Path
) -> dict[str, Any]:
    """Quantized elsewhere: nobody knows in what time."""
    from quantkit import model as models

    path = Path(dict(args.gguf)[name])
    graft(path, model, out)
    row = {
        "seconds": None,
        "peak_rss_bytes": None,
        "bits": block_bits(path),
        "sha256": models.hash_file(path),
        "original_on_a_grid": on_a_grid(model),
    }
    print(name, json.dumps(row), flush=True)
    return row


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
        shapes += [x for key, x in found.items() if is_matrix(key, x)]
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
