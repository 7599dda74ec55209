"""Does a model that is larger than memory go through, in the memory that was stated?

    python benchmarks/streaming.py --tokenizer MODEL --scratch FOLDER [--recipe rtn …] \
        [--limit 6] [--layers 32 --hidden 4096 …] -o results.json

A checkpoint of Llama-3-8B's shape (8.03 billion weights, 16 GB of bf16) with random weights is
written to the scratch folder, a file a block, and each recipe is run on it with ``--no-gate``:
load, calibrate, export, reload, check. Beside the run, /proc is read twenty times a second.
Anonymous memory (RssAnon) is what a process cannot do without; pages of files (RssFile) leave when
others need the room. A run with more than ``--limit`` GB of anonymous memory is ended, and the
benchmark fails.

The result says for each recipe what the dry run stated, the measured peak of both together (VmHWM)
and of anonymous memory alone, seconds, and whether `quantkit verify` reads the export back. Random
weights say nothing of quality. For a limit that the kernel enforces, start all of it in a group of
its own: ``systemd-run --scope -p MemoryMax=9G python benchmarks/streaming.py …``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

#: What is calibrated, by name. Statistics of a few windows exercise every path that many do.
RECIPES = {
    "rtn": "scheme: w4a16-g128\nalgorithm: rtn\nkeep: [lm_head]\n",
    "static": "scheme: w8a8-static\nalgorithm: rtn\nkeep: [lm_head]\n",
    "imatrix": "scheme: w4a16-g128\nalgorithm: imatrix\nkeep: [lm_head]\n",
    "gptq": "scheme: w4a16-g128\nalgorithm: {gptq: {refine: 0}}\nkeep: [lm_head]\n",
}

#: Recipes that are run with calibration text.
CALIBRATED = ("static", "imatrix", "gptq")

#: Random numbers that all weights are cut from: drawing them anew takes longer than writing them.
POOL = 1 << 26

#: Seconds between two looks at a process.
INTERVAL = 0.05


@dataclass(frozen=True)
class Shape:
    """Of a Llama; the defaults are Llama-3-8B's."""

    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def block(self, index: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a block's tensors by name."""
        keys, name = self.kv_heads * self.head_dim, f"model.layers.{index}"
        return {
            f"{name}.input_layernorm.weight": (self.hidden,),
            f"{name}.self_attn.q_proj.weight": (self.hidden, self.hidden),
            f"{name}.self_attn.k_proj.weight": (keys, self.hidden),
            f"{name}.self_attn.v_proj.weight": (keys, self.hidden),
            f"{name}.self_attn.o_proj.weight": (self.hidden, self.hidden),
            f"{name}.post_attention_layernorm.weight": (self.hidden,),
            f"{name}.mlp.gate_proj.weight": (self.intermediate, self.hidden),
            f"{name}.mlp.up_proj.weight": (self.intermediate, self.hidden),
            f"{name}.mlp.down_proj.weight": (self.hidden, self.intermediate),
        }

    def files(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """Shapes of all tensors, file by file."""
        yield {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for index in range(self.layers):
            yield self.block(index)
        yield {
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (self.vocabulary, self.hidden),
        }

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


@dataclass
class Watched:
    """The most that a process had in memory, bytes, and how it ended."""

    resident: int = 0
    anonymous: int = 0
    seconds: float = 0.0
    returncode: int | None = None
    over: bool = False


@dataclass(frozen=True)
class Row:
    """One recipe. Bytes; ``stated`` is the dry run's peak, ``resident`` the measured one."""

    recipe: str
    model: int
    stated: int
    resident: int
    anonymous: int
    limit: int | None
    seconds: float
    verified: bool
    ok: bool
    message: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="folder of a model whose tokenizer fits")
    parser.add_argument("--scratch", type=Path, required=True, help="where 30 GB are free")
    parser.add_argument("--recipe", action="append", choices=sorted(RECIPES), dest="recipes")
    parser.add_argument("--data", default="evals:support_intent", help="calibration text")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--limit", type=float, help="GB of anonymous memory")
    parser.add_argument("--keep", action="store_true", help="leave model and exports in the folder")
    parser.add_argument("-o", "--output", type=Path)
    default = Shape()
    for name, value in asdict(default).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()

    shape = Shape(**{name: getattr(args, name) for name in asdict(default)})
    model = args.scratch / "model"
    began = time.monotonic()
    size = write_model(model, shape, Path(args.tokenizer))
    print(f"model: {size / 1e9:.2f} GB in {time.monotonic() - began:.0f} s", flush=True)
    rows = []
    for name in args.recipes or ("rtn", "static"):
        rows.append(measure(name, model, size, args))
        print(line(rows[-1]), flush=True)
    document = {"facts": facts(shape, args), "rows": [asdict(row) for row in rows]}
    if args.output is not None:
        args.output.write_text(json.dumps(document, indent=1) + "\n")
    if not args.keep:
        shutil.rmtree(model)
    return 0 if all(row.ok for row in rows) else 1


def write_model(folder: Path, shape: Shape, tokenizer: Path) -> int:
    """A checkpoint of random bf16 weights, a file at a time; returns its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(POOL, generator=generator).mul_(0.02).bfloat16()
    files = list(shape.files())
    index: dict[str, str] = {}
    size = 0
    for number, tensors in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        made = {key: cut(pool, dims, number) for key, dims in tensors.items()}
        save_file(made, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(made, name)
        size += sum(tensor.numel() * tensor.element_size() for tensor in made.values())
    listing = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing, indent=1))
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))
    for path in tokenizer.iterdir():
        if path.name.startswith(("tokenizer", "special_tokens", "vocab", "merges")):
            shutil.copyfile(path, folder / path.name)
    return size


def cut(pool: Tensor, dims: tuple[int, ...], place: int) -> Tensor:
    """A tensor of this shape out of the pool; norms are ones."""
    if len(dims) == 1:
        return torch.ones(dims, dtype=torch.bfloat16)
    count = dims[0] * dims[1]
    start = place * 7919 % (len(pool) // 2)  # so that neighbouring blocks differ
    part = pool[start : start + count]
    return part.repeat(-(-count // len(part)))[:count].reshape(dims)


def measure(name: str, model: Path, size: int, args: argparse.Namespace) -> Row:
    """Run one recipe; its export is read back and removed."""
    recipe = args.scratch / f"{name}.yaml"
    text = f"calibrate: {{samples: {args.samples}, seq_len: {args.seq_len}, seed: 0}}\n"
    recipe.write_text(RECIPES[name] + text)
    out = args.scratch / f"out-{name}"
    command = [
        sys.executable, "-m", "quantkit.cli.main", "calibrate", str(model), "-r", str(recipe),
        *(["--data", args.data] if name in CALIBRATED else []), "--no-gate", "-o", str(out),
        "--json",
    ]  # fmt: skip
    stated = subprocess.run([*command, "--dry-run"], check=True, capture_output=True, text=True)
    limit = None if args.limit is None else int(args.limit * 1e9)
    log = args.scratch / f"{name}.log"
    found = watch(command, log, limit)
    message = ""
    if found.over:
        message = f"ended: anonymous memory above the limit of {args.limit:g} GB"
    elif found.returncode != 0:
        message = f"ended with {found.returncode}: {log.read_text()[-300:].strip()}"
    verified = False
    if not message:
        check = [sys.executable, "-m", "quantkit.cli.main", "verify", str(out)]
        verified = subprocess.run(check, capture_output=True).returncode == 0
        message = "" if verified else "the export does not verify"
    if not args.keep:
        for folder in args.scratch.glob(f"out-{name}*"):
            shutil.rmtree(folder, ignore_errors=True)
    return Row(
        recipe=name,
        model=size,
        stated=json.loads(stated.stdout)["peak"]["bytes"],
        resident=found.resident,
        anonymous=found.anonymous,
        limit=limit,
        seconds=round(found.seconds, 1),
        verified=verified,
        ok=not message,
        message=message,
    )


def watch(command: list[str], log: Path, limit: int | None) -> Watched:
    """Run a command, its output in a file, and look at its memory until it ends.

    Args:
        limit: bytes of anonymous memory above which it is ended; None for no limit.
    """
    found = Watched()
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            now = memory_of(process.pid)
            found.resident = max(found.resident, now.get("VmHWM", 0))
            found.anonymous = max(found.anonymous, now.get("RssAnon", 0))
            if limit is not None and found.anonymous > limit:
                found.over = True
                process.kill()
                process.wait()
            time.sleep(INTERVAL)
    found.seconds = time.monotonic() - began
    found.returncode = process.returncode
    return found


def memory_of(pid: int) -> dict[str, int]:
    """The sizes in a process's ``/proc/PID/status``, in bytes; none once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    sizes = (text.split() for text in lines if text.endswith(" kB"))
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in sizes}


def facts(shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """What the rows were measured with."""
    from quantkit.evals.evaluate import cpu_model

    return {
        "shape": asdict(shape),
        "samples": args.samples,
        "seq_len": args.seq_len,
        "machine": f"{cpu_model()}, {os.cpu_count()} cores, {platform.system()}",
        "torch": torch.__version__,
    }


def line(row: Row) -> str:
    verdict = "ok" if row.ok else row.message
    return (
        f"{row.recipe:8} model {row.model / 1e9:6.2f} GB  stated {row.stated / 1e9:5.2f}  "
        f"peak {row.resident / 1e9:5.2f}  anonymous {row.anonymous / 1e9:5.2f}  "
        f"{row.seconds:6.0f} s  {verdict}"
    )


if __name__ == "__main__":
    sys.exit(main())
