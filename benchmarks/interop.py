"""Do other engines read what quantkit writes, and do they say the same?

    python -m benchmarks.interop MODEL --data c4.jsonl [--vllm-python PATH] [--only w4a16-g64 …] \
        -o results.json --write docs/interop.md [--mark padded]
    python -m benchmarks.interop MODEL --data c4.jsonl --engine llama.cpp --llama BUILD \
        -o llamacpp.json --write docs/interop.md --mark llamacpp

One row a scheme and engine. For each scheme a checkpoint is made (round to nearest: what is tested
is the format, not the solver; 2 bits by GPTQ), and each engine that takes it continues prompts
greedily and scores them. Agreement is the share of prompts whose whole continuation is ours
(``--kernels native-float``). |Δ| is the root mean square, over prompts, of the difference from our
log-probability a token. The floor beside it is the same number between two paths of our own that
differ only in where they round (``native-float`` and ``reference``), in both columns. An engine
that does not take a scheme gives its reason in its own words.

llama.cpp is asked for what `quantkit export --format gguf` makes of a checkpoint, or the export's
refusal is the reason. It rounds activations to 8 bits in groups, and so do our own kernels as they
serve: its floor is between these (``native``) and ``native-float``. BUILD is a build folder of its
sources whose library is built.

A row is written when it is done; a second call measures only rows that are missing, or whose
reason lost the list that it announces, and must be of the same model, prompts, machine and
versions. The page is written from the rows and says what they were measured with.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.schemes import SCHEMES

#: Between such marks the page is written by this script.
BEGIN, END = "<!-- {}: begin -->", "<!-- {}: end -->"

OURS = "quantkit"
ENGINES = ("transformers", "vllm", "llama.cpp")

#: Those that are asked unless a call names others.
USUAL = ENGINES[:2]

#: Kernels of ours whose distance from ``native-float`` is an engine's floor.
ORACLES = {"transformers": "reference", "vllm": "reference", "llama.cpp": "native"}

#: Behind a reason whose end is lost.
_CUT = " (the list was not kept; the next call measures this row again)"

#: Longest reason that the table shows.
REASON = 480


@dataclass(frozen=True)
class Answers:
    """What an engine makes of the prompts.

    Attributes:
        logprobs: log-probability of each prompt's tokens but the first, a token, in nats.
        texts: greedy continuations.
        how: what the engine was asked for that it does not do by itself.
    """

    logprobs: list[float]
    texts: list[str]
    how: str = ""


@dataclass(frozen=True)
class Row:
    """One scheme on one engine. ``reason`` is why it does not load; the numbers are then None.
    ``how`` is what it takes to load it, if that is more than its name.

    ``usual`` and ``floor`` are agreement and difference between two paths of our own.
    """

    loads: bool
    reason: str = ""
    agreement: float | None = None
    usual: float | None = None
    delta: float | None = None
    floor: float | None = None
    how: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibration text for static input scales")
    parser.add_argument("--vllm-python", help="interpreter of an environment with vLLM")
    parser.add_argument("--vllm-arg", action="append", default=[], help="passed on to vLLM")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="to ask; repeatable")
    parser.add_argument("--llama", type=Path, help="build folder of llama.cpp")
    parser.add_argument("--only", action="append", help="names of schemes to run")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    parser.add_argument("--mark", default="measured", help="which of its tables")
    args = parser.parse_args()

    document = json.loads(args.output.read_text()) if args.output.exists() else {"rows": {}}
    document["facts"] = join_facts(document.get("facts"), describe(args))
    engines = tuple(args.engine or USUAL)
    if "llama.cpp" in engines and args.llama is None:
        parser.error("--engine llama.cpp: give --llama its build folder, too")
    prompts = read_prompts(args.prompts)
    for name in wanted(args.only):
        missing = [
            engine
            for engine in engines
            if is_cut(document["rows"].get(f"{name} {engine}"))
            and (engine != "vllm" or args.vllm_python is not None)
        ]
        if missing:
            for engine, row in measure(name, missing, args, prompts).items():
                document["rows"][f"{name} {engine}"] = asdict(row)
                print(name, engine, row, flush=True)
            save(args.output, document)
    if args.write is not None:
        found = table(document, wanted(args.only), engines)
        args.write.write_text(replace_table(args.write.read_text(), found, args.mark))


def wanted(only: Sequence[str] | None) -> list[str]:
    """Names of the schemes to run, in the table's order. SystemExit for one that is not known."""
    for name in only or ():
        if name not in SCHEMES:
            raise SystemExit(f"--only {name!r}: known here: {', '.join(SCHEMES)}")
    return [name for name in SCHEMES if not only or name in only]


