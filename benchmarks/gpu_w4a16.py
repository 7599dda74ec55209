"""W4A16 on a GPU: the probes' instructions beside the host twin, correctness, and speed.

Run by ``benchmarks/gpu_session.sh``; needs a CUDA build of torch and the built libraries.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_command import run
from benchmarks.gpu_timing import Table, same_bits
from quantkit import ops
from quantkit.ops import reference

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "ops"))

# Linear layers of an 8B Llama: q, k and v; output; gate and up; down.
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
GROUP = 128


@dataclass(frozen=True)
class Layer:
    """A random layer in the kernel's layout, on the GPU."""

    codes: Tensor
    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    counters: Tensor
    group_size: int

    def arguments(self) -> tuple:
        tables = (self.packed, self.scale, self.zero, self.bias, self.counters)
        return (*tables, self.codes.shape[0], self.group_size)

    def __call__(self, x: Tensor) -> Tensor:
        return ops.w4a16_linear(x, *self.arguments())

    def exact(self, x: Tensor) -> Tensor:
        return reference.w4a16_linear(x.double(), *self.arguments())

    @property
    def bytes(self) -> int:
        zero = 0 if self.zero is None else self.zero.numel()
        return self.packed.numel() + 2 * self.scale.numel() + zero


def random_layer(
    n: int, k: int, group_size: int, dtype: torch.dtype, *, zero: bool = False, bias: bool = False
) -> Layer:
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    groups = 1 if group_size == -1 else -(-k // group_size)
    scale = (torch.rand(n, groups, device="cuda") * 0.1 + 0.01).to(dtype)
    zeros = torch.randint(0, 16, (n, groups), dtype=torch.uint8, device="cuda")
    return Layer(
        codes,
        ops.pack_w4a16(codes),
        ops.pack_w4a16_table(scale),
        ops.pack_w4a16_table(zeros) if zero else None,
        torch.randn(n, device="cuda").to(dtype) if bias else None,
        ops.new_w4a16_counters(n),
        group_size,
    )


def probes(library: str) -> None:
    """Every instruction probe on the GPU and in the twin, on the same inputs."""
    import twin

    gpu, host = ctypes.CDLL(library), twin.library()
    torch.manual_seed(0)

    def both(name: str, *arguments: int | Tensor, written: int) -> tuple[Tensor, Tensor]:
        results = []
        for handle, device in ((gpu, "cuda"), (host, "cpu")):
            moved = [
                a.to(device, copy=True) if isinstance(a, Tensor) else ctypes.c_int(a)
                for a in arguments
            ]
            twin.watch()
            passed = [twin.pointer(a) if isinstance(a, Tensor) else a for a in moved]
            status = getattr(handle, name)(*passed)
            torch.cuda.synchronize()
            if status != 0:
                raise SystemExit(f"{name} on {device}: status {status}, {twin.error()}")
            results.append(moved[written].cpu())
        return results[0], results[1]

    for kind, what in enumerate(("bf16", "f16", "int8", "e4m3", "bf16 by ldmatrix")):
        element = {1: torch.float16, 2: torch.int8, 3: torch.float8_e4m3fn}.get(
            kind, torch.bfloat16
        )
        k = 32 if kind in (2, 3) else 16
        a = (torch.randn(16, k) * 10).to(element)
        b = (torch.randn(16, 8) if kind == 4 else torch.randn(8, k)).mul(10).to(element)
        d = torch.zeros(16, 8, dtype=torch.int32 if kind == 2 else torch.float32)
        on_gpu, on_host = both("qk_probe_mma", kind, a, b, d, written=3)
        error = float((on_gpu.double() - on_host.double()).norm() / on_host.double().norm())
        print(f"mma {what:18} relative difference {error:.1e}")
        # fp8 sums in sm_90 keep about 14 bits; the others are exact or fp32.
        if error > {2: 0.0, 3: 1e-3}.get(kind, 1e-6):
            raise SystemExit(f"mma {what}: the GPU and its twin differ by {error:.1e}")
    words = twin.words(3000)
    out = torch.empty(4000, dtype=torch.int32)
    floats = torch.randn(1000) * 2.0 ** torch.randint(-30, 20, (1000,))
    stages = (twin.words(4, 64, 4), torch.empty(4, 64, 4, dtype=torch.int32))
    cases = [
        ("qk_probe_warp", (torch.empty(5, 32, dtype=torch.int32),), 0),
        ("qk_probe_int4", (0, words[:1000], out, 1000), 2),
        ("qk_probe_int4", (1, words[:1000], out, 1000), 2),
        ("qk_probe_fp4", (0, words[:500], out, 500), 2),
        ("qk_probe_fp4", (1, words[:500], out, 500), 2),
        ("qk_probe_conversions", (floats, out[:3000].clone(), 1000), 1),
        ("qk_probe_pipeline", (0, *stages), 2),
        ("qk_probe_producers", (torch.empty(64, dtype=torch.int32),), 0),
    ]
    for is_f16, dtype in enumerate((torch.bfloat16, torch.float16)):
        operands = torch.randn(1000, 3, 2).to(dtype).view(torch.int32)
        cases.append(("qk_probe_pairs", (is_f16, operands, out, 1000), 2))
    for name, arguments, written in cases:
        on_gpu, on_host = both(name, *arguments, written=written)
        wrong = int((on_gpu != on_host).sum())
        print(f"{name[9:]:22} {wrong} of {on_host.numel()} words differ")
        if wrong:
            raise SystemExit(f"{name}: the GPU and its twin differ")


def check(small: bool) -> None:
    """The kernel against the fp64 oracle, and its promises about bits."""
    torch.manual_seed(0)
    cases = 0
    shapes = [(64, 64), (80, 416), (130, 200), (96, 4160)]
    rows = [1, 8, 9, 16, 33] if small else [*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128]
    if not small:
        shapes += [(4096, 4096), (1024, 14336)]
    dtypes = (torch.bfloat16, torch.float16)
    for (n, k), group, zero, dtype in itertools.product(
        shapes, (32, 64, 96, 128, -1), (0, 1), dtypes
    ):
        layer = random_layer(n, k, group, dtype, zero=bool(zero), bias=bool(zero))
        x = torch.randn(128, k + 8, device="cuda").to(dtype)[:, :k]
        exact = layer.exact(x)
        weight = reference.w4a16_linear(
            torch.eye(k, device="cuda", dtype=torch.float32),
            *(layer.packed, layer.scale, layer.zero, None, layer.counters, n, group),
        ).t()
        close = torch.nn.functional.linear(x, weight.to(dtype), layer.bias).double()
        whole, few = layer(x), layer(x[:32])  # by the kernel for many rows and that for few
        for m in rows:
            del [torch.full((m, n), torch.nan, device="cuda", dtype=dtype) for _ in range(3)][:]
            y = layer(x[:m])
            if not same_bits(y, few[:m] if m <= 32 else whole[:m]):
                raise SystemExit(f"{n} x {k}, group {group}, M = {m}: bits depend on M")
            error = float((y.double() - exact[:m]).norm() / exact[:m].norm())
            allowed = 2 * float((close[:m] - exact[:m]).norm() / exact[:m].norm())
            if not error <= allowed:
                raise SystemExit(f"{n} x {k}, group {group}, M = {m}: {error:.1e} > {allowed:.1e}")
            cases += 1
        for _ in range(3 if small else 50):
            if not (same_bits(layer(x), whole) and same_bits(layer(x[:32]), few)):
                raise SystemExit(f"{n} x {k}, group {group}: bits change from run to run")
        if not torch.equal(layer.counters, torch.zeros_like(layer.counters)):
            raise SystemExit(f"{n} x {k}: counters were not reset")
    layer = random_layer(4096, 4096, 128, torch.bfloat16)
    x = torch.randn(8, 4096, device="cuda").bfloat16()
    expected = layer(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        if not same_bits(layer(x), expected):
            raise SystemExit("another stream: other bits")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    for _ in range(20):
        captured.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        if not same_bits(captured, expected):
            raise SystemExit("graph replay: other bits")
    print(f"{cases} cases, reruns, another stream and a CUDA graph: all right")


def contenders(n: int, k: int, m: int, copies: int) -> dict[str, tuple[int, list]]:
    """For each name the bytes of one weight and a call for each of its copies."""
    x = torch.randn(m, k, device="cuda").bfloat16()
    layers = [random_layer(n, k, GROUP, torch.bfloat16) for _ in range(copies)]
    nibbles = [(c.codes[:, ::2] << 4) | c.codes[:, 1::2] for c in layers]
    tiles = [torch.ops.aten._convert_weight_to_int4pack(w, 8) for w in nibbles]
    tables = [torch.rand(k // GROUP, n, 2, device="cuda").bfloat16() for _ in tiles]
    dense = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(max(2, copies // 4))]
    int4 = torch.ops.aten._weight_int4pack_mm
    return {
        "quantkit": (layers[0].bytes, [lambda c=c: c(x) for c in layers]),
        "torch int4": (
            tiles[0].nbytes + tables[0].nbytes,
            [lambda w=w, t=t: int4(x, w, GROUP, t) for w, t in zip(tiles, tables, strict=True)],
        ),
        "cuBLAS bf16": (2 * n * k, [lambda w=w: torch.nn.functional.linear(x, w) for w in dense]),
    }


def bench(path: str | None) -> None:
    """Interleaved CUDA graphs over weights that exceed twice the L2 cache."""
    table = Table()
    for (name, (n, k)), m in itertools.product(SHAPES.items(), (1, 2, 4, 8, 16, 32, 64, 128, 512)):
        copies = table.copies(n * k // 2)
        table.race({"layer": name, "n": n, "k": k, "m": m}, contenders(n, k, m, copies))
    table.write(path, group=GROUP)


def main() -> None:
    run(__doc__, check, bench, probes)


if __name__ == "__main__":
    main()
