"""Random layers of every weight-only format, activations, and the error measures of the tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit import ops
from quantkit.ops import reference

NF4_NEGATIVE = torch.tensor([-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0])
NF4_POSITIVE = torch.tensor([0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0])
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
CODEBOOKS = {
    "int4": torch.arange(16.0) - 8,
    "uint4": torch.arange(16.0),
    "nf4": torch.cat((NF4_NEGATIVE, NF4_POSITIVE)),
    "e2m1": torch.cat((E2M1, -E2M1)),
}
FORMATS = [*CODEBOOKS, "int8", "fp8"]


@dataclass(frozen=True)
class Layer:
    """A random weight in one format: codes [N, K] with its scales, zeros and bias."""

    format: str
    codes: Tensor
    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    group_size: int

    @property
    def lut(self) -> Tensor:
        return CODEBOOKS[self.format]

    def __call__(self, x: Tensor, backend: str = "native") -> Tensor:
        kernels = ops.get_backend(backend)
        if self.format in CODEBOOKS:
            return kernels.w4_linear(
                x,
                self.packed,
                self.scale,
                self.zero,
                self.lut,
                self.bias,
                self.codes.shape[0],
                self.group_size,
            )
        return kernels.w8_linear(
            x, self.packed, self.scale, self.zero, self.bias, self.format, self.group_size
        )

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight [N, K], by the plain-torch reference."""
        n, k = self.codes.shape
        if self.format in CODEBOOKS:
            return reference.dequantize_w4(
                self.packed, self.scale, self.zero, self.lut, n, k, self.group_size, dtype
            )
        return reference.dequantize_w8(
            self.packed, self.scale, self.zero, n, k, self.format, self.group_size, dtype
        )


def random_layer(
    format: str, n: int, k: int, group_size: int, *, zero: bool = False, bias: bool = False
) -> Layer:
    if format in CODEBOOKS:
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        packed = ops.pack_w4(codes)
    else:
        codes = torch.randint(0, 256, (n, k), dtype=torch.uint8)
        if format == "fp8":
            codes[(codes & 0x7F) == 0x7F] = 0  # NaN codes have a test of their own
        packed = ops.pack_w8(codes)
    groups = 1 if group_size == -1 else -(-k // group_size)
    return Layer(
        format,
        codes,
        packed,
        torch.rand(n, groups) * 0.1 + 0.01,
        torch.randn(n, groups) * 4 if zero else None,
        torch.randn(n) if bias else None,
        group_size,
    )


def relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def allowed_error(layer: Layer, x: Tensor, exact: Tensor) -> float:
    """Twice the error of torch with the weight dequantized to the dtype of x, plus fp32 noise."""
    y = torch.nn.functional.linear(x, layer.weight(x.dtype))
    if layer.bias is not None:
        y = (y.float() + layer.bias).to(x.dtype)
    return 2 * relative_error(y, exact) + 2e-6


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def activations(dtype: torch.dtype, seed: int, k: int = 200) -> Tensor:
    """Rows of many magnitudes, with ties, zeros, an all-zero row and a subnormal one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 12, k, generator=generator)
    x = x * torch.logspace(-6, 4, 24).reshape(2, 12, 1)
    x[0, 0] = 0
    x[0, 1] = torch.randint(-255, 256, (k,), generator=generator) / 2
    x[0, 1, 0] = 127.5
    x[0, 2] = 1e-40
    x[0, 3, ::2] = -0.0
    x[0, 4, 0] = 3e4
    return x.to(dtype)
