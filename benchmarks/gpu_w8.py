"""8-bit weights and activations on a GPU: correctness and speed of layers and quantizers.

Run by ``benchmarks/gpu_session.sh``; needs a CUDA build of torch and the built libraries.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu_command import run
from benchmarks.gpu_timing import Contenders, Table, same_bits
from quantkit import ops
from quantkit.ops import reference, reference_gpu, reference_parts

# Linear layers of an 8B Llama: q, k and v; output; gate and up; down.
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
#: name -> (kind, group size, dtype of x)
LAYERS = {
    "w8a16 int8": ("int8", -1, torch.bfloat16),
    "w8a16 int8 g32": ("int8", 32, torch.float16),
    "w8a16 fp8": ("fp8", -1, torch.bfloat16),
    "w8a16 fp8 g128": ("fp8", 128, torch.float16),
    "w8a8 int8": ("int8", -1, torch.int8),
    "w8a8 fp8": ("fp8", -1, torch.float8_e4m3fn),
    "w8a8 fp8 g128": ("fp8", 128, torch.float8_e4m3fn),
}


def random_codes(kind: str, *shape: int) -> Tensor:
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    if kind == "int8":
        return codes.view(torch.int8)
    codes[(codes & 0x7F) == 0x7F] = 0  # no NaN
    return codes.view(torch.float8_e4m3fn)


class Layer:
    """A random layer in the kernels' layout, on the GPU, and its input."""

    def __init__(self, name: str, n: int, k: int, *, bias: bool = False) -> None:
        self.kind, self.group, self.dtype = LAYERS[name]
        self.n, self.k, self.eight = n, k, self.dtype.itemsize == 1
        self.groups = 1 if self.group == -1 else -(-k // self.group)
        self.codes = random_codes(self.kind, n, k)
        scale = torch.rand(n, self.groups, device="cuda") * 0.1 + 0.01
        self.out = torch.bfloat16 if self.eight else self.dtype
        self.scale = scale if self.eight else scale.to(self.dtype)
        self.bias = torch.randn(n, device="cuda").to(self.out) if bias else None
        self.packed = ops.pack_w8_mma(self.codes)
        whole = self.eight and self.groups == 1
        self.table = self.scale if whole else ops.pack_w4a16_table(self.scale)
        self.counters = ops.new_w4a16_counters(n)

    @property
    def bytes(self) -> int:
        return self.packed.nbytes + self.table.nbytes

    def inputs(self, m: int) -> tuple[Tensor, Tensor]:
        """x and its scales, rows with a stride."""
        if not self.eight:
            x = torch.randn(m, self.k + 16, device="cuda").to(self.dtype)
            return x[:, : self.k], torch.ones(m, 1, device="cuda")
        x = random_codes(self.kind, m, self.k + 16)[:, : self.k]
        return x, torch.rand(m, self.groups, device="cuda") * 0.1 + 0.01

    def __call__(self, x: Tensor, x_scale: Tensor) -> Tensor:
        rest = (self.bias, self.counters, self.n)
        if self.eight:
            return ops.w8a8_mma_linear(
                x, x_scale, self.packed, self.table, *rest, self.group, self.out
            )
        return ops.w8a16_linear(x, self.packed, self.table, *rest, self.kind, self.group)

    def exact(self, x: Tensor, x_scale: Tensor) -> Tensor:
        group = torch.arange(self.k, device="cuda") // (self.k if self.group == -1 else self.group)
        weight = self.codes.double() * self.scale.double()[:, group]
        values = x.double() * x_scale.double()[:, group] if self.eight else x.double()
        y = values @ weight.t()
        return y if self.bias is None else y + self.bias.double()


def check_linear(small: bool) -> int:
    """Each layer against the fp64 oracle, and its promises about bits."""
    cases = 0
    shapes = [(64, 64), (80, 416), (130, 208), (33, 71), (96, 4160)]
    shapes += [] if small else [(4096, 4096), (1024, 14336)]
    rows = [1, 8, 9, 32, 33, 65] if small else [*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128]
    for (n, k), name in itertools.product(shapes, LAYERS):
        layer = Layer(name, n, k, bias=n % 2 == 0)
        x, s = layer.inputs(128)
        exact, few, many = layer.exact(x, s), layer(x[:32], s[:32]), layer(x, s)
        # Half a unit of the result's dtype at the most, and what fp32 sums lose.
        unit = torch.finfo(layer.out).eps / 2
        for m in rows:
            del [torch.full((m, n), torch.nan, device="cuda", dtype=layer.out) for _ in range(3)][:]
            y = layer(x[:m], s[:m])
            if not same_bits(y, (few if m <= 32 else many)[:m]):
                raise SystemExit(f"{name} {n} x {k}, M = {m}: bits depend on M")
            error = float((y.double() - exact[:m]).norm() / exact[:m].norm())
            if not error <= unit + 2e-6:
                raise SystemExit(f"{name} {n} x {k}, M = {m}: {error:.1e} > {unit:.1e}")
            cases += 1
        if name == "w8a8 int8":
            expected = reference_gpu.w8a8_mma_linear(
                x, s, layer.packed, layer.table, layer.bias, layer.counters, n, -1, layer.out
            )
            if not same_bits(many, expected):
                raise SystemExit(f"{name} {n} x {k}: not the bits of the reference")
        for _ in range(3 if small else 50):
            if not (same_bits(layer(x, s), many) and same_bits(layer(x[:32], s[:32]), few)):
                raise SystemExit(f"{name} {n} x {k}: bits change from run to run")
        if layer.counters.any():
            raise SystemExit(f"{name} {n} x {k}: counters were not reset")
    return cases


QUANTIZERS: dict[str, tuple[str, int, Callable, Callable]] = {
    "int8": ("int8", -1, ops.quantize_int8_per_token, reference.quantize_int8_per_token),
    "fp8": ("fp8", -1, ops.quantize_fp8_per_token, reference.quantize_fp8_per_token),
    "fp8 g128": ("fp8", 128, ops.quantize_fp8_per_block, reference.quantize_fp8_per_block),
}


def check_rows(small: bool) -> int:
    """Quantizers to the bit of the reference; norms and gates near it, their codes to the bit."""
    cases = 0
    widths = (1, 7, 72, 131, 1016, 4096) if small else (1, 7, 72, 131, 1016, 4096, 14336, 24576)
    for k, dtype, (name, (kind, group, quantize, oracle)) in itertools.product(
        widths, (torch.bfloat16, torch.float16), QUANTIZERS.items()
    ):
        scale = torch.logspace(-3, 2, 37, device="cuda").reshape(-1, 1)
        x = (torch.randn(37, k + 8, device="cuda") * scale).to(dtype)[:, :k]
        x[3] = 0
        residual, weight = torch.randn(37, k, device="cuda"), torch.randn(k, device="cuda")
        gate_up = (torch.randn(37, 2 * k, device="cuda") * 3).to(dtype)
        summed = residual.clone()
        norm = ops.add_rms_norm(summed, x, weight, 1e-5, dtype)
        exact = reference_parts.add_rms_norm(
            summed.double(), None, weight.double(), 1e-5, torch.float64
        )
        gate = ops.gated_activation(gate_up, "silu")
        exact_gate = reference_parts.gated_activation(gate_up.double(), "silu")
        for what, given, wanted in (("norm", norm, exact), ("gate", gate, exact_gate)):
            error = float((given.double() - wanted).norm() / wanted.norm())
            if not error <= torch.finfo(dtype).eps / 2:
                raise SystemExit(f"{what} of {k} columns in {dtype}: {error:.1e}")
        pairs = {
            "alone": (quantize(x), oracle(x)),
            "norm": (
                ops.add_rms_norm_quantize(residual.clone(), x, weight, 1e-5, dtype, kind, group),
                oracle(norm),
            ),
            "gate": (ops.gated_activation_quantize(gate_up, "silu", kind, group), oracle(gate)),
        }
        for what, (given, wanted) in pairs.items():
            if not (same_bits(given[0], wanted[0]) and same_bits(given[1], wanted[1])):
                raise SystemExit(f"{name} {what}, {k} columns in {dtype}: other bits")
            cases += 1
    return cases


def linear_contenders(n: int, k: int, m: int, copies: int) -> Contenders:
    names = ("w8a16 int8", "w8a16 fp8", "w8a8 int8", "w8a8 fp8", "w8a8 fp8 g128")
    found: Contenders = {}
    for name in names:
        layers = [Layer(name, n, k) for _ in range(copies)]
        x, s = layers[0].inputs(m)
        found[name] = (layers[0].bytes, [lambda c=c, x=x, s=s: c(x, s) for c in layers])
    x8, s8 = random_codes("fp8", m, k), torch.rand(m, 1, device="cuda")
    column = torch.rand(1, n, device="cuda")
    fp8 = [random_codes("fp8", n, k) for _ in range(copies)]
    found["torch._scaled_mm rows"] = (
        n * k,
        [
            lambda w=w: torch._scaled_mm(
                x8, w.t(), scale_a=s8, scale_b=column, out_dtype=torch.bfloat16
            )
            for w in fp8
        ],
    )
    if m > 16:  # what torch._int_mm needs
        xi, int8 = random_codes("int8", m, k), [random_codes("int8", n, k) for _ in range(copies)]
        found["torch._int_mm, scaled"] = (
            n * k,
            [lambda w=w: (torch._int_mm(xi, w.t()) * (s8 * column)).bfloat16() for w in int8],
        )
    x16 = torch.randn(m, k, device="cuda").bfloat16()
    dense = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(max(2, copies // 2))]
    found["cuBLAS bf16"] = (
        2 * n * k,
        [lambda w=w: torch.nn.functional.linear(x16, w) for w in dense],
    )
    return found


def row_contenders(m: int, k: int, copies: int) -> Contenders:
    dtype = torch.bfloat16
    rows = [torch.randn(m, k, device="cuda").to(dtype) for _ in range(copies)]
    wide = [torch.randn(m, 2 * k, device="cuda").to(dtype) for _ in range(copies)]
    sums = [torch.randn(m, k, device="cuda") for _ in range(copies)]
    weight = torch.randn(k, device="cuda")
    norm, gate = ops.add_rms_norm_quantize, ops.gated_activation_quantize
    return {
        "int8": (3 * m * k, [lambda x=x: ops.quantize_int8_per_token(x) for x in rows]),
        "fp8": (3 * m * k, [lambda x=x: ops.quantize_fp8_per_token(x) for x in rows]),
        "fp8 g128": (3 * m * k, [lambda x=x: ops.quantize_fp8_per_block(x) for x in rows]),
        "norm + fp8": (
            11 * m * k,
            [
                lambda r=r, x=x: norm(r, x, weight, 1e-5, dtype, "fp8")
                for r, x in zip(sums, rows, strict=True)
            ],
        ),
        "gate + fp8": (5 * m * k, [lambda x=x: gate(x, "silu", "fp8") for x in wide]),
        "torch copy": (4 * m * k, [lambda x=x: x.clone() for x in rows]),
    }


def bench(path: str | None) -> None:
    table = Table()
    for (name, (n, k)), m in itertools.product(SHAPES.items(), (1, 4, 16, 32, 64, 256, 1024)):
        contenders = linear_contenders(n, k, m, table.copies(n * k))
        table.race({"layer": name, "n": n, "k": k, "m": m}, contenders)
    for m, k in itertools.product((1, 16, 256, 4096), (4096, 14336)):
        copies = min(64, table.copies(2 * m * k))
        table.race({"rows": "rows", "m": m, "k": k}, row_contenders(m, k, copies))
    table.write(path)


def check(small: bool) -> None:
    linear, rows = check_linear(small), check_rows(small)
    print(f"{linear} linear layers and {rows} quantizers: all right")


def main() -> None:
    run(__doc__, check, bench)


if __name__ == "__main__":
    main()
