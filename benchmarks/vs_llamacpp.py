"""quantkit beside llama.cpp on one CPU: speed, size and distance from one original.

    python benchmarks/vs_llamacpp.py MODEL --llama BUILD \\
        --gguf bf16=m-bf16.gguf --gguf Q4_0=m-Q4_0.gguf --gguf Q8_0=m-Q8_0.gguf \\
        --ckpt w4a16-head8=ckpt-w4 --ckpt w8a16-g32=ckpt-w8 \\
        --pair bf16=bf16 --pair w4a16-head8=Q4_0 --pair w8a16-g32=Q8_0 \\
        --text held_out.txt --threads 2 --rounds 7 -o results.json

MODEL is the original, a folder in 16 bits; it is quantkit's row ``bf16`` too. BUILD is the build
folder of a llama.cpp source tree, from which the GGUF files were made as well:

    cmake -S llama.cpp -B BUILD -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON
    cmake --build BUILD --target llama-bench llama-batched-bench llama-quantize
    python llama.cpp/convert_hf_to_gguf.py MODEL --outtype bf16 --outfile m-bf16.gguf
    BUILD/bin/llama-quantize m-bf16.gguf m-Q4_0.gguf Q4_0

GPTQ has seen calibration text, and a plain Q4_0 has not: give a row that has, made by llama-imatrix
on the same text and ``llama-quantize --imatrix``, beside it.

**Speed.** Every measurement is a process of its own, one at a time. In a round each system runs
each workload once, workload by workload and a checkpoint right after its peer, so that what is
compared runs within seconds; every other round runs backwards. Each figure is the median over
rounds of the median of a process's repeats, a ratio the median of the ratios within the rounds.
Workloads:

    tg128   128 tokens of one sequence from an empty context     llama-bench -n 128
    pp512   a prompt of 512 tokens                               llama-bench -p 512
    x16     32 tokens each of 16 sequences after prompts of 32, all of them counted
                                                                 llama-batched-bench -npl 16

quantkit runs ``bench decode`` with the same counts (its ``tg128`` has a prompt of one token) and
samples each token greedily; llama.cpp's tools sample nothing. What each tool says that it did is
checked against what it was asked.

**Distance.** KL(original || system) in nats and top-1 agreement at every position of the same
windows of token ids. The original runs in transformers in fp32 arithmetic on its bf16 weights;
llama.cpp's logits come from its own library with its defaults (``llamacpp_logits.cpp``, compiled
here), quantkit's from its own runtime. The bf16 rows tell what 16-bit arithmetic alone costs; a
GGUF row named bf16 that is not near 0 means other tokens or a wrong conversion, and stops the run.

**Size.** ``bits`` are those of all tensors over the original's parameters, a tied embedding counted
once. ``MB/token`` are the weights that decoding a token reads: all, less an input embedding that is
not the output layer too. ``roof`` is MB/token times tg128 over the read bandwidth measured here.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: A GGUF file in the original's precision must be this near to it, in nats.
SAME = 1e-3
#: Read by the bandwidth probe: many times a last-level cache.
PROBE_BYTES = 512 * 2**20
#: Of the peer's build, kept with the results.
BUILD_OPTIONS = (
    "CMAKE_BUILD_TYPE", "CMAKE_CXX_FLAGS", "CMAKE_CXX_FLAGS_RELEASE", "GGML_NATIVE", "GGML_OPENMP",
    "GGML_CPU_REPACK", "GGML_LLAMAFILE", "GGML_BLAS",
)  # fmt: skip

#: Of what llama-bench says about itself.
PEER_FACTS = ("build_commit", "build_number", "flash_attn", "type_k", "n_ubatch", "poll", "repack")
#: Where that build says its sources are.
SOURCE = "llama.cpp_SOURCE_DIR"


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


@dataclass(frozen=True)
class Size:
    """Bytes of weights: in the file, and read to decode a token."""

    stored: int
    read: int


@dataclass(frozen=True)
class Distance:
    """From the original, over all positions: nats a token, and the share of equal argmaxes.

    ``kl_error`` is the standard error of ``kl`` over windows.
    """

    kl: float
    kl_error: float | None
    kl_p99: float
    top1: float


@dataclass(frozen=True)
class System:
    """A row: a name, the engine that runs it, its file or folder."""

    engine: str
    name: str
    path: Path
    size: Size


@dataclass
class Row:
    """What was measured of a system; ``speeds`` holds tokens a second by workload and round."""

    system: System
    distance: Distance | None = None
    speeds: dict[str, list[float]] = field(default_factory=dict)

    def speed(self, workload: str) -> float:
        return statistics.median(self.speeds.get(workload) or [math.nan])


# --- the systems and their sizes


def named(text: str) -> tuple[str, str]:
    """``NAME=VALUE``."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def list_systems(args: argparse.Namespace) -> list[System]:
    """Peers first; quantkit's rows begin with the original."""
    peers = [System("llama.cpp", n, Path(p), gguf_size(Path(p))) for n, p in args.gguf]
    checkpoints = [("bf16", args.model), *args.ckpt]
    ours = [System("quantkit", n, Path(p), folder_size(Path(p))) for n, p in checkpoints]
    for kind in (peers, ours):
        names = [s.name for s in kind]
        if len(set(names)) < len(names):
            raise SystemExit(f"two systems of {kind[0].engine} have one name: {names}")
    for name, peer in args.pair:
        if name not in {s.name for s in ours} or peer not in {s.name for s in peers}:
            raise SystemExit(f"--pair {name}={peer}: name a checkpoint and a GGUF file given here")
    return peers + ours


