"""Speed of the CPU's linear kernels beside torch's products and the machine's measured limits.

Every kernel is checked against its reference before it is timed. Candidates are interleaved, round
by round, and each figure is the median of the rounds with its 10th and 90th percentile, so that a
neighbour on the same cores disturbs all of them alike. Up to 8 rows the weights rotate through
copies larger than the caches: decode reads them from memory.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantkit import ops
from quantkit.errors import QuantkitError

COLD_BYTES = 128 * 2**20  # weights of one rotation: several times a last-level cache share
GROUP = 64


@dataclass(frozen=True)
class Candidate:
    """One kernel on one shape: ``run(i)`` uses the i-th copy of the weight."""

    name: str
    weight_bytes: int
    run: Callable[[int], Tensor]
    copies: int
    integer: bool = False  # products of integers: measured against that rate


@dataclass(frozen=True)
class Limits:
    """What the machine does, measured: bytes read a second, and operations a second."""

    read_bytes: float
    bf16_operations: float
    int8_operations: float


@dataclass(frozen=True)
class Timing:
    """One kernel on ``[n, k]`` with m rows of x. ``roof_share``: of the larger of the two limits
    that apply, reading the weight once or its operations at torch's rate for the same products."""

    kernel: str
    n: int
    k: int
    m: int
    microseconds: float
    p10: float
    p90: float
    gb_s: float
    gflop_s: float
    roof_share: float
    speedup_over_bf16: float


def read_bandwidth(rounds: int = 9) -> float:
    """Bytes a second of summing an array that no cache holds."""
    data = torch.ones(64 * 2**20, dtype=torch.float32)
    return data.nbytes / min(seconds(lambda: data.sum()) for _ in range(rounds))


def product_rate(rounds: int = 9) -> float:
    """Operations a second of torch's bf16 matrix product."""
    a, b = (torch.randn(1024, 1024, dtype=torch.float32).bfloat16() for _ in range(2))
    torch.mm(a, b)
    return 2 * 1024**3 / min(seconds(lambda: torch.mm(a, b)) for _ in range(rounds))


def int8_rate(rounds: int = 9) -> float:
    """Operations a second of torch's int8 matrix product."""
    a, b = (torch.randint(-127, 128, (1024, 1024), dtype=torch.int8) for _ in range(2))
    torch._int_mm(a, b)
    return 2 * 1024**3 / min(seconds(lambda: torch._int_mm(a, b)) for _ in range(rounds))