def read_prompts(count: int) -> list[str]:
    """Customer messages of the installed suite for support intents. SystemExit if too few."""
    from quantkit.evals.suites import load_suites

    (suite,) = load_suites(["support_intent"])
    messages = [str(row["message"]) for row in suite.rows[:count]]
    if len(messages) < count:
        raise SystemExit(f"--prompts {count}: there are {len(messages)}")
    return messages


def measure(
    name: str, engines: Sequence[str], args: argparse.Namespace, prompts: Sequence[str]
) -> dict[str, Row]:
    """Rows of one scheme by engine."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / name
        try:
            make_checkpoint(name, args, checkpoint)
        except subprocess.CalledProcessError as e:
            reason = f"not made: {last_line(e.stderr)}"
            return {engine: Row(loads=False, reason=reason) for engine in engines}

        @cache
        def ours(kernels: str = "native-float") -> Answers:
            return ask_ours(checkpoint, kernels, prompts, args.new_tokens)

        ask: dict[str, Callable[[], Answers]] = {
            "transformers": lambda: ask_transformers(checkpoint, prompts, args.new_tokens),
            "vllm": lambda: ask_vllm(checkpoint, prompts, args),
            "llama.cpp": lambda: ask_llamacpp(checkpoint, prompts, args),
        }
        return {
            engine: compare(ask[engine], ours, lambda kernels=ORACLES[engine]: ours(kernels))
            for engine in engines
        }


def compare(
    ask: Callable[[], Answers], ours: Callable[[], Answers], oracle: Callable[[], Answers]
) -> Row:
    """An engine's answers beside ours and those of other kernels of ours, which are asked only if
    there are any; what the engine raises is its reason."""
    try:
        theirs = ask()
    except Exception as e:  # whatever another engine fails with is what the table is about
        return Row(loads=False, reason=reason_of(e))
    return Row(
        True,
        "",
        agreement(ours(), theirs),
        agreement(ours(), oracle()),
        distance(ours(), theirs),
        distance(ours(), oracle()),
        theirs.how,
    )


def is_cut(row: dict[str, Any] | None) -> bool:
    """Whether a row is to be measured: it is absent, or its reason lacks the lines that a colon
    announces."""
    return row is None or (not row["loads"] and row["reason"].endswith(":"))


def agreement(a: Answers, b: Answers) -> float:
    """Share of prompts that both continue alike to the last token."""
    return sum(x == y for x, y in zip(a.texts, b.texts, strict=True)) / len(a.texts)


def distance(a: Answers, b: Answers) -> float:
    """Root mean square difference in log-probability a token, over prompts."""
    gaps = [(x - y) ** 2 for x, y in zip(a.logprobs, b.logprobs, strict=True)]
    return math.sqrt(sum(gaps) / len(gaps))


def reason_of(error: Exception) -> str:
    """The line of an error that says why: of an engine's log the last exception in it that is more
    than word of another process's end."""
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, QuantkitError):
        found = [text for place in range(len(lines)) if (text := _raised(lines, place))]
        telling = [line for line in found if not any(word in line for word in _AFTERMATH)]
        return (telling or found or lines)[-1].strip()
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"


def _raised(lines: Sequence[str], place: int) -> str:
    """The exception in a line, or "". One that ends in a colon goes on in the next line, and in
    those behind it that are indented."""
    match = _RAISED.search(lines[place])
    if match is None or not match[0].endswith(":"):
        return match[0] if match else ""
    # One record of a log has the same words in front of each of its lines.
    front = lines[place][: match.start()]
    listed: list[str] = []
    for line in lines[place + 1 :]:
        own = line.removeprefix(front)
        if not line.startswith(front) or (listed and not own[:1].isspace()):
            break
        listed.append(own.strip())
    return f"{match[0]} {'; '.join(listed)}".rstrip()


