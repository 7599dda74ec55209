"""A run folder as `quantkit calibrate` leaves it: 30 blocks, three tasks, a failed gate.

Scores are drawn from one seed; the verdict and the flips come from the real gate, so that the
report is tested on what the gate writes.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit import gate
from quantkit.results import (
    ItemRow,
    Results,
    TaskResult,
    TextResult,
    TextWindow,
    Verdict,
    write_json,
    write_text,
)

BLOCKS = 30
SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
QUEUES = (
    *("late delivery", "damaged parcel", "wrong item", "returns", "refund status"),
    *("billing error", "cancel subscription", "change plan", "password problem"),
    *("device setup", "warranty repair", "product availability", "discount code"),
    *("invoice copy", "saying thank you", "other"),
)
MESSAGES = (
    "Hi, it has been nine days and order {n} still says it is with the courier.",
    "Goodbye Premium, it is not you, it is my bank balance. How do I cancel before {n}?",
    "The lamp from box {n} came in three pieces. I only ordered one lamp.",
    "You charged card {n} twice in May, once for a plan that I do not have.",
)
PASSAGE = (
    "Tidewater Notes keeps deleted notebooks in the bin for 45 days. During that time the owner "
    "can restore a notebook with all of its pages and comments. Shared notebooks can only be "
    "restored by the person who created them, not by editors. "
)
RECIPE = """\
scheme: w4a16-g64
algorithm:
  gptq: {damp: 0.01, actorder: static}
keep: [lm_head]
rules:
  - {match: "*.down_proj", scheme: w8a16}
calibrate:
  data: [{path: traffic.jsonl, weight: 3}, {path: c4.jsonl}]
  samples: 128
  seq_len: 512
gate:
  kl.mean: {max: 0.05}
  top1: {min: 0.9}
  support_intent.acc: {margin: 0.05, floor: 0.4}
  grounded_qa.acc: {margin: 0.05}
  size.ratio: {max: 0.48}
"""
POLICY: dict[str, Any] = {
    "support_intent.acc": {"margin": 0.05, "floor": 0.4},
    "grounded_qa.acc": {"margin": 0.05},
    "kl.mean": {"max": 0.05},
    "kl.p99": {"max": 0.8},
    "top1": {"min": 0.9},
    "perplexity.ratio": {"max": 1.1},
    "size.ratio": {"max": 0.48},
}


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def layer_table() -> dict[str, Any]:
    """The manifest's layers, ordered as JSON orders them."""
    rng, table = random.Random(1), {}
    for block in range(BLOCKS):
        for kind, shape in SHAPES.items():
            wide = kind == "mlp.down_proj" or (block in (0, 29) and kind == "self_attn.v_proj")
            error = (0.006 if wide else 0.095) * rng.uniform(0.9, 1.12)
            depth = 0.5 + 0.7 * block / BLOCKS + (1.1 if block == 0 else 0)
            table[f"model.layers.{block}.{kind}"] = {
                "scheme": "w8a16" if wide else "w4a16-g64",
                "weight": "int8 channel" if wide else "int4 group 64",
                "input": None,
                "solver": "gptq",
                "shape": list(shape),
                "bits": 8.0278 if wide else 4.25,
                "weight_error": error,
                "output_error": error * depth * rng.uniform(0.75, 1.2),
            }
    return dict(sorted(table.items()))


def support_rows(rng: random.Random, *, loses: float) -> tuple[list[ItemRow], list[ItemRow]]:
    """448 items in 16 slices; the quantized model loses most in two of them."""
    base, quant = [], []
    for i in range(448):
        name = QUEUES[i % 16]
        right = rng.random() < 0.62
        lost = rng.random() < loses * (4 if name in ("refund status", "billing error") else 0.8)
        kept = (right and not lost) or (not right and rng.random() < 0.05)
        other = QUEUES[(i * 7 + 3) % 16]
        message = MESSAGES[i % 4].format(n=10200 + 37 * i)
        row = ItemRow(
            id=f"si-{i:04d}",
            score=float(right),
            hash=sha(message),
            prediction=name if right else other,
            target=name,
            prompt=f"Customer message: {message}\nThis message is about",
            slice=name,
            must_not_flip=i % 40 == 1,
        )
        base.append(row)
        wrong = QUEUES[(i * 5 + 1) % 16]
        if wrong == name:
            wrong = other
        quant.append(replace(row, score=float(kept), prediction=name if kept else wrong))
    return base, quant


def other_rows(
    rng: random.Random, prefix: str, n: int, *, clustered: bool
) -> tuple[list[ItemRow], list[ItemRow]]:
    base, quant = [], []
    for i in range(n):
        right = rng.random() < 0.7
        kept = right if rng.random() > 0.04 else not right
        row = ItemRow(
            id=f"{prefix}-{i:03d}",
            score=float(right),
            hash=sha(f"{prefix}{i}"),
            prediction="45 days" if right else "one year",
            target="45 days",
            prompt=f"{PASSAGE}\nQuestion {i}: how long are deleted notebooks kept?\nAnswer:",
            slice=("software", "hardware", "travel")[i % 3],
            cluster=f"{prefix}p-{i // 4:02d}" if clustered else None,
        )
        base.append(row)
        quant.append(replace(row, score=float(kept), prediction="45 days" if kept else "one year"))
    return base, quant


