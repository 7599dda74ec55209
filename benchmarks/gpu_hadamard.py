"""Hadamard products of rows on a GPU, alone and fused: correctness and speed.

Speed is beside what does the same without the fusion: the gate's kernel, the product's or torch's,
and the row quantizer; and beside the fused gate and quantizer without a product, which is what a
rotation adds to. Run by ``benchmarks/gpu_session.sh``; needs a CUDA build of torch and the built
libraries.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from benchmarks.gpu_command import run
from benchmarks.gpu_timing import Contenders, Table, same_bits
from quantkit import ops
from quantkit.hadamard import base_order, factor, largest_order, multiply
from quantkit.ops import reference, reference_parts

#: Inputs of down_proj: SmolLM2-135M; Llama-3.2-1B, Llama-2-7B (blocks of 256), Llama-3-8B and 70B;
#: Qwen2.5-7B.
MODELS = {"135M": 1536, "1B": 8192, "7B": 11008, "8B": 14336, "70B": 28672, "qwen-7B": 18944}
#: name -> (kind, group, the oracle of rows that are given)
QUANTIZERS = {
    "int8": ("int8", -1, reference.quantize_int8_per_token),
    "fp8": ("fp8", -1, reference.quantize_fp8_per_token),
    "fp8 g128": ("fp8", 128, reference.quantize_fp8_per_block),
}


class Rotation:
    """What multiplies rows of n columns, on the GPU."""

    def __init__(self, n: int, order: int = 0) -> None:
        self.n, self.order = n, order or largest_order(n)
        self.factor = factor(self.order).cuda()
        self.base = self.factor.shape[0]
        self.signs = ops.pack_hadamard(self.factor)

    @property
    def told(self) -> tuple[Tensor, int, int]:
        return self.signs, self.base, self.order

    def by_torch(self, x: Tensor) -> Tensor:
        """The same product by torch's own kernels: B in fp32, S as one matrix."""
        return reference_parts.hadamard(x, self.factor, self.order)


def cases(small: bool) -> list[tuple[int, int]]:
    """(columns, order): every length of S beyond a warp's runs, B of every kind, models' widths."""
    found = [(3, 1), (6, 2), (16, 8), (48, 16), (40, 20), (36, 36), (96, 48), (896, 896)]
    found += [(12 << k, 12 << k) for k in range(5, 9)] + [(304, 152), (4864, 4864), (432, 432)]
    if not small:
        found += [(12 << k, 12 << k) for k in range(9, 12)] + [(3200, 3200), (9856, 9856)]
        found += [(n, largest_order(n)) for n in MODELS.values()]
    return found


def check(small: bool) -> int:
    """Products near the fp64 oracle, codes and the gate's to the bit; the same on every run."""
    done = 0
    for (n, order), dtype in itertools.product(cases(small), (torch.bfloat16, torch.float16)):
        if base_order(order) is None:
            raise SystemExit(f"order {order} has no matrix")
        rotation, rows = Rotation(n, order), 5 if small else 37
        wide = torch.randn(rows, n + 8, device="cuda") * 2
        wide[:, n // 2] *= 50
        gate_up = (torch.randn(rows, 2 * n, device="cuda") * 2).to(dtype)
        gated = ops.gated_activation(gate_up, "silu")
        for name, x in {"aligned": gated, "strided": wide.to(dtype)[:, 3 : n + 3]}.items():
            label = f"{n} columns, order {order}, {dtype}, {name}"
            y, exact = ops.hadamard_mma(x, *rotation.told), multiply(x.double(), order)
            length = x.double().unflatten(-1, (-1, order)).norm(dim=-1, keepdim=True)
            slack = length.expand(*length.shape[:-1], order).reshape(exact.shape)
            unit = torch.finfo(dtype).eps / 2
            if not bool(((y.double() - exact).abs() <= unit * exact.abs() + 2e-6 * slack).all()):
                raise SystemExit(f"{label}: not the product")
            if not same_bits(ops.hadamard_mma(x[1:2], *rotation.told), y[1:2]):
                raise SystemExit(f"{label}: bits depend on M")
            for quantizer, (kind, group, oracle) in QUANTIZERS.items():
                pairs = [(ops.hadamard_mma_quantize(x, *rotation.told, kind, group), oracle(y))]
                if name == "aligned":
                    fused = ops.gated_hadamard_mma_quantize(
                        gate_up, *rotation.told, "silu", kind, group
                    )
                    pairs.append((fused, oracle(y)))
                for given, wanted in pairs:
                    if not all(same_bits(a, b) for a, b in zip(given, wanted, strict=True)):
                        raise SystemExit(f"{label}, {quantizer}: other bits")
                    done += 1
            for _ in range(3 if small else 20):
                if not same_bits(ops.hadamard_mma(x, *rotation.told), y):
                    raise SystemExit(f"{label}: bits change from run to run")
    return done


def contenders(m: int, n: int, copies: int) -> Contenders:
    """Bytes are those that a call must move: what it reads from memory and writes to it."""
    rotation, dtype = Rotation(n), torch.bfloat16
    told = rotation.told
    rows = [torch.randn(m, n, device="cuda").to(dtype) for _ in range(copies)]
    wide = [torch.randn(m, 2 * n, device="cuda").to(dtype) for _ in range(copies)]

    def unfused(x: Tensor) -> object:
        return ops.quantize_int8_per_token(ops.hadamard_mma(ops.gated_activation(x, "silu"), *told))

    def by_torch(x: Tensor) -> object:
        return ops.quantize_int8_per_token(rotation.by_torch(ops.gated_activation(x, "silu")))

    fused, plain = ops.gated_hadamard_mma_quantize, ops.gated_activation_quantize
    found: Contenders = {
        "gate + H + int8": (5 * m * n, [lambda x=x: fused(x, *told, "silu", "int8") for x in wide]),
        "gate + H + fp8": (5 * m * n, [lambda x=x: fused(x, *told, "silu", "fp8") for x in wide]),
        "gate + int8, no H": (5 * m * n, [lambda x=x: plain(x, "silu", "int8") for x in wide]),
        "gate, H, int8": (5 * m * n, [lambda x=x: unfused(x) for x in wide]),
        "gate, torch's H, int8": (5 * m * n, [lambda x=x: by_torch(x) for x in wide]),
        "H + int8": (
            3 * m * n,
            [lambda x=x: ops.hadamard_mma_quantize(x, *told, "int8") for x in rows],
        ),
        "int8, no H": (3 * m * n, [lambda x=x: ops.quantize_int8_per_token(x) for x in rows]),
        "H": (4 * m * n, [lambda x=x: ops.hadamard_mma(x, *told) for x in rows]),
        "torch copy": (4 * m * n, [lambda x=x: x.clone() for x in rows]),
    }
    if m * n > 2**25:  # its fp32 intermediates would fill the memory, and it is far off by then
        del found["gate, torch's H, int8"]
    return found


def bench(path: str | None) -> None:
    table = Table()
    for (model, n), m in itertools.product(MODELS.items(), (1, 16, 256, 4096)):
        copies = min(48, table.copies(2 * m * n))
        case = {"model": model, "n": n, "m": m}
        table.race(case, contenders(m, n, copies))
    table.write(path)


def main() -> None:
    run(__doc__, lambda small: print(f"{check(small)} Hadamard products: all right"), bench)


if __name__ == "__main__":
    main()
