"""4-bit float weights on a GPU: correctness, and speed beside W4A16 and cuBLAS in bf16.

Run by ``benchmarks/gpu_session.sh``; needs a CUDA build of torch and the built libraries.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from benchmarks import gpu_w4a16
from benchmarks.gpu_command import run
from benchmarks.gpu_timing import Contenders, Table, same_bits
from quantkit import ops
from quantkit.ops import reference_fp4

#: name -> (kind, columns that share a scale)
FORMATS = {
    "nvfp4": ("nvfp4", 16),
    "mxfp4": ("mxfp4", 32),
    "nf4": ("nf4", 64),
    "nf4 row": ("nf4", -1),
}


class Layer:
    """A random layer in the kernel's layout, on the GPU."""

    def __init__(
        self, name: str, n: int, k: int, dtype: torch.dtype, *, bias: bool = False
    ) -> None:
        self.kind, self.group = FORMATS[name]
        self.n, self.k = n, k
        groups = 1 if self.group == -1 else -(-k // self.group)
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
        self.packed = ops.pack_fp4_mma(codes)
        self.global_scale = None
        if self.kind == "nvfp4":
            scale = (torch.rand(n, groups, device="cuda") * 400 + 1).to(torch.float8_e4m3fn)
            self.global_scale = torch.full((1,), 2100.0, device="cuda")
            self.scale = ops.pack_fp4_scales(scale)
        elif self.kind == "mxfp4":
            exponents = torch.randint(120, 128, (n, groups), dtype=torch.uint8, device="cuda")
            self.scale = ops.pack_fp4_scales(exponents)
        else:
            table = (torch.rand(n, groups, device="cuda") * 0.1 + 0.01).to(dtype)
            self.scale = ops.pack_w4a16_table(table)
        self.bias = torch.randn(n, device="cuda").to(dtype) if bias else None
        self.counters = ops.new_w4a16_counters(n)

    @property
    def bytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes

    def arguments(self) -> tuple:
        tables = (self.packed, self.scale, self.global_scale, self.bias, self.counters)
        return (*tables, self.n, self.kind, self.group)

    def __call__(self, x: Tensor) -> Tensor:
        return ops.fp4a16_linear(x, *self.arguments())

    def exact(self, x: Tensor) -> Tensor:
        return reference_fp4.fp4a16_linear(x.double(), *self.arguments())


def check(small: bool) -> None:
    """Each format against the fp64 oracle, and its promises about bits."""
    cases = 0
    shapes = [(64, 64), (80, 416), (130, 200), (33, 71), (96, 4160)]
    shapes += [] if small else [(4096, 4096), (1024, 14336)]
    rows = [1, 8, 9, 32, 33, 65] if small else [*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128]
    dtypes = (torch.bfloat16, torch.float16)
    for (n, k), name, dtype in itertools.product(shapes, FORMATS, dtypes):
        where = f"{name} {n} x {k} in {dtype}"
        layer = Layer(name, n, k, dtype, bias=n % 2 == 0)
        x = torch.randn(128, k + 8, device="cuda").to(dtype)[:, :k]
        exact, few, many = layer.exact(x), layer(x[:32]), layer(x)
        # Half a unit of the result's dtype at the most, and what fp32 sums lose.
        unit = torch.finfo(dtype).eps / 2
        for m in rows:
            del [torch.full((m, n), torch.nan, device="cuda", dtype=dtype) for _ in range(3)][:]
            y = layer(x[:m])
            if not same_bits(y, (few if m <= 32 else many)[:m]):
                raise SystemExit(f"{where}, M = {m}: bits depend on M")
            error = float((y.double() - exact[:m]).norm() / exact[:m].norm())
            if not error <= unit + 2e-6:
                raise SystemExit(f"{where}, M = {m}: {error:.1e} > {unit:.1e}")
            cases += 1
        for _ in range(3 if small else 50):
            if not (same_bits(layer(x), many) and same_bits(layer(x[:32]), few)):
                raise SystemExit(f"{where}: bits change from run to run")
        if layer.counters.any():
            raise SystemExit(f"{where}: counters were not reset")
    for name, dtype in itertools.product(FORMATS, dtypes):
        # Every code and scale: the identity reads the weight back.
        layer = Layer(name, 1024, 64, dtype)
        eye = torch.eye(64, dtype=dtype, device="cuda")
        if not torch.equal(layer(eye), layer.exact(eye).to(dtype)):
            raise SystemExit(f"{name} in {dtype}: a weight is not decoded exactly")
    print(f"{cases} cases, reruns and every weight read back: all right")


def contenders(n: int, k: int, m: int, copies: int) -> Contenders:
    x = torch.randn(m, k, device="cuda").bfloat16()
    found: Contenders = {}
    for name in ("nvfp4", "mxfp4", "nf4"):
        layers = [Layer(name, n, k, torch.bfloat16) for _ in range(copies)]
        found[name] = (layers[0].bytes, [lambda c=c: c(x) for c in layers])
    int4 = [gpu_w4a16.random_layer(n, k, 32, torch.bfloat16) for _ in range(copies)]
    found["w4a16 g32"] = (int4[0].bytes, [lambda c=c: c(x) for c in int4])
    dense = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(max(2, copies // 4))]
    found["cuBLAS bf16"] = (
        2 * n * k,
        [lambda w=w: torch.nn.functional.linear(x, w) for w in dense],
    )
    return found


def bench(path: str | None) -> None:
    table = Table()
    for (name, (n, k)), m in itertools.product(
        gpu_w4a16.SHAPES.items(), (1, 2, 4, 8, 16, 32, 64, 128, 512)
    ):
        copies = table.copies(n * k // 2)
        table.race({"layer": name, "n": n, "k": k, "m": m}, contenders(n, k, m, copies))
    table.write(path)


def main() -> None:
    run(__doc__, check, bench)


if __name__ == "__main__":
    main()
