"""Every verdict that a release can meet, on a real model: each command and its exit code.

    python examples/walkthrough.py [-o FOLDER]

A good checkpoint passes (0) and a bad one fails (1) with the layers to blame; too few items are
inconclusive (3) and say how many would do; another tokenizer is not comparable (5), a results file
that lost a row is refused (4), a broken policy is a usage error (2). The script ends with an error
at the first command whose exit code is another one.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from demo import find_model, say
from transformers import AutoTokenizer

from quantkit.cli.main import run

SUITE = "support_intent"
ITEMS = "60"

#: Round to nearest with a margin that it cannot hold.
W4_RECIPE = """\
scheme: w4a16-g64
algorithm: {rtn: {clip: mse}}
keep: [lm_head]
suites: [support_intent]
calibrate: {data: [evals:support_intent], samples: 16, seq_len: 256, seed: 0}
gate:
  support_intent.acc: {margin: 0.02}
"""
POLICY = "support_intent.acc: {margin: 0.02}\n"
BROKEN_POLICY = "support_intent.acc: {margin: 0.02\nkl.mean {max: 0.05}\n"


@dataclass(frozen=True)
class Step:
    """One command that ran: what it showed, and what it ended with."""

    shows: str
    command: str
    code: int


class Walk:
    """Runs commands and holds each against the exit code that it should end with."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def quantkit(self, shows: str, wanted: int, *arguments: str | Path) -> None:
        """Run ``quantkit`` in this process."""
        words = [str(a) for a in arguments]
        self._say(shows, command := f"quantkit {shlex.join(words)}")
        self._end(shows, command, run(words), wanted)

    def script(self, shows: str, wanted: int, *arguments: str) -> None:
        """Run a Python module in a process of its own."""
        self._say(shows, command := f"python {shlex.join(arguments)}")
        self._end(shows, command, subprocess.run([sys.executable, *arguments]).returncode, wanted)

    def _say(self, shows: str, command: str) -> None:
        say(f"\n=== {shows}\n$ {command}")

    def _end(self, shows: str, command: str, code: int, wanted: int) -> None:
        say(f"--- exit {code}")
        if code != wanted:
            raise SystemExit(f"{shows}: exit {code} where {wanted} is right\n  {command}")
        self.steps.append(Step(shows, command, code))


def main(arguments: list[str] | None = None) -> int:
    """Run every step; 0 when each ended as it should."""
    parser = argparse.ArgumentParser(description="Every verdict, on a real model.")
    parser.add_argument("-o", "--output", type=Path, default=Path(".walkthrough"))
    out = parser.parse_args(arguments).output
    began = time.monotonic()
    if out.exists() and not (out / "policy.yaml").is_file():
        raise SystemExit(f"{out}: exists, and no walk-through made it; give another -o")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    policy = out / "policy.yaml"
    policy.write_text(POLICY)

    walk, model = Walk(), find_model()
    good, baseline = pass_and_fail(walk, model, out)
    few = too_few_items(walk, model, good, policy, out)
    other_tokenizer(walk, good, few, policy, out)
    lost_row(walk, baseline, good, policy, out)
    broken = out / "broken.yaml"
    broken.write_text(BROKEN_POLICY)
    results = good.with_name("w8a8.run") / "results.json"
    walk.quantkit(
        "a policy that is no YAML", 2, "gate", results, "--baseline", baseline, "--policy", broken
    )
    walk.script(
        "how often a gate passes a model that sits exactly at its margin (exact, not sampled)",
        0,
        "-m",
        "benchmarks.gate_simulation",
    )

    width = max(len(step.shows) for step in walk.steps)
    say(f"\n{'step':<{width}}  exit")
    for step in walk.steps:
        say(f"{step.shows:<{width}}  {step.code:>4}")
    say(f"\nevery step ended as it should; {time.monotonic() - began:.0f} s in all")
    return 0


