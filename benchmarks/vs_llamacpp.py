"""quantkit beside llama.cpp on one CPU: speed, size and distance from one original.

    python -m benchmarks.vs_llamacpp MODEL --llama BUILD \\
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
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.command import run
from benchmarks.llamacpp_build import SOURCE, build_facts, compile_tool
from benchmarks.logit_distance import (
    Distance,
    compare,
    cut_windows,
    llamacpp_logits,
    original_logits,
    quantkit_logits,
)
from benchmarks.machine import hardware, read_bandwidth
from benchmarks.systems import System, count_parameters, list_systems, named
from benchmarks.workloads import WORKLOADS, Workload, run_llamacpp, run_quantkit

#: A GGUF file in the original's precision must be this near to it, in nats.
SAME = 1e-3

#: Of what llama-bench says about itself.
PEER_FACTS = ("build_commit", "build_number", "flash_attn", "type_k", "n_ubatch", "poll", "repack")


@dataclass
class Row:
    """What was measured of a system; ``speeds`` holds tokens a second by workload and round."""

    system: System
    distance: Distance | None = None
    speeds: dict[str, list[float]] = field(default_factory=dict)

    def speed(self, workload: str) -> float:
        return statistics.median(self.speeds.get(workload) or [math.nan])


# --- distance


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
    del facts[SOURCE]
    with tempfile.TemporaryDirectory() as folder:
        tool = compile_tool("llamacpp_logits", args.llama, Path(folder))
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