#: An exception as a traceback ends with it, behind whatever the engine's log puts in front.
_RAISED = re.compile(r"\b\w*(?:Error|Exception): .*")

#: What other processes of an engine say when one has failed.
_AFTERMATH = ("initialization failed", "EngineDeadError", "failed to start")


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else "no message"


# --- engines ---------------------------------------------------------------------------------


def make_checkpoint(name: str, args: argparse.Namespace, out: Path) -> None:
    """Round to nearest under one scheme, head kept; 2 bits by GPTQ, or nothing is left of a model
    of this size and its reload is refused."""
    recipe = out.with_name("recipe.yaml")
    algorithm = "gptq" if SCHEMES[name].weight.bits == 2 else "rtn"
    recipe.write_text(
        f"scheme: {name}\nalgorithm: {algorithm}\nkeep: [lm_head]\n"
        "calibrate: {samples: 16, seq_len: 256, seed: 0}\n"
    )
    command = [
        sys.executable, "-m", "quantkit.cli.main", "calibrate", args.model, "-r", str(recipe),
        "--data", args.data, "--no-gate", "-o", str(out),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)


def ask_ours(checkpoint: Path, kernels: str, prompts: Sequence[str], new: int) -> Answers:
    from quantkit.evals.language_model import QuantkitLM
    from quantkit.models.load import load_runtime

    return ask(QuantkitLM(load_runtime(checkpoint, kernels=kernels)), prompts, new)


def ask_transformers(checkpoint: Path, prompts: Sequence[str], new: int) -> Answers:
    """transformers' own loader: in its default mode and, where that fails, dequantizing.

    The default mode computes with the stored tensors and gives packed zero points the shape of
    unpacked ones. The other one drops activation quantization, so it is tried for schemes of
    weights alone.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

    from quantkit.evals.language_model import QuantkitLM
    from quantkit.models.runtime import Runtime

    how, load = "", AutoModelForCausalLM.from_pretrained
    try:
        model = load(checkpoint, local_files_only=True)
    except Exception:  # whatever a mode fails with, the other one may not
        if SCHEMES[checkpoint.name].input is not None:
            raise
        how = "CompressedTensorsConfig(dequantize=True)"
        config = CompressedTensorsConfig(dequantize=True)
        model = load(checkpoint, local_files_only=True, quantization_config=config)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    runtime = Runtime(
        model=model.eval(),
        tokenizer=tokenizer,
        name=str(checkpoint),
        fingerprint={},
        size_bytes=0,
        bits_per_weight=0.0,
    )
    return replace(ask(QuantkitLM(runtime), prompts, new), how=how)


def ask_vllm(checkpoint: Path, prompts: Sequence[str], args: argparse.Namespace) -> Answers:
    from quantkit.engines.artifact import read_artifact
    from quantkit.engines.vllm import VllmOptions, find_vllm, running
    from quantkit.evals.endpoint import EndpointConfig, connect
    from quantkit.evals.endpoint_model import EndpointLM
    from quantkit.models.tokenizer import load_tokenizer

    options = VllmOptions(max_context=1024, arguments=tuple(args.vllm_arg))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log: list[str] = []
    try:
        with running(
            find_vllm(args.vllm_python),
            read_artifact(str(checkpoint)),
            options,
            environment=environment,
            timeout=1800,
            echo=log.append,
            refuse=False,
        ) as process:
            endpoint = connect(EndpointConfig(process.url, timeout=900))
            tokenizer = load_tokenizer(str(checkpoint))[0]
            return ask(EndpointLM(endpoint, tokenizer), prompts, args.new_tokens)
    except QuantkitError as e:  # the end of its log that the error holds may not reach the cause
        raise QuantkitError("\n".join([*log, e.message])) from e


def ask_llamacpp(checkpoint: Path, prompts: Sequence[str], args: argparse.Namespace) -> Answers:
    """llama.cpp's library, on an export of the checkpoint."""
    from benchmarks.llamacpp_answers import llamacpp_answers

    return Answers(*llamacpp_answers(checkpoint, args.llama, prompts, args.new_tokens))


