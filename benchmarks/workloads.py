"""What is timed, and how each engine's own tool times it."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import run
from benchmarks.systems import System


@dataclass(frozen=True)
class Workload:
    """What is timed: ``batch`` prompts of ``prompt`` tokens, then ``new`` tokens of each.

    Attributes:
        decodes: the figure is of the new tokens, otherwise of the prompt's.
    """

    name: str
    prompt: int
    new: int
    batch: int
    decodes: bool


WORKLOADS = (
    Workload("tg128", prompt=0, new=128, batch=1, decodes=True),
    Workload("pp512", prompt=512, new=0, batch=1, decodes=False),
    Workload("x16", prompt=32, new=32, batch=16, decodes=True),
)


def run_quantkit(system: System, work: Workload, threads: int, repeats: int) -> float:
    asked = {
        "prompt_tokens": max(work.prompt, 1), "new_tokens": max(work.new, 1), "batch": work.batch,
        "threads": threads, "repeats": repeats,
    }  # fmt: skip
    command = [sys.executable, "-m", "quantkit.cli.main", "bench", "decode", str(system.path)]
    for name, value in asked.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    document = json.loads(run([*command, "--json"]))
    check(asked, document, system)
    return float(document["decode_tok_s" if work.decodes else "prefill_tok_s"])


def run_llamacpp(
    tools: Path, system: System, work: Workload, threads: int, repeats: int
) -> tuple[float, dict[str, Any]]:
    """Tokens a second, and what the tool says about itself."""
    shared = ["-m", str(system.path), "-t", str(threads)]
    if work.batch > 1:
        context = work.batch * (work.prompt + work.new)
        command = [
            str(tools / "llama-batched-bench"), *shared, "-tb", str(threads), "-c", str(context),
            "-npp", str(work.prompt), "-ntg", str(work.new),
            "-npl", ",".join([str(work.batch)] * repeats), "--output-format", "jsonl",
        ]  # fmt: skip
        lines = [json.loads(s) for s in run(command).splitlines() if s.startswith("{")]
        asked = {
            "pp": work.prompt, "tg": work.new, "pl": work.batch, "is_pp_shared": 0,
            "n_threads": threads, "n_threads_batch": threads,
        }  # fmt: skip
        for line in lines:
            check(asked, line, system)
        samples = [line["speed_tg"] for line in lines]
        about = {}
    else:
        command = [
            str(tools / "llama-bench"), *shared, "-p", str(work.prompt), "-n", str(work.new),
            "-r", str(repeats), "-o", "json",
        ]  # fmt: skip
        (about,) = json.loads(run(command))
        asked = {"n_prompt": work.prompt, "n_gen": work.new, "n_depth": 0, "n_threads": threads}
        check(asked, about, system)
        samples = about["samples_ts"]
    if len(samples) != repeats:
        raise SystemExit(f"{system.name}: {len(samples)} repeats where {repeats} were asked for")
    return statistics.median(samples), about


def check(asked: dict[str, int], said: dict[str, Any], system: System) -> None:
    """What a tool says that it measured is what it was asked to."""
    wrong = {key: said.get(key) for key, value in asked.items() if said.get(key) != value}
    if wrong:
        raise SystemExit(f"{system.engine} {system.name}: asked for {asked}, measured {wrong}")
