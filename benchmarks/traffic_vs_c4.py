"""Does calibrating on a product's own traffic beat C4, on that product? By paired tests.

One model, one recipe, as many windows and tokens: once of the suite's traffic, once of C4. Both
checkpoints are scored on the suite's items and on traffic that neither has seen, and held against
each other item by item and window by window.

    python -m benchmarks.traffic_vs_c4 MODEL --data c4.jsonl [--suite support_intent] \\
        [--recipe w4a16-gptq] [--seed 0] -o results.json

Each suite's traffic is cut in two (`benchmarks.product_text`): what calibrates, which bounds the
number of windows for both, and what is held out. Every checkpoint is made, reloaded and scored by
one `quantkit calibrate` against the original's scores, which refuses calibration text that holds
eval items or held-out text. The gate's verdict against the original is kept, but decides nothing
here.

Then traffic stands against C4:

    score   D, the mean difference over items: Tango's interval, or over clusters (docs/gates.md);
            "better" or "worse" if the 95 % interval (two-sided) leaves 0 out, else "no difference
            shown"; and the gate's non-inferiority within --margin, both ways round
    KL      to the original, nats a token: the mean paired difference over windows ± its standard
            error, and the verdict from its 95 % interval

``-o`` holds rows and comparisons; a row is written when it is done, and a second call with the same
inputs measures only what is missing. The scores themselves lie beside it in a folder, as
`quantkit gate` reads them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.product_text import Halves, split_traffic
from benchmarks.vs_peers_quality import (
    KERNELS,
    machine,
    resolve,
    save,
    standard_error,
    unfinished,
    versions,
)
from quantkit.evals.suite import Suite
from quantkit.gate import Policy, judge
from quantkit.gate.compare import paired_rows, paired_windows
from quantkit.gate.policy import TaskGate
from quantkit.gate.statistics import Bounds, ratio_bounds
from quantkit.gate.tasks import paired_bounds
from quantkit.results import Results, TextResult

#: Who is scored on every suite; the last two are held against each other.
ORIGINAL, TRAFFIC, C4 = SIDES = ("original", "traffic", "C4")

#: Of each side of a two-sided 95 % interval.
ALPHA = 0.025

#: Ends of `quantkit calibrate` that leave a scored checkpoint: pass, regression, inconclusive.
SCORED = (0, 1, 3)

_QUANTKIT = [sys.executable, "-m", "quantkit.cli.main"]


def main() -> None:
    args = parse()
    model = resolve(args.model)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        inputs = {name: prepare(name, args, model, scratch / name) for name in args.suite}
        document = unfinished(args.output, describe(args, model, inputs))
        comparisons = document.setdefault("comparisons", {})
        for name in args.suite:
            for side in SIDES:
                if done(document, name, side, args.output):
                    continue
                row = measure(name, side, args, model, inputs[name], scratch)
                document["rows"][f"{name}: {side}"] = row
                comparisons.pop(name, None)  # of an earlier row
                save(args.output, document)
            if name not in comparisons:
                ours, theirs = (Results.load(scores(args.output, name, x)) for x in (TRAFFIC, C4))
                comparisons[name] = compare(name, ours, theirs, args.margin)
                save(args.output, document)
    print("\n" + report(document))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="C4, or what else stands against traffic")
    parser.add_argument(
        "--suite", action="append", help="with traffic; default: support_intent, grounded_qa"
    )
    parser.add_argument("--recipe", default="w4a16-gptq", help="its name, or a file")
    parser.add_argument("--samples", type=int, default=128, help="windows, where traffic has them")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a window")
    parser.add_argument("--held-out", type=float, default=0.25, help="share of the traffic")
    parser.add_argument("--eval-seq-len", type=int, default=256, help="of held-out windows")
    parser.add_argument("--margin", type=float, default=0.05, help="non-inferiority, as a share")
    parser.add_argument("--seed", type=int, default=0, help="of what is held out, and of windows")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args(argv)
    args.suite = list(dict.fromkeys(args.suite or ("support_intent", "grounded_qa")))
    return args


# --- inputs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What one suite is measured with.

    Attributes:
        suite: its items.
        halves: of its traffic.
        sources: side → calibration file.
        windows: ``samples``, ``seq_len``, and the sha256 of the tokens of each side.
    """

    suite: Suite
    halves: Halves
    sources: Mapping[str, str]
    windows: Mapping[str, Any]