def ask(lm: Any, prompts: Sequence[str], new: int) -> Answers:
    """Score and continue prompts on anything that is a `quantkit.evals.token_model.TokenLM`."""
    ids = [lm.tok_encode(prompt) for prompt in prompts]
    scored = lm.score([(tokens[:1], tokens[1:]) for tokens in ids])
    logprobs = [value / (len(tokens) - 1) for (value, _), tokens in zip(scored, ids, strict=True)]
    eos = lm.tokenizer.decode(lm.eot_token_id)
    texts = lm.continue_greedily(ids, [[eos]] * len(ids), [new] * len(ids))
    return Answers(logprobs, texts)


# --- the page --------------------------------------------------------------------------------


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """What the rows are measured with."""
    from quantkit.evals.evaluate import cpu_model

    facts: dict[str, Any] = {
        "model": Path(args.model).name,
        "prompts": args.prompts,
        "new_tokens": args.new_tokens,
        "machine": f"{cpu_model()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {
            name: version(name) for name in ("torch", "transformers", "compressed-tensors")
        },
    }
    if args.vllm_python:
        from quantkit.engines.vllm import find_vllm

        found = find_vllm(args.vllm_python)
        facts["versions"]["vllm"] = f"{found.version} ({found.host.device})"
    if args.llama:
        from benchmarks.llamacpp_build import version_of

        facts["versions"]["llama.cpp library"] = version_of(args.llama)
    return facts


def join_facts(known: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """Facts that hold for the rows of earlier calls and of this one.

    Args:
        known: of the rows that are there; None without any.
        now: of this call. It may lack versions, or add some.

    SystemExit where the two differ.
    """
    if known is None:
        return now
    before, after = known | known["versions"], now | now["versions"]
    differ = [
        f"{name} {before[name]!r}, now {value!r}"
        for name, value in after.items()
        if name != "versions" and before.get(name, value) != value
    ]
    if differ:
        raise SystemExit(f"the rows so far have {'; '.join(differ)}; give another --output")
    return now | {"versions": known["versions"] | now["versions"]}


def table(
    document: dict[str, Any],
    names: Sequence[str] = tuple(SCHEMES),
    engines: Sequence[str] = USUAL,
) -> str:
    """The measured part of the page; ``names`` of schemes and engines that are to be in it."""
    facts = document["facts"]
    versions = ", ".join(f"{name} {found}" for name, found in facts["versions"].items())
    lines = [
        f"{facts['model']}, {facts['prompts']} prompts, {facts['new_tokens']} new tokens, "
        f"{facts['machine']}; {versions}.",
        "",
        "| scheme | engine | loads | greedy agreement (floor) | \\|Δ log p\\| a token (floor) |",
        "|---|---|---|---|---|",
    ]
    rows = document["rows"]
    for key in (f"{name} {engine}" for name in SCHEMES for engine in engines):
        if key not in rows:
            continue
        (name, engine), row = key.split(), rows[key]
        if row["loads"]:
            cells = [
                f"yes, with `{row['how']}`" if row.get("how") else "yes",
                f"{row['agreement']:.0%} ({row['usual']:.0%})",
                f"{row['delta']:.5f} ({row['floor']:.5f})",
            ]
        else:
            reason = row["reason"].replace("|", "\\|")
            shown = reason if len(reason) <= REASON else reason[:REASON] + "…"
            made = "" if reason.startswith("not made") else "no: "
            cells = [f"{made}{shown}{_CUT if is_cut(row) else ''}", "", ""]
        lines.append(f"| {name} | {engine} | " + " | ".join(cells) + " |")
    unmeasured = [
        f"{name} ({', '.join(left)})"
        for name in names
        if (left := [e for e in engines if f"{name} {e}" not in rows])
    ]
    if unmeasured:
        lines += ["", f"Not measured yet: {', '.join(unmeasured)}."]
    return "\n".join(lines)


def replace_table(page: str, measured: str, mark: str = "measured") -> str:
    """The page with another table between its marks. SystemExit if it has none."""
    first, last = BEGIN.format(mark), END.format(mark)
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise SystemExit(f"the page has no {first} … {last}")
    return f"{before}{first}\n{measured}\n{last}{after}"


def save(path: Path, document: dict[str, Any]) -> None:
    staging = path.with_name(path.name + ".tmp")
    staging.write_text(json.dumps(document, indent=1) + "\n")
    staging.replace(path)


if __name__ == "__main__":
    main()
