"""Does quantkit read what llm-compressor and AutoRound really write, and compute the same?

    python -m benchmarks.import_peers MODEL --peer-python peer/bin/python [--only NAME …] [-o FILE]
        [--write docs/formats.md]

A Llama of two narrow blocks with random weights, and MODEL's tokenizer, is quantized by the peers
in an environment of their own (see `vs_peers_quality.py` for making one), saved by their own code,
and loaded by transformers there and by quantkit here, both computing in fp32. Every error is
‖ours − theirs‖ / ‖theirs‖, of

- weights: the worst layer's, beside what the peer had in memory;
- layers: the worst layer's output in the native layers, on the input that it has in transformers.
  Nothing adds up here: it is the arithmetic of one layer alone;
- reference, native: the logits of one text, beside transformers';
- memory: the same of the reference kernels, beside the peer's own model in bf16.

Where activations are rounded, whichever of them lies at the edge of two codes goes over with the
last bit of anything before it, and each one that does moves others in the layers behind. `flips`
and `flips16` say how far that alone takes the logits: our own model against itself, the input of
every quantized layer off by half a last bit of fp32 (`flips`) or bf16 (`flips16`), at random. An
error of logits no larger than that says nothing about arithmetic; that of layers does.

transformers does not load everything that its neighbours write, and what it loads it may not run
in fp32. Then weights and `memory` are what counts. What a file lacks transformers leaves as the
memory happened to be, and goes on; where that is the scales of a head that nobody quantized, the
logits are made from its last states and the embeddings. A scheme that quantkit does not run must be
refused, in words that name it. Rows of FILE that are not asked for stay, if they have the same
versions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.import_cases import CASES, Case
from quantkit.errors import QuantkitError
from quantkit.numerics import is_finite

#: Between these marks of the page is what this script writes.
BEGIN, END = "<!-- imports: begin -->", "<!-- imports: end -->"

#: Largest error. The reference kernels round scale times code to the scale's dtype, bf16, and some
#: native ones multiply in it, which costs 0.2–0.4 %; a wrong scale or code costs 5 % and up.
TOLERANCE = 0.01

#: Of a layer with rounded activations, whose codes and scales both compute in fp32: one wrong last
#: bit of bf16 in a scale would be 40 times as much.
LAYER_TOLERANCE = 1e-4

#: Of logits against what a peer had in memory, all of it in bf16.
MEMORY_TOLERANCE = 0.03

#: An error of logits may be this many times what flips alone make.
MARGIN = 1.5

#: Packages of the peers whose versions belong to the rows.
PEERS = ("llmcompressor", "auto-round", "compressed-tensors", "transformers", "torch")

#: Keeps logits, the input and output of each linear layer of a block, and what was made up.
_LOAD = """
import sys
import torch
from transformers import AutoModelForCausalLM

folder, ids_path, kept_path = sys.argv[1:4]
model, info = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True
)
missing = sorted(info["missing_keys"])
tied = model.config.tie_word_embeddings
if any(not (tied and name.startswith("lm_head.")) for name in missing):
    sys.exit("made up: " + ", ".join(missing))
model.eval()
layers = {}
for name, module in model.named_modules():
    if name.endswith("_proj"):
        def keep(module, given, made, name=name):
            layers[name] = (given[0], made)
        module.register_forward_hook(keep)
with torch.no_grad():
    made = model(torch.load(ids_path)[:1], output_hidden_states=True)
logits = made.logits[0]
if missing:
    logits = made.hidden_states[-1][0] @ model.get_input_embeddings().weight.T
torch.save({"logits": logits.detach().float(), "layers": layers, "missing": missing}, kept_path)
"""

_VERSIONS = """
import json, sys
from importlib.metadata import version
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""


@dataclass(frozen=True)
class Row:
    """One case.

    Attributes:
        ok: read with errors within tolerance, or refused where that is right.
        weights, layers, reference, native, memory: errors, as said above; None where there is
            nothing to compare with.
        flips, flips16: what last bits make of the logits of a model with rounded activations.
        said: by whoever failed or refused, its last line.
    """

    ok: bool
    weights: float | None = None
    layers: float | None = None
    reference: float | None = None
    native: float | None = None
    flips: float | None = None
    memory: float | None = None
    flips16: float | None = None
    said: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a Llama; its tokenizer and vocabulary are used")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--only", action="append", choices=list(CASES))
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    args = parser.parse_args()
    facts = {"peers": peer_versions(args.peer_python), "quantkit": own_versions()}
    rows = known_rows(args.output, facts)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ids = make_model(args.model, folder / "model")
        torch.save(ids, folder / "ids.pt")
        for name in args.only or CASES:
            rows[name] = measure(CASES[name], folder, args.peer_python, ids)
            print(line(name, rows[name]), flush=True)
            if args.output is not None:
                save(args.output, facts, rows)
    if args.write is not None:
        args.write.write_text(replace_table(args.write.read_text(), table(facts, rows)))
    return 0 if all(row.ok for row in rows.values()) else 1