def prepare(name: str, args: argparse.Namespace, model: Path, folder: Path) -> Inputs:
    """Find a suite, cut its traffic, and count the windows that both sources fill.

    Raises:
        SystemExit: the suite has no traffic.
    """
    from quantkit.evals.suites import find_suites, load_suite

    suite = load_suite(find_suites(name)[0])
    if suite.traffic is None:
        raise SystemExit(f"--suite {name}: has no traffic; evals/support_intent.yaml names one")
    halves = split_traffic(suite.traffic, args.held_out, args.seed, folder)
    sources = {TRAFFIC: str(halves.calibration), C4: args.data}
    return Inputs(suite, halves, sources, equal_windows(args, model, sources))


def equal_windows(
    args: argparse.Namespace, model: Path, sources: Mapping[str, str]
) -> dict[str, Any]:
    """As many windows of each source as the shorter one fills, at most ``--samples``."""
    from transformers import AutoTokenizer

    from quantkit.data.sources import Source
    from quantkit.data.tokens import TokenBatches, load_tokens

    tokenizer = AutoTokenizer.from_pretrained(model)

    def load(path: str, samples: int) -> TokenBatches:
        return load_tokens(
            [Source(path)],
            tokenizer,
            samples=samples,
            seq_len=args.seq_len,
            seed=args.seed,
            chat_template=tokenizer.chat_template is not None,
        )

    samples = min(len(load(path, args.samples).ids) for path in sources.values())
    hashes = {side: load(path, samples).hash for side, path in sources.items()}
    return {"samples": samples, "seq_len": args.seq_len, "tokens_sha256": hashes}


def describe(args: argparse.Namespace, model: Path, inputs: Mapping[str, Inputs]) -> dict[str, Any]:
    """What the rows are measured with."""
    from quantkit import model as models

    weights = {path.name: models.hash_file(path) for path in model.glob("*.safetensors")}
    return {
        "model": {"name": Path(args.model).name, "weights_sha256": models.combine_hashes(weights)},
        "recipe": {
            "name": Path(args.recipe).stem,
            "sha256": models.hash_file(recipe_file(args.recipe)),
        },
        "seed": args.seed,
        "margin": args.margin,
        "against": Path(args.data).name,
        "kernels": KERNELS,
        "suites": {
            name: {
                "sha256": found.suite.hash,
                "items": found.suite.n,
                "calibration": {
                    **found.windows,
                    "conversations": found.halves.calibrated,
                },
                "held_out": {
                    "conversations": found.halves.held,
                    "sha256": models.hash_file(found.halves.held_out),
                    "seq_len": args.eval_seq_len,
                },
            }
            for name, found in inputs.items()
        },
        "machine": machine(),
        "versions": versions(),
    }


def recipe_file(name: str) -> Path:
    """Of an installed recipe, or a file as it is."""
    from quantkit.recipe import load_recipe

    file = load_recipe(name).file
    assert file is not None  # it was read from one
    return file


def write_recipe(name: str, suite: Suite, margin: float) -> str:
    """A recipe that is gated on this suite alone."""
    recipe = yaml.safe_load(recipe_file(name).read_text(encoding="utf-8"))
    recipe["suites"] = [str(suite.path)]
    recipe["gate"] = {f"{suite.name}.{suite.score_name}": {"margin": margin}}
    return yaml.safe_dump(recipe, sort_keys=False)


# --- rows ------------------------------------------------------------------------------------


def scores(output: Path, suite: str, side: str) -> Path:
    """Where a row's scores lie, item by item."""
    stem = output.name.removesuffix(".json")
    return output.with_name(f"{stem}.scores") / f"{suite}.{side}.json"


def done(document: Mapping[str, Any], suite: str, side: str, output: Path) -> bool:
    return f"{suite}: {side}" in document["rows"] and scores(output, suite, side).exists()


