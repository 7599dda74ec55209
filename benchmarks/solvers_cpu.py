"""The calibration kernels of the CPU against their plain-torch forms.

::

    python benchmarks/solvers_cpu.py [--threads 2] [--rounds 3] [--skip-torch]

Both forms run in turn, so that what else the machine does weighs on both. A time is the least of
its rounds. The roof is what the cores multiply on registers alone (peak_flops.cpp, built here with
g++ -march=native); products on one side of a triangle are counted, not the square.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quantkit import ops
from quantkit.ops import reference_solvers as reference

#: The layers of a block of SmolLM2-135M, stacked by input: [N, K].
LAYERS = {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)}
GROUP = 64
INT4 = (ops.CODE_INT, -8.0, 7.0)
CANDIDATES = 21


class Roof:
    """GFLOP/s of register-only multiply-adds on some threads."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        library = Path(self._folder.name) / "peak.so"
        source = Path(__file__).with_name("peak_flops.cpp")
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))

    def measure(self, dtype: torch.dtype, threads: int) -> float:
        name = "peak_bf16" if dtype == torch.bfloat16 and has_bf16() else "peak_f32"
        function = getattr(self._library, name)
        function.restype = ctypes.c_int64

        def run(_: int) -> tuple[int, float]:
            begin = time.perf_counter()
            done = function(ctypes.c_int64(1_000_000), (ctypes.c_float * 16)())
            return done, time.perf_counter() - begin

        best = 0.0
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(12):
                best = max(best, sum(2e-9 * n / t for n, t in pool.map(run, range(threads))))
        return best


def has_bf16() -> bool:
    return ops.get_isa() == "avx512bf16"


def least(functions: list[Callable[[], object]], rounds: int, repeat: int = 5) -> list[float]:
    """Seconds of each: the functions take turns, the first (native) `repeat` times a turn."""
    times = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            for _ in range(repeat if i == 0 else 1):
                begin = time.perf_counter()
                function()
                times[i] = min(times[i], time.perf_counter() - begin)
    return times


def line(name: str, times: list[float], flops: float, roof: float | None) -> None:
    text = f"{name:34} {times[0] * 1e3:9.2f} ms"
    text += f" {times[1] * 1e3:10.1f} {times[1] / times[0]:7.1f}×" if len(times) > 1 else " " * 20
    if roof is not None:
        rate = flops / times[0] / 1e9
        text += f" {rate:8.0f} GFLOP/s {rate / roof:7.0%}"
    print(text, flush=True)


def problem(n: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight, the factor of a Hessian, scales and the column order's groups."""
    x = torch.randn(2 * k, k) @ (torch.eye(k) + 0.3 * torch.randn(k, k) / k**0.5)
    hessian = x.t() @ x / len(x)
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).contiguous()
    weight = torch.randn(n, k) * 0.05
    scale = weight.unflatten(1, (-1, GROUP)).abs().amax(-1) / 7.5
    return weight, upper, scale, torch.randperm(k) // GROUP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-torch", action="store_true", help="time the kernels alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    forms = [ops] if args.skip_torch else [ops, reference]
    roof = Roof()
    roofs = {d: roof.measure(d, args.threads) for d in (torch.float32, torch.bfloat16)}
    print(f"isa {ops.get_isa()}, threads {args.threads}, roof in GFLOP/s: "
          f"float32 {roofs[torch.float32]:.0f}, bfloat16 {roofs[torch.bfloat16]:.0f}")  # fmt: skip
    print(f"{'':34} {'native':>12} {'torch, ms':>10} {'ratio':>8} {'rate':>16} {'of roof':>7}")

    totals = {"gptq_round": 0.0, "rounding_errors": 0.0}
    for name, (n, k) in LAYERS.items():
        weight, upper, scale, group = problem(n, k)
        arguments = (weight, upper, scale, None, group, *INT4)
        times = least([partial(f.gptq_round, *arguments) for f in forms], args.rounds)
        totals["gptq_round"] += times[0]
        line(f"gptq_round {name} [{n}, {k}]", times, n * k * k, roofs[torch.float32])

        scales = torch.stack([scale * (1 - 0.025 * i) for i in range(CANDIDATES)])
        importance = upper.diagonal().contiguous()
        arguments = (weight.bfloat16(), scales, None, importance, GROUP, *INT4)
        times = least([partial(f.rounding_errors, *arguments) for f in forms], args.rounds)
        totals["rounding_errors"] += times[0]
        line(f"rounding_errors {name} S={CANDIDATES}", times, 0, None)
    for name, seconds in totals.items():
        line(f"{name}, a block", [seconds], 0, None)

    for k in (576, 1536):
        for dtype in (torch.bfloat16, torch.float32):
            x, acc = torch.randn(4096, k).to(dtype), torch.zeros(k, k)
            times = least([partial(f.syrk_accumulate, acc, x) for f in forms], args.rounds, 10)
            label = f"syrk_accumulate [4096, {k}] {str(dtype).removeprefix('torch.')}"
            line(label, times, len(x) * k * k, roofs[dtype])


if __name__ == "__main__":
    main()
