"""Mixed precision by `quantkit inspect`: the sensitivity file, its cost, the recipe of it."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.quality_recipes import BUDGETS, INGREDIENTS, Ours

_INSPECT = [sys.executable, "-m", "quantkit.cli.main", "inspect"]


def measure_once(
    args: argparse.Namespace, model: Path, known: dict[str, Any] | None
) -> dict[str, Any]:
    """Measure the sensitivity file if it is not there.

    `quantkit inspect` itself refuses one of another model, data or settings.

    Args:
        known: what an earlier call returned for the rows that are there.

    Returns:
        The file's name and sha256, whole seconds and peak memory of measuring it: None where it
        was there before.

    Raises:
        SystemExit: rows were made from another sensitivity file.
    """
    from quantkit import model as models

    file, there = args.sensitivity, args.sensitivity.exists()
    command = [
        *_INSPECT, str(model), "--sensitivity", str(file), "--data", args.data,
        "--samples", str(args.sensitivity_samples), "--seq-len", str(args.sensitivity_seq_len),
        "--seed", str(args.seed),
    ]  # fmt: skip
    if args.scheme in INGREDIENTS:
        command += ["--schemes", ",".join(INGREDIENTS[args.scheme])]
    seconds, peak = run_measured(command)
    found: dict[str, Any] = {
        "file": file.name,
        "sha256": models.hash_file(file),
        "seconds": None if there else seconds,
        "peak_rss_bytes": None if there else peak,
    }
    print(f"sensitivity {json.dumps(found)}", flush=True)
    if known is None:
        return found
    if known["sha256"] != found["sha256"]:
        raise SystemExit(f"{file}: rows were made from another sensitivity file; give another -o")
    return known


def run_measured(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a process that must succeed."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.monotonic() - began, usage.ru_maxrss * 1024


def write_mixture(file: Path, row: Ours, recipe: Path) -> dict[str, Any]:
    """Write the recipe of the best mixture within a row's budget, solved by the row's algorithm.

    Returns:
        The predicted KL, and how many layers have which scheme.
    """
    command = [
        *_INSPECT, "--sensitivity", str(file), "--bits", str(BUDGETS[row.scheme]),
        "--recipe", str(recipe), "--json",
    ]  # fmt: skip
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    mixture = json.loads(answer)["mixture"]
    recipe.write_text(with_algorithm(recipe.read_text(), row.algorithm))
    return {
        "predicted_kl": mixture["predicted_kl"],
        "layers": dict(sorted(Counter(mixture["chosen"].values()).items())),
    }


def with_algorithm(recipe: str, algorithm: str) -> str:
    """A recipe whose one line ``algorithm:`` says something else."""
    text, count = re.subn(r"(?m)^algorithm: .*$", lambda _: f"algorithm: {algorithm}", recipe)
    if count != 1:
        raise SystemExit(
            f"the mixture's recipe has {count} lines `algorithm:` where one is expected"
        )
    return text