def own_versions() -> dict[str, str]:
    return {name: version(name) for name in ("compressed-tensors", "transformers", "torch")}


def peer_versions(python: str) -> dict[str, str]:
    done = subprocess.run(
        [python, "-c", _VERSIONS, *PEERS], capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def known_rows(path: Path | None, facts: dict[str, Any]) -> dict[str, Row]:
    """Rows of earlier calls. SystemExit where they were measured with other versions."""
    if path is None or not path.exists():
        return {}
    document = json.loads(path.read_text())
    if document["facts"] != facts:
        raise SystemExit(f"{path}: of {document['facts']}, now {facts}; give another --output")
    return {name: Row(**row) for name, row in document["rows"].items()}


def save(path: Path, facts: dict[str, Any], rows: dict[str, Row]) -> None:
    document = {"facts": facts, "rows": {n: asdict(rows[n]) for n in CASES if n in rows}}
    staging = path.with_name(path.name + ".tmp")
    staging.write_text(json.dumps(document, indent=1) + "\n")
    staging.replace(path)


def make_model(source: str, folder: Path) -> Tensor:
    """A narrow random model with a folder's tokenizer; returns token ids int64 ``[8, 64]``."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(source)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Initial weights are so small that every logit is noise; these give real contrast.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2.0)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return torch.randint(0, len(tokenizer), (8, 64), generator=torch.Generator().manual_seed(1))


def measure(case: Case, folder: Path, python: str, ids: Tensor) -> Row:
    """Have a peer quantize, and hold quantkit against what it, and transformers there, compute."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out, kept, loaded = (Path(scratch) / name for name in ("out", "kept.pt", "loaded.pt"))
        made = ask(python, case.script, folder / "model", folder / "ids.pt", out, kept)
        if made:
            return Row(ok=False, said=f"not made: {made}")
        out = written(out)
        unread = ask(python, _LOAD, out, folder / "ids.pt", loaded)
        theirs = None if unread else torch.load(loaded)
        if theirs is not None and not is_finite(theirs["logits"].norm()):
            unread = "logits without end"
        try:
            found = compare(out, ids, torch.load(kept), theirs)
        except QuantkitError as e:
            right = case.refused is not None and case.refused in e.message
            return Row(ok=right, said=f"refused: {e.message}")
        if case.activations:
            found |= {"flips": flips(out, ids, 2**-24), "flips16": flips(out, ids, 2**-9)}
    said = f"transformers: {unread}" if unread else ""
    if theirs is not None and theirs["missing"]:
        said = f"transformers: made up {', '.join(theirs['missing'])}"
    return Row(ok=case.refused is None and is_right(found), **found, said=said)


def compare(
    out: Path, ids: Tensor, kept: dict[str, Any], loaded: dict[str, Any] | None
) -> dict[str, float]:
    """Errors of a checkpoint by their names.

    Args:
        out: its folder.
        ids: the texts.
        kept: logits and weights of the peer in memory.
        loaded: logits and layers of transformers, where it runs the checkpoint.
    """
    ours = logits(out, "reference", ids)
    found = {
        "weights": worst(kept["weights"], weights(out), error),
        "memory": error(ours, kept["logits"]),
    }
    if loaded is not None:
        if is_finite(loaded["logits"].norm()):
            found["reference"] = error(ours, loaded["logits"])
            found["native"] = error(logits(out, "native", ids), loaded["logits"])
        found["layers"] = worst(loaded["layers"], linears(out), layer_error)
    return found


def is_right(found: dict[str, float]) -> bool:
    """Whether all errors of a case are within their tolerance."""
    rounded = "flips" in found
    limits = {
        "weights": TOLERANCE,
        "layers": LAYER_TOLERANCE if rounded else TOLERANCE,
        "reference": max(TOLERANCE, MARGIN * found.get("flips16", 0.0)),
        "native": max(TOLERANCE, MARGIN * found.get("flips16", 0.0)),
        "memory": max(MEMORY_TOLERANCE, MARGIN * found.get("flips16", 0.0)),
    }
    return all(found[name] <= limit for name, limit in limits.items() if name in found)


def worst(theirs: dict[str, Any], ours: dict[str, Any], measured: Callable[..., float]) -> float:
    """The largest error of the layers that are quantized here. Each must be one of theirs."""
    return max(measured(ours[name], theirs[name]) for name in ours)


def weights(folder: Path) -> dict[str, Tensor]:
    """What each quantized layer stands for ``[N, K]``, columns as the model has them."""
    from quantkit.checkpoint.opened import open_checkpoint
    from quantkit.numerics import dequantize

    found = {}
    with open_checkpoint(folder) as opened:
        for name in opened.schemes:
            layer = opened.layer(name)
            weight = dequantize(layer.weight, torch.float32)
            found[name] = torch.empty_like(weight)
            order = slice(None) if layer.order is None else layer.order
            found[name][:, order] = weight
    return found


def linears(folder: Path) -> dict[str, Any]:
    """The quantized layers, in native kernels and fp32."""
    from quantkit.layers import QuantLinear
    from quantkit.models.load import load_runtime

    model = load_runtime(folder, kernels="modules", dtype=torch.float32).model
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def layer_error(layer: Any, theirs: Sequence[Tensor]) -> float:
    """Of a layer's output, on the input of theirs."""
    given, made = theirs
    with torch.no_grad():
        return error(layer(given), made)


def flips(folder: Path, ids: Tensor, step: float) -> float:
    """Our model against itself, inputs of quantized layers off by up to ``step`` of their size."""
    from quantkit.layers import QuantLinear
    from quantkit.models.load import load_runtime

    runtime = load_runtime(folder, kernels="modules", dtype=torch.float32)
    still = runtime.logits(ids[0].tolist()).float()
    generator = torch.Generator().manual_seed(0)

    def move(_: Any, given: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = given
        return (x * (1 + step * (2 * torch.rand(x.shape, generator=generator) - 1)),)

    for module in runtime.model.modules():
        if isinstance(module, QuantLinear):
            module.register_forward_pre_hook(move)
    return error(runtime.logits(ids[0].tolist()).float(), still)


def written(out: Path) -> Path:
    """The checkpoint's folder; AutoRound puts some formats into one below."""
    if (out / "config.json").exists():
        return out
    [found] = [path.parent for path in out.glob("*/config.json")]
    return found


def ask(python: str, script: str, *arguments: Any) -> str:
    """Run a script in the peer's environment; returns the last line of what stopped it, or ""."""
    command = [python, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [text for text in done.stderr.splitlines() if text.strip()]
    return "" if done.returncode == 0 else (lines or ["no message"])[-1].strip()


def logits(folder: Path, kernels: str, ids: Tensor) -> Tensor:
    """Ours of the first text, fp32 ``[tokens, vocabulary]``."""
    from quantkit.models.load import load_runtime

    runtime = load_runtime(folder, kernels=kernels, dtype=torch.float32)
    return runtime.logits(ids[0].tolist()).float()


def error(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖."""
    theirs = theirs.float()
    return float((ours - theirs).norm() / theirs.norm())


#: Numbers of a row, in the order in which they are shown.
SHOWN = ("weights", "layers", "reference", "native", "flips", "memory", "flips16")


def line(name: str, row: Row) -> str:
    """A row for the terminal."""
    verdict = "ok  " if row.ok else "FAIL"
    numbers = {key: getattr(row, key) for key in SHOWN}
    told = [f"{key} {value:.1e}" for key, value in numbers.items() if value is not None]
    return "  ".join([f"{verdict} {name:37}", *told, row.said]).rstrip()


def table(facts: dict[str, Any], rows: dict[str, Row]) -> str:
    """The measured part of the page."""
    peers = ", ".join(f"{name} {found}" for name, found in facts["peers"].items())
    lines = [
        f"Peers: {peers}.",
        "",
        "| written by | weights | layers | reference | native | flips | memory | flips16 | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in CASES:
        if name in rows:
            row = rows[name]
            values = [getattr(row, key) for key in SHOWN]
            cells = ["" if value is None else f"{value:.0e}" for value in values]
            said = row.said.replace("|", "\\|")
            verdict = said if row.ok else f"**fails** {said}"
            lines.append(f"| {name} | " + " | ".join([*cells, verdict.strip()]) + " |")
    left = [name for name in CASES if name not in rows]
    return "\n".join(lines + (["", f"Not measured: {'; '.join(left)}."] if left else []))


def replace_table(page: str, measured: str) -> str:
    """The page with another table between its marks. SystemExit if it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the page has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n{measured}\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