def pass_and_fail(walk: Walk, model: str, out: Path) -> tuple[Path, Path]:
    """(a checkpoint that passed, the original's results)."""
    good, recipe = out / "w8a8", out / "w4-tight.yaml"
    recipe.write_text(W4_RECIPE)
    small = ("--samples", "16", "--seq-len", "256", "--eval-tokens", "4096")
    walk.quantkit(
        "int8 weights and activations: PASS, promoted", 0,
        "calibrate", model, "-r", "w8a8", *small, "-o", good,
    )  # fmt: skip
    baseline = out / "w8a8.run" / "baseline.json"
    walk.quantkit(
        "4-bit, rounded to nearest, held to 2 points: FAIL, not promoted", 1,
        "calibrate", model, "-r", recipe, *small, "--baseline", baseline, "-o", out / "w4",
    )  # fmt: skip
    check((out / "w4.rejected").is_dir() and not (out / "w4").exists(), "a failure is not promoted")
    mend = out / "mend.yaml"
    walk.quantkit(
        "which layers did it, measured on items that flipped", 0,
        "explain", out / "w4.run", "--layers", "3", "--items", "8", "-o", mend,
    )  # fmt: skip
    check("model.layers." in mend.read_text(), "explain names layers")
    return good, baseline


def too_few_items(walk: Walk, model: str, good: Path, policy: Path, out: Path) -> Path:
    """The original's results on a few items."""
    few, candidate, verdict = out / "few.json", out / "few-w8a8.json", out / "few-gate.json"
    subset = ("--suite", SUITE, "--max-items", ITEMS)
    walk.quantkit(
        f"what {ITEMS} items could decide, before any is scored", 0,
        "eval", "--plan", *subset, "--policy", policy,
    )  # fmt: skip
    walk.quantkit("the original on them", 0, "eval", model, *subset, "-o", few)
    walk.quantkit("the good checkpoint on them", 0, "eval", good, *subset, "-o", candidate)
    walk.quantkit(
        "too few items: INCONCLUSIVE, with the number needed", 3,
        "gate", candidate, "--baseline", few, "--policy", policy, "-o", verdict,
    )  # fmt: skip
    (gate,) = json.loads(verdict.read_text())["checks"]
    needed = gate["details"]["items_needed"]
    say(f"    {needed} items are needed, {ITEMS} were scored")
    check(needed > int(ITEMS), "the number needed is more than there were")
    return few


def other_tokenizer(walk: Walk, good: Path, few: Path, policy: Path, out: Path) -> None:
    """The good checkpoint with one token more in its tokenizer."""
    changed, results = out / "w8a8-other-tokenizer", out / "other-tokenizer.json"
    shutil.copytree(good, changed)
    tokenizer = AutoTokenizer.from_pretrained(changed)
    tokenizer.add_tokens(["<|ticket|>"])
    tokenizer.save_pretrained(changed)
    walk.quantkit(
        "the same checkpoint with another tokenizer", 0,
        "eval", changed, "--suite", SUITE, "--max-items", ITEMS, "-o", results,
    )  # fmt: skip
    walk.quantkit(
        "scores of another tokenizer: not comparable", 5,
        "gate", results, "--baseline", few, "--policy", policy,
    )  # fmt: skip


def lost_row(walk: Walk, baseline: Path, good: Path, policy: Path, out: Path) -> None:
    """The good checkpoint's results without their last row."""
    document = json.loads((good.with_name("w8a8.run") / "results.json").read_text())
    dropped = document["tasks"][SUITE]["rows"].pop()
    edited = out / "edited.json"
    edited.write_text(json.dumps(document))
    say(f"\n(item {dropped['id']} is deleted from {edited})")
    walk.quantkit(
        "a row deleted from a results file: refused, never scored as wrong", 4,
        "gate", edited, "--baseline", baseline, "--policy", policy,
    )  # fmt: skip


def check(holds: bool, rule: str) -> None:
    """End the script unless ``rule`` holds."""
    if not holds:
        raise SystemExit(f"this should hold: {rule}")


if __name__ == "__main__":
    sys.exit(main())