def limits() -> Limits:
    return Limits(read_bandwidth(), product_rate(), int8_rate())


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def candidates(n: int, k: int, m: int) -> list[Candidate]:
    x = torch.randn(m, k, dtype=torch.float32).bfloat16()
    groups = -(-k // GROUP)
    scale = ops.pack_scale(torch.rand(n, groups, dtype=torch.float32) * 0.02)
    zero = ops.pack_scale(torch.randint(0, 16, (n, groups)).float())
    channel = ops.pack_scale(torch.rand(n, 1, dtype=torch.float32) * 0.02)
    w_scale = torch.rand(n, dtype=torch.float32)
    lut = torch.arange(16, dtype=torch.float32)
    codes4 = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    codes8 = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    fp8 = torch.randn(n, k, dtype=torch.float32).to(torch.float8_e4m3fn)
    xq, x_scale = ops.quantize_int8_per_token(x)
    fine = ops.pack_scale(torch.rand(n, -(-k // 32), dtype=torch.float32) * 0.02)

    def rotation(tensor: Tensor) -> list[Tensor]:
        copies = max(1, COLD_BYTES // tensor.nbytes) if m <= 8 else 1
        return [tensor.clone() for _ in range(copies)]

    bf16 = rotation(torch.randn(n, k, dtype=torch.float32).bfloat16())
    w4 = rotation(ops.pack_w4(codes4))
    i8 = rotation(ops.pack_w8(codes8))
    f8 = rotation(ops.pack_w8(fp8))
    floats = rotation(ops.pack_float(bf16[0]))

    def integer(group: int, packed: Tensor, scales: Tensor, table: Tensor | None) -> Tensor:
        codes, scale_of_x = ops.quantize_int8_per_group(x, group)
        return ops.int8_linear(
            codes, scale_of_x, packed, scales, None, table, None, n, group, torch.bfloat16
        )

    return [
        Candidate(
            "torch bf16",
            2 * n * k,
            lambda i: torch.nn.functional.linear(x, bf16[i]),
            len(bf16),
        ),
        Candidate(
            "bf16",
            2 * n * k,
            lambda i: ops.float_linear(x, floats[i], None, n),
            len(floats),
        ),
        Candidate(
            f"w4 int8 g{GROUP}",
            w4[0].nbytes + scale.nbytes,
            lambda i: integer(GROUP, w4[i], scale, lut),
            len(w4),
            integer=True,
        ),
        Candidate(
            "int8 int8 g32",
            i8[0].nbytes + fine.nbytes,
            lambda i: integer(32, i8[i], fine, None),
            len(i8),
            integer=True,
        ),
        Candidate(
            f"w4 g{GROUP}",
            w4[0].nbytes + scale.nbytes,
            lambda i: ops.w4_linear(x, w4[i], scale, None, lut, None, n, GROUP),
            len(w4),
        ),
        Candidate(
            f"w4 g{GROUP} zero",
            w4[0].nbytes + 2 * scale.nbytes,
            lambda i: ops.w4_linear(x, w4[i], scale, zero, lut, None, n, GROUP),
            len(w4),
        ),
        Candidate(
            "int8 channel",
            i8[0].nbytes,
            lambda i: ops.w8_linear(x, i8[i], channel, None, None, "int8", -1),
            len(i8),
        ),
        Candidate(
            f"fp8 g{GROUP}",
            f8[0].nbytes + scale.nbytes,
            lambda i: ops.w8_linear(x, f8[i], scale, None, None, "fp8", GROUP),
            len(f8),
        ),
        Candidate(
            "w8a8 + quantize",
            i8[0].nbytes,
            lambda i: ops.w8a8_linear(
                *ops.quantize_int8_per_token(x), i8[i], w_scale, None, torch.bfloat16
            ),
            len(i8),
            integer=True,
        ),
        Candidate(
            "w8a8",
            i8[0].nbytes,
            lambda i: ops.w8a8_linear(xq, x_scale, i8[i], w_scale, None, torch.bfloat16),
            len(i8),
            integer=True,
        ),
    ]


def check(n: int, k: int, m: int) -> None:
    """Every kernel agrees with its reference on this shape, or this raises."""
    reference = ops.get_backend("reference")
    x = torch.randn(m, k, dtype=torch.float32).bfloat16()
    packed4 = ops.pack_w4(torch.randint(0, 16, (n, k), dtype=torch.uint8))
    packed8 = ops.pack_w8(torch.randint(-127, 128, (n, k), dtype=torch.int8))
    scale, lut = (
        torch.rand(n, -(-k // GROUP), dtype=torch.float32),
        torch.arange(16, dtype=torch.float32),
    )
    four = (x, packed4, scale, None, lut, None, n, GROUP)
    eight = (x, packed8, scale, None, None, "int8", GROUP)
    for name, arguments in (("w4_linear", four), ("w8_linear", eight)):
        y, expected = getattr(ops, name)(*arguments), getattr(reference, name)(*arguments)
        error = (y.float() - expected.float()).norm() / expected.float().norm()
        if error > 1e-2:
            raise QuantkitError(f"{name} {n}x{k} M={m} is wrong: relative error {error:.2e}")
    codes, scales = ops.quantize_int8_per_group(x, GROUP)
    grouped = (codes, scales, packed4, scale, None, lut, None, n, GROUP, torch.float32)
    y, expected = ops.int8_linear(*grouped), reference.int8_linear(*grouped)
    error = (y - expected).norm() / expected.norm()
    if error > 1e-5:
        raise QuantkitError(f"int8_linear {n}x{k} M={m} is wrong: relative error {error:.2e}")
    xq, x_scale = ops.quantize_int8_per_token(x)
    int8 = (xq, x_scale, packed8, torch.rand(n, dtype=torch.float32), None, torch.bfloat16)
    if not torch.equal(ops.w8a8_linear(*int8), reference.w8a8_linear(*int8)):
        raise QuantkitError(f"w8a8_linear {n}x{k} M={m} is not exact")


def measure(n: int, k: int, m: int, rounds: int, machine: Limits) -> list[Timing]:
    """Time every kernel on one shape.

    Raises:
        QuantkitError: a kernel disagrees with its reference.
    """
    check(n, k, m)
    bandwidth = machine.read_bytes
    entries = candidates(n, k, m)
    calls = [
        max(1, min(200, int(3e-3 * bandwidth / (e.weight_bytes * max(1, m / 8))))) for e in entries
    ]
    samples: list[list[float]] = [[] for _ in entries]
    position = [0] * len(entries)
    for round_index in range(rounds + 1):
        for index, entry in enumerate(entries):
            start = time.perf_counter()
            for _ in range(calls[index]):
                entry.run(position[index])
                position[index] = (position[index] + 1) % entry.copies
            elapsed = (time.perf_counter() - start) / calls[index]
            if round_index > 0:  # the first round warms up
                samples[index].append(elapsed)
    medians = [statistics.median(times) for times in samples]
    timings = []
    for entry, times, median in zip(entries, samples, medians, strict=True):
        ordered = sorted(times)
        operations = 2.0 * m * n * k
        rate = machine.int8_operations if entry.integer else machine.bf16_operations
        floor = max(entry.weight_bytes / bandwidth, operations / rate)
        timings.append(
            Timing(
                entry.name,
                n,
                k,
                m,
                median * 1e6,
                ordered[len(ordered) // 10] * 1e6,
                ordered[-1 - len(ordered) // 10] * 1e6,
                entry.weight_bytes / median / 1e9,
                operations / median / 1e9,
                floor / median,
                medians[0] / median,
            )
        )
    return timings


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()