def make_results(*, loses: float = 0.2) -> tuple[Results, Results]:
    """(candidate, baseline). ``loses``: how often a right answer turns wrong."""
    rng = random.Random(7)
    sides: tuple[dict[str, TaskResult], dict[str, TaskResult]] = ({}, {})
    tables = {
        "support_intent": ("acc", support_rows(rng, loses=loses)),
        "grounded_qa": ("acc", other_rows(rng, "gq", 120, clustered=True)),
        "field_extract": ("exact_match", other_rows(rng, "fe", 121, clustered=False)),
    }
    for name, (metric, (base, quant)) in tables.items():
        for side, rows in zip(sides, (quant, base), strict=True):
            side[name] = TaskResult(metric=metric, rows=tuple(rows), hash=sha(name))
    windows = [(rng.uniform(2.9, 3.3), rng.uniform(0.024, 0.038)) for _ in range(40)]
    positions = [0.052, *(0.036 - 0.004 * math.log1p(i) for i in range(15))]
    shared = {
        "tokenizer": sha("tokenizer"),
        "chat_template": sha("template"),
        "dtype": "bfloat16",
        "lm_eval": "0.4.13",
        "seed": 0,
        "host": {"machine": "x86_64", "cpu": "Example CPU 9000", "threads": 2},
    }
    candidate = Results(
        fingerprint={**shared, "model": sha("quantized"), "kernels": "native/bf16"},
        tasks=sides[0],
        text=TextResult(
            hash=sha("text"),
            seq_len=1024,
            windows=tuple(
                TextWindow(1023, 1023 * (nll + kl), 1023 * kl, round(1023 * (0.955 - kl)))
                for nll, kl in windows
            ),
            kl_p99=0.412,
            kl_p999=1.37,
            kl_by_position=tuple(positions),
        ),
        cost={
            "size_bytes": 119_500_000,
            "bits_per_weight": 5.19,
            "reference_size_bytes": 269_060_552,
        },
    )
    baseline = Results(
        fingerprint={**shared, "model": sha("original"), "kernels": "torch/bf16"},
        tasks=sides[1],
        text=TextResult(
            hash=sha("text"),
            seq_len=1024,
            windows=tuple(TextWindow(1023, 1023 * nll) for nll, _ in windows),
        ),
        cost={"size_bytes": 269_060_552, "bits_per_weight": 16.0},
    )
    return candidate, baseline


def manifest() -> dict[str, Any]:
    return {
        "schema": 1,
        "quantkit": "0.1.0",
        "source": {"files": {"model.safetensors": sha("weights")}, "hash": sha("weights")},
        "recipe": {"name": "support-w4", "sha256": sha(RECIPE), "text": RECIPE},
        "plan": sha("plan"),
        "data": {
            "hash": sha("data"),
            "samples": 128,
            "seq_len": 512,
            "seed": 0,
            "sources": [
                {
                    "name": name,
                    "sha256": sha(name),
                    "documents": documents,
                    "tokens": tokens,
                }
                for name, documents, tokens in (
                    ("traffic.jsonl", 812, 49152),
                    ("c4.jsonl", 31, 16384),
                )
            ],
        },
        "versions": {"torch": "2.10.0", "transformers": "5.17.0", "compressed-tensors": "0.19.0"},
        "size_bytes": 119_500_000,
        "source_bytes": 269_060_552,
        "bits_per_weight": 5.19,
        "layers": layer_table(),
        "kept": ["lm_head"],
        "files": {name: sha(name) for name in ("config.json", "model.safetensors")},
    }


def write_run(
    out: Path,
    *,
    gated: bool = True,
    loses: float = 0.2,
    results: tuple[Results, Results] | None = None,
    facts: dict[str, Any] | None = None,
    policy: dict[str, Any] | None = None,
) -> Path:
    """Write ``out.run`` and return it.

    Args:
        gated: without it, no scores and no verdict.
        loses: see `make_results`; 0.2 fails the gate, 0.005 passes it.
        results: (candidate, baseline) in place of the drawn ones.
        facts: replaces keys of the manifest.
        policy: the gates.
    """
    folder = out.with_name(f"{out.name}.run")
    folder.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "output": str(out),
        "verdict": None,
        "checks": [],
        "size_bytes": 119_500_000,
        "bits_per_weight": 5.19,
        "seconds": {"load": 3.2, "calibrate": 71.4, "quantize": 44.9, "export": 6.1, "eval": 0.0},
        "peak_rss_bytes": 1_912_602_624,
        "results": None,
        "baseline": None,
        "warnings": ["c4.jsonl: 3 documents were shorter than 16 tokens and left out"],
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "recipe": "support-w4.yaml",
        "date": "2025-03-14T09:26:53+00:00",
        "machine": {"system": "Linux-6.1-x86_64", "python": "3.11.9", "threads": 2},
        "manifest": {**manifest(), **(facts or {})},
        "plan": {},
    }
    if gated:
        candidate, baseline = results or make_results(loses=loses)
        held = gate.parse_policy(policy or POLICY, source="recipe")
        verdict: Verdict = gate.judge(candidate, baseline, held)
        if verdict.exit_code:
            document["output"] += ".rejected"
        document |= {
            "verdict": str(verdict.outcome),
            "checks": verdict.to_json()["checks"],
            "results": candidate.summary(),
            "baseline": baseline.summary(),
        }
        document["seconds"]["eval"] = 213.8
        candidate.save(folder / "results.json")
        baseline.save(folder / "baseline.json")
        write_json(folder / "gate.json", verdict.to_json())
        flips = gate.flips(candidate, baseline, held)
        write_text(folder / "flips.jsonl", gate.flips_jsonl(flips))
    write_json(folder / "run.json", document)
    return folder