def measure(
    name: str,
    side: str,
    args: argparse.Namespace,
    model: Path,
    found: Inputs,
    scratch: Path,
) -> dict[str, Any]:
    """One row; its scores go to `scores`."""
    target = scores(args.output, name, side)
    target.parent.mkdir(parents=True, exist_ok=True)
    if side == ORIGINAL:
        command = [
            *_QUANTKIT, "eval", str(model), "--suite", str(found.suite.path),
            "--text", str(found.halves.held_out), "--seq-len", str(args.eval_seq_len),
            "--kernels", KERNELS, "--json", "-o", str(target),
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        row: dict[str, Any] = {}
    else:
        row = calibrate(name, side, args, model, found, scratch, target)
    row |= summary(Results.load(target), name)
    print(f"{name}: {side} {json.dumps(row)}", flush=True)
    return row


def calibrate(
    name: str,
    side: str,
    args: argparse.Namespace,
    model: Path,
    found: Inputs,
    scratch: Path,
    target: Path,
) -> dict[str, Any]:
    """Make and score a checkpoint, as a user would; it is removed again."""
    recipe, out = scratch / "recipe.yaml", scratch / f"{name}.{side}"
    recipe.write_text(write_recipe(args.recipe, found.suite, args.margin), encoding="utf-8")
    command = [
        *_QUANTKIT, "calibrate", str(model), "-r", str(recipe), "--data", found.sources[side],
        "--samples", str(found.windows["samples"]), "--seq-len", str(args.seq_len),
        "--seed", str(args.seed), "--text", str(found.halves.held_out),
        "--eval-seq-len", str(args.eval_seq_len), "--kernels", KERNELS,
        "--baseline", str(scores(args.output, name, ORIGINAL)), "--json", "-o", str(out),
    ]  # fmt: skip
    ended = subprocess.run(command, stdout=subprocess.PIPE)
    if ended.returncode not in SCORED:
        raise subprocess.CalledProcessError(ended.returncode, command)
    document = json.loads(ended.stdout)
    results = Results.load(out.with_name(f"{out.name}.run") / "results.json")
    results.save(target)
    seconds = document["seconds"]
    return {
        "seconds": seconds["calibrate"] + seconds["quantize"],
        "peak_rss_bytes": document["peak_rss_bytes"],
        "bits": document["bits_per_weight"],
        "verdict": document["verdict"],
    }


def summary(results: Results, suite: str) -> dict[str, Any]:
    """What a row says of its scores."""
    text, task = results.text, results.tasks[suite]
    assert text is not None
    document = results.summary()
    windows = [(w.tokens, w.kl) for w in text.windows if w.kl is not None]
    return {
        "metric": task.metric,
        "score": task.value,
        "items": task.n,
        "windows": len(text.windows),
        "ppl": document["perplexity"],
        "kl": document["kl_mean"],
        "kl_error": standard_error(windows) if windows else None,
        "top1": document["top1_agreement"],
    }


# --- one against the other -------------------------------------------------------------------


def compare(suite: str, traffic: Results, c4: Results, margin: float) -> dict[str, Any]:
    """Traffic against C4, on items and on held-out text.

    Raises:
        NotComparableError: the two were not scored on the same items and text.
    """
    gate = TaskGate(suite, traffic.tasks[suite].metric, margin)
    policy = Policy((gate,), "margin")
    ways = {
        "traffic_not_worse": judge(traffic, c4, policy),
        "c4_not_worse": judge(c4, traffic, policy),
    }
    pairs = paired_rows(suite, traffic.tasks[suite], c4.tasks[suite])
    gains, losses = sum(p.gain for p in pairs), sum(p.loss for p in pairs)
    assert traffic.text is not None
    assert c4.text is not None
    return {
        "score": {
            **interval(paired_bounds(pairs, ALPHA), better=1),
            "items": len(pairs),
            "gains": gains,
            "losses": losses,
            "margin": margin,
            **{way: str(verdict.outcome) for way, verdict in ways.items()},
        },
        "kl": compare_kl(traffic.text, c4.text),
    }


def compare_kl(traffic: TextResult, c4: TextResult) -> dict[str, Any]:
    """Difference of KL to the original over the same windows, nats a token; below 0 is better."""
    paired_windows(traffic, c4)
    pairs = list(zip(traffic.windows, c4.windows, strict=True))
    differences = [a.kl - b.kl for a, b in pairs if a.kl is not None and b.kl is not None]
    tokens = [a.tokens for a, _ in pairs]
    if len(differences) < len(tokens):
        raise SystemExit("the scores hold no KL: measure again with another -o")
    return {
        **interval(ratio_bounds(differences, tokens, ALPHA), better=-1),
        "error": standard_error(list(zip(tokens, differences, strict=True))),
        "windows": len(tokens),
    }


def interval(bounds: Bounds, *, better: int) -> dict[str, Any]:
    """A difference with its two-sided 95 % interval, and what it shows of traffic.

    Args:
        bounds: one-sided ones at `ALPHA`.
        better: 1 where more is better, -1 where less is.
    """
    verdict = "no difference shown"
    low, high = bounds.lower, bounds.upper
    if low is not None and high is not None and (low > 0 or high < 0):
        verdict = "better" if better * bounds.estimate > 0 else "worse"
    return {
        "difference": bounds.estimate,
        "lower": low,
        "upper": high,
        "method": bounds.method,
        "verdict": verdict,
    }


# --- the page --------------------------------------------------------------------------------


def report(document: Mapping[str, Any]) -> str:
    """Rows and comparisons, suite by suite."""
    return "\n\n".join(_suite(document, name) for name in document["suites"])


def _suite(document: Mapping[str, Any], name: str) -> str:
    facts, found = document["suites"][name], document["comparisons"][name]
    windows, score, kl = facts["calibration"], found["score"], found["kl"]
    lines = [
        f"{name}, {document['recipe']['name']}, seed {document['seed']}: {windows['samples']} × "
        f"{windows['seq_len']} tokens of each; {facts['items']} items, {kl['windows']} × "
        f"{facts['held_out']['seq_len']} tokens of held-out traffic",
        f"{'calibrated on':14} {'s':>6} {'GB':>5} {'bits':>5} {'score':>7} {'KL':>15} "
        f"{'ppl':>7} {'top-1':>6} against the original",
    ]
    lines += [_row(side, document["rows"][f"{name}: {side}"]) for side in SIDES]
    within = f"within {100 * score['margin']:g} points"
    lines += [
        f"score of traffic − C4: {_points(score['difference'])} points, 95 % "
        f"{_points(score['lower'])} … {_points(score['upper'])} ({score['method']}; "
        f"{score['gains']} gains, {score['losses']} losses): {score['verdict']}",
        f"  traffic {within} of C4: {score['traffic_not_worse']}; "
        f"C4 {within} of traffic: {score['c4_not_worse']}",
        f"KL of traffic − C4: {kl['difference']:+.4f} ± {kl['error']:.4f}, 95 % "
        f"{_nats(kl['lower'])} … {_nats(kl['upper'])} ({kl['method']}): {kl['verdict']}",
    ]
    return "\n".join(lines)


def _row(side: str, row: Mapping[str, Any]) -> str:
    if side == ORIGINAL:
        return (
            f"{'(original)':14} {'-':>6} {'-':>5} {16:5.2f} {row['score']:7.1%} {'-':>15} "
            f"{row['ppl']:7.2f} {'-':>6}"
        )
    return (
        f"{side:14} {row['seconds']:6.0f} {row['peak_rss_bytes'] / 1e9:5.2f} {row['bits']:5.2f} "
        f"{row['score']:7.1%} {row['kl']:.4f} ± {row['kl_error']:.4f} {row['ppl']:7.2f} "
        f"{row['top1']:6.1%} {row['verdict']}"
    )


def _points(share: float | None) -> str:
    return "unbounded" if share is None else f"{100 * share:+.1f}"


def _nats(value: float | None) -> str:
    return "unbounded" if value is None else f"{value:+.4f}"


if __name__ == "__main__":
    main()
