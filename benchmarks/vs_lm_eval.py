"""A multiple-choice task scored by quantkit and by ``lm_eval --model hf``, on one CPU.

    python benchmarks/vs_lm_eval.py MODEL --items items.jsonl --count 1000 \\
        --batch-sizes 1 8 16 32 --rounds 3 --threads 2 -o results.json

MODEL is a folder in 16 bits. Items are JSON lines with ``query``, ``choices`` and ``gold``; a
seeded subset of ``--count`` is scored. lm-eval builds the prompts and the metric for both, from one
task file; what differs is who answers its requests: quantkit's native decoder, or lm-eval's own
`HFLM` on the same weights in transformers, in bf16.

Both are loaded before the clock starts and have scored a few items. In a round each system scores
all items once, the order reversed every other round. ``same`` counts the items that a system finds
right or wrong as quantkit does: lm-eval rounds activations and softmax to bf16, so that near ties
fall either way (in fp32 the two agree to rounding, ``tests/evals/test_agreement.py``).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit import ops
from quantkit.evals.language_model import QuantkitLM
from quantkit.evals.run_suite import run_suite
from quantkit.evals.suite import Suite
from quantkit.evals.suites import load_suite
from quantkit.models.load import load_runtime
from quantkit.ops.measure import cpu_name

TASK = {
    "task": "items",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "items.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc"}],
}

#: Items that each system scores before it is timed.
WARM_UP = 8


@dataclass
class System:
    """One way of scoring: seconds by round, and what each item scored."""

    name: str
    lm: Any
    seconds: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def score(self, suite: Suite) -> None:
        """Score every item once."""
        began = time.perf_counter()
        result = run_suite(self.lm, suite)
        self.seconds.append(time.perf_counter() - began)
        scores = [row.score for row in result.rows]
        if self.scores and scores != self.scores:
            raise SystemExit(f"{self.name}: two rounds scored the same items differently")
        self.scores = scores


def main() -> None:
    parser = argparse.ArgumentParser(description="Scoring speed beside lm_eval --model hf.")
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--items", type=Path, required=True, help="JSON lines: query, choices, gold"
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("-o", "--output", type=Path, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    with tempfile.TemporaryDirectory() as folder:
        suite = write_suite(Path(folder), draw(args.items, args.count, args.seed))
        systems = load_systems(args.model, args.batch_sizes)
        machine = {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "isa": ops.get_isa(),
            "torch": torch.__version__,
            "lm_eval": version("lm_eval"),
            "transformers": version("transformers"),
        }
        print(", ".join(f"{key} {value}" for key, value in machine.items()))
        measure(systems, suite, args.rounds, Path(folder))
    document = summarize(systems)
    show(document, suite.n)
    if args.output:
        args.output.write_text(json.dumps({"machine": machine, **document}, indent=1) + "\n")


def draw(path: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """A seeded subset of a file of items, in the file's order, of those without equal choices,
    which quantkit refuses."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    rows = [row for row in rows if len(set(row["choices"])) == len(row["choices"])]
    if len(rows) < count:
        raise SystemExit(f"{path}: {len(rows)} items where --count asks for {count}")
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]


def write_suite(folder: Path, rows: list[dict[str, Any]]) -> Suite:
    """A task file and its items in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "items.yaml").write_text(yaml.safe_dump(TASK))
    return load_suite(folder / "items.yaml")


def load_systems(model: Path, batch_sizes: list[int]) -> list[System]:
    """quantkit, and lm-eval's own model at each batch size, all on one copy of its weights."""
    runtime = load_runtime(str(model), dtype=torch.bfloat16)
    if runtime.decoder is None:
        raise SystemExit(f"{model}: {runtime.fallback}; the comparison is of the native decoder")
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    systems = [System("quantkit", QuantkitLM(runtime))]
    for size in batch_sizes:
        lm = HFLM(pretrained=theirs, tokenizer=tokenizer, backend="causal", batch_size=size)
        systems.append(System(f"lm_eval hf, batch {size}", lm))
    return systems


def measure(systems: list[System], suite: Suite, rounds: int, folder: Path) -> None:
    """Warm up, then time every system once a round."""
    few = write_suite(folder / "warm-up", [dict(row) for row in _plain(suite)[:WARM_UP]])
    for system in systems:
        run_suite(system.lm, few)
    for number in range(rounds):
        for system in systems if number % 2 == 0 else systems[::-1]:
            system.score(suite)
            print(f"round {number + 1}  {system.name:<22} {system.seconds[-1]:8.1f} s", flush=True)


def _plain(suite: Suite) -> list[dict[str, Any]]:
    return [{key: row[key] for key in ("query", "choices", "gold")} for row in suite.rows]


def summarize(systems: list[System]) -> dict[str, Any]:
    """Medians over rounds, and quantkit's share of the best peer's time within each round."""
    ours, *peers = systems
    rows = [
        {
            "system": system.name,
            "seconds": system.seconds,
            "median_s": statistics.median(system.seconds),
            "accuracy": statistics.fmean(system.scores),
            "same": sum(a == b for a, b in zip(system.scores, ours.scores, strict=True)),
        }
        for system in systems
    ]
    best = min(peers, key=lambda peer: statistics.median(peer.seconds))
    shares = [a / b for a, b in zip(ours.seconds, best.seconds, strict=True)]
    return {"systems": rows, "best": best.name, "share_of_best": statistics.median(shares)}


def show(document: dict[str, Any], n: int) -> None:
    print(f"\n{'system':<22} {'median s':>9} {'items/s':>8} {'accuracy':>9} {'same':>10}")
    for row in document["systems"]:
        print(
            f"{row['system']:<22} {row['median_s']:>9.1f} {n / row['median_s']:>8.1f} "
            f"{row['accuracy']:>9.4f} {row['same']:>5} / {n}"
        )
    print(
        f"\nquantkit takes {document['share_of_best']:.2f} of the time of {document['best']} "
        "(median over rounds)"
    )


if __name__ == "__main__":
    main()