def folder_size(folder: Path) -> Size:
    """Of the safetensors files of a folder."""
    sizes: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        header.pop("__metadata__", None)
        sizes |= {k: v["data_offsets"][1] - v["data_offsets"][0] for k, v in header.items()}
    if not sizes:
        raise SystemExit(f"{folder}: no safetensors file")
    return count(sizes, embedding="embed_tokens.weight", head="lm_head.")


def gguf_size(path: Path) -> Size:
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    return count(sizes, embedding="token_embd.weight", head="output.")


def count(sizes: dict[str, int], *, embedding: str, head: str) -> Size:
    """The input embedding is read only where the head has no tensors of its own."""
    stored = sum(sizes.values())
    untied = any(name.startswith(head) for name in sizes)
    skipped = sum(n for name, n in sizes.items() if untied and name.endswith(embedding))
    return Size(stored, stored - skipped)


def count_parameters(model: Path) -> int:
    """Of the original, a tied embedding counted once."""
    total = 0
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        total += sum(math.prod(v["shape"]) for k, v in header.items() if k != "__metadata__")
    return total


# --- distance


def cut_windows(model: Path, text: Path, windows: int, length: int) -> Tensor:
    """Token ids ``[windows, length]`` of the start of a text, by the original's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), verbose=False)
    if len(ids) < windows * length:
        raise SystemExit(f"{text}: {len(ids)} tokens are fewer than {windows} x {length}")
    return torch.tensor(ids[: windows * length]).view(windows, length)


@torch.inference_mode()
def original_logits(model: Path, ids: Tensor) -> Iterator[Tensor]:
    """fp32 logits ``[length, vocabulary]`` of each window, in fp32 arithmetic."""
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for window in ids:
        yield original(window[None], use_cache=False).logits[0]


@torch.inference_mode()
def quantkit_logits(checkpoint: Path, ids: Tensor) -> Iterator[Tensor]:
    """fp32 logits ``[length, vocabulary]`` of each window, in the kernels that serve."""
    from quantkit.models.load import load_runtime

    runtime = load_runtime(checkpoint)
    for window in ids:
        yield runtime.logits(window.tolist())


def llamacpp_logits(tool: Path, gguf: Path, ids: Tensor, threads: int) -> Iterator[Tensor]:
    """fp32 logits ``[length, vocabulary]`` of each window, from llama.cpp's library."""
    length = ids.shape[1]
    with tempfile.NamedTemporaryFile(suffix=".ids") as file, tempfile.TemporaryFile() as errors:
        file.write(ids.numpy().astype("<i4").tobytes())
        file.flush()
        command = [str(tool), str(gguf), file.name, str(length), str(threads)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
            assert process.stdout is not None
            try:
                vocabulary = int.from_bytes(process.stdout.read(4), "little")
                for _ in ids:
                    data = process.stdout.read(4 * length * vocabulary)
                    if not data or len(data) != 4 * length * vocabulary:
                        errors.seek(0)
                        raise SystemExit(f"{gguf}: {errors.read().decode(errors='replace')}")
                    yield torch.frombuffer(bytearray(data), dtype=torch.float32).view(length, -1)
            finally:
                process.kill()


def compare(reference: Iterable[Tensor], logits: Iterable[Tensor]) -> Distance:
    """Distance of some logits from others, both ``[length, vocabulary]`` window by window."""
    by_window, agree, positions = [], 0, 0
    for p, q in zip(reference, logits, strict=True):
        if p.shape != q.shape:
            raise SystemExit(f"logits {list(q.shape)} beside the original's {list(p.shape)}")
        if not torch.isfinite(q).all():
            raise SystemExit("the logits hold NaN or infinity")
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        by_window.append((log_p.exp() * (log_p - log_q)).sum(-1).double())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        positions += len(p)
    kl = torch.stack(by_window)
    means = kl.mean(1)
    error = float(means.std() / len(means) ** 0.5) if len(means) > 1 else None
    return Distance(float(kl.mean()), error, float(kl.flatten().quantile(0.99)), agree / positions)


def measure_distances(args: argparse.Namespace, rows: Sequence[Row], tool: Path) -> None:
    """Fill in every row's distance; the original's logits wait in a file of a few GB."""
    ids = cut_windows(args.model, args.text, args.windows, args.length)
    with tempfile.NamedTemporaryFile(suffix=".logits") as file:
        for logits in original_logits(args.model, ids):
            file.write(logits.numpy().tobytes())
            shape = (*ids.shape, logits.shape[-1])
        file.flush()
        reference = np.memmap(file.name, dtype=np.float32, mode="r", shape=shape)
        for row in rows:
            system = row.system
            if system.engine == "quantkit":
                logits_of = quantkit_logits(system.path, ids)
            else:
                logits_of = llamacpp_logits(tool, system.path, ids, args.threads)
            windows = (torch.from_numpy(np.array(window)) for window in reference)
            row.distance = compare(windows, logits_of)
            print(f"{system.engine} {system.name}: {row.distance}", file=sys.stderr, flush=True)
            if (system.engine, system.name) == ("llama.cpp", "bf16") and row.distance.kl > SAME:
                raise SystemExit(
                    f"{system.path}: KL {row.distance.kl:.2g} to the model that it was made of: "
                    "other tokens, or a wrong conversion"
                )


# --- speed


def read_bandwidth(threads: int, rounds: int = 8) -> float:
    """Bytes a second of adding up a buffer that no cache holds."""
    torch.set_num_threads(threads)
    data = torch.ones(PROBE_BYTES // 4)
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - begin)
    return data.nbytes / min(times)


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nexit code {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


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


def in_turn(
    rows: Sequence[Row], pairs: Sequence[tuple[str, str]], round_index: int
) -> list[tuple[Workload, Row]]:
    """A round's measurements: checkpoints after their first peer, every other round backwards."""
    first = dict(reversed(pairs))
    names = [row.system.name for row in rows if row.system.engine == "llama.cpp"]

    def place(row: Row) -> int:
        ours = row.system.engine == "quantkit"
        name = first.get(row.system.name) if ours else row.system.name
        return names.index(name) if name else len(names)

    order = [(work, row) for work in WORKLOADS for row in sorted(rows, key=place)]
    return order[::-1] if round_index % 2 else order


# --- the table


def ratio(ours: Row, theirs: Row, workload: str) -> float:
    """Median over rounds of one system's speed over another's in the same round."""
    pairs = zip(ours.speeds.get(workload, ()), theirs.speeds.get(workload, ()), strict=True)
    return statistics.median([a / b for a, b in pairs] or [math.nan])


def table(
    rows: Sequence[Row], pairs: Sequence[tuple[str, str]], parameters: int, bandwidth: float
) -> list[str]:
    """One line a system; below quantkit's, its ratio to each peer that was named for it."""
    columns = ("bits", "MB/token", "KL", "KL p99", "top-1", "tg128", "roof", "pp512", "x16")
    width = max(len(f"{row.system.engine} {row.system.name}") for row in rows) + 2
    lines = [f"{'system':{width}}" + "".join(f"{c:>10}" for c in columns)]
    peers = {row.system.name: row for row in rows if row.system.engine == "llama.cpp"}
    for row in rows:
        size, far = row.system.size, row.distance
        cells = [f"{8 * size.stored / parameters:.2f}", f"{size.read / 1e6:.1f}"]
        cells += [f"{far.kl:.4f}", f"{far.kl_p99:.3f}", f"{far.top1:.1%}"] if far else ["-"] * 3
        roof = size.read * row.speed("tg128") / bandwidth
        cells += [number(row.speed("tg128")), "-" if math.isnan(roof) else f"{roof:.0%}"]
        cells += [number(row.speed("pp512")), number(row.speed("x16"))]
        name = f"{row.system.engine} {row.system.name}"
        lines.append(f"{name:{width}}" + "".join(f"{c:>10}" for c in cells))
        for ours, name in pairs:
            if row.system.engine != "quantkit" or ours != row.system.name:
                continue
            peer = peers[name]
            kl = far.kl / peer.distance.kl if far and peer.distance else math.nan
            cells = [times(size.stored / peer.system.size.stored)]
            cells += [times(size.read / peer.system.size.read), times(kl), "", ""]
            cells += [times(ratio(row, peer, "tg128")), "", times(ratio(row, peer, "pp512"))]
            cells += [times(ratio(row, peer, "x16"))]
            lines.append(f"{f'  over {name}':{width}}" + "".join(f"{c:>10}" for c in cells))
    return lines


def number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def times(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}x"


# --- facts about the machine and the peer


def hardware(threads: int) -> dict[str, Any]:
    """From Linux's /proc and /sys; what is missing is left out."""
    facts: dict[str, Any] = {"machine": platform.machine(), "threads": threads}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [s.partition(":") for s in cpuinfo.read_text().splitlines()]
        core = {k.strip(): v.strip() for k, _, v in reversed(lines)}
        facts["cores"] = sum(k.strip() == "processor" for k, _, _ in lines)
        facts["cpu"] = core.get("model name", "")
        facts["family"], facts["model"] = core.get("cpu family"), core.get("model")
        wanted = ("avx", "amx", "fma", "f16c")
        facts["flags"] = [f for f in core.get("flags", "").split() if f.startswith(wanted)]
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if cache.exists():
        facts["l3"] = cache.read_text().strip()
    return facts


def build_facts(build: Path) -> dict[str, str]:
    """Options of a CMake build that decide about its speed, and where its sources are."""
    found = {}
    for line in (build / "CMakeCache.txt").read_text().splitlines():
        key, _, value = line.partition("=")
        found[key.partition(":")[0]] = value
    return {k: found.get(k, "") for k in (*BUILD_OPTIONS, SOURCE)}


def compile_logits(build: Path, source: Path, folder: Path) -> Path:
    """llamacpp_logits, linked to the library that is timed."""
    tool, libraries = folder / "llamacpp_logits", (build / "bin").resolve()
    command = [
        "g++", "-O2", "-std=c++17", f"-I{source / 'include'}", f"-I{source / 'ggml/include'}",
        str(Path(__file__).with_name("llamacpp_logits.cpp")), "-o", str(tool), f"-L{libraries}",
        "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{libraries}",
    ]  # fmt: skip
    run(command)
    return tool


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the original, in 16 bits")
    parser.add_argument("--llama", type=Path, required=True, help="build folder of llama.cpp")
    many: dict[str, Any] = {"type": named, "action": "append", "default": []}
    parser.add_argument("--gguf", metavar="NAME=PATH", **many)
    parser.add_argument("--ckpt", metavar="NAME=PATH", help="a quantkit checkpoint", **many)
    parser.add_argument("--pair", metavar="CKPT=GGUF", help="print this ratio", **many)
    parser.add_argument("--text", type=Path, help="held-out text; without it, no distances")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="0 times nothing")
    parser.add_argument("-r", "--repeats", type=int, default=3, help="within a process")
    parser.add_argument("-o", "--output", type=Path)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    rows = [Row(system) for system in list_systems(args)]
    parameters = count_parameters(args.model)
    torch.set_num_threads(args.threads)
    facts = build_facts(args.llama)
    with tempfile.TemporaryDirectory() as folder:
        tool = compile_logits(args.llama, Path(facts.pop(SOURCE)), Path(folder))
        peer: dict[str, Any] = {"build": facts, "system": run([str(tool)]).strip()}
        if args.text:
            measure_distances(args, rows, tool)

    bandwidth = read_bandwidth(args.threads)
    for index in range(args.rounds):
        for work, row in in_turn(rows, args.pair, index):
            if row.system.engine == "quantkit":
                speed = run_quantkit(row.system, work, args.threads, args.repeats)
            else:
                tools = args.llama / "bin"
                speed, about = run_llamacpp(tools, row.system, work, args.threads, args.repeats)
                peer |= {k: about[k] for k in PEER_FACTS if k in about}
            row.speeds.setdefault(work.name, []).append(speed)
            print(
                f"round {index + 1} {row.system.engine} {row.system.name} {work.name}: {speed:.1f}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        bandwidth = max(bandwidth, read_bandwidth(args.threads))
        save(args, rows, parameters, bandwidth, peer)
    save(args, rows, parameters, bandwidth, peer)

    machine = hardware(args.threads)
    print(
        f"{machine.get('cpu', '')} family {machine.get('family')} model {machine.get('model')}, "
        f"{machine.get('cores')} cores, {args.threads} threads, L3 {machine.get('l3')}; "
        f"reads {bandwidth / 1e9:.1f} GB/s; {' '.join(machine.get('flags', ()))}"
    )
    print(f"llama.cpp {peer.get('build_commit', '')}: {facts}\n{peer['system']}")
    if args.text:
        print(f"distance over {args.windows} x {args.length} tokens of {args.text.name}")
    print(f"{args.rounds} rounds, {args.repeats} repeats in each process; tokens a second\n")
    print("\n".join(table(rows, args.pair, parameters, bandwidth)))


def save(
    args: argparse.Namespace, rows: Sequence[Row], parameters: int, bandwidth: float, peer: Any
) -> None:
    """Everything so far, after each round."""
    if not args.output:
        return
    by_name = {(row.system.engine, row.system.name): row for row in rows}
    pairs = [(by_name["quantkit", a], by_name["llama.cpp", b]) for a, b in args.pair]
    document = {
        "hardware": {**hardware(args.threads), "read_bytes_s": bandwidth},
        "llama.cpp": peer,
        "settings": {
            "rounds": args.rounds, "repeats": args.repeats, "parameters": parameters,
            "windows": args.windows, "length": args.length,
            "text": Path(args.text).name if args.text else "",
            "workloads": [asdict(work) for work in WORKLOADS],
        },
        "rows": [
            {
                "engine": row.system.engine,
                "name": row.system.name,
                "bits_per_weight": 8 * row.system.size.stored / parameters,
                "size": asdict(row.system.size),
                "distance": asdict(row.distance) if row.distance else None,
                "tokens_s": {name: row.speed(name) for name in row.speeds},
                "tokens_s_by_round": row.speeds,
            }
            for row in rows
        ],
        "ratios": [
            {
                "quantkit": ours.system.name,
                "llama.cpp": theirs.system.name,
                **{name: ratio(ours, theirs, name) for name in ours.speeds},
            }
            for ours, theirs in pairs
        ],
    }  # fmt: skip
    args.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
