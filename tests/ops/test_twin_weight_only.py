"""The CUDA kernels for 4- and 8-bit weights, run by the host twin, against the fp64 oracle."""

from __future__ import annotations

import ctypes

import c_abi
import pytest
import torch
import twin
from ops_cases import CODEBOOKS, Layer, allowed_error, random_layer, relative_error, same_bits
from torch import Tensor

FORMATS = {"int4": c_abi.W4, "nf4": c_abi.W4, "int8": c_abi.I8, "fp8": c_abi.F8}


def arguments(layer: Layer, x: Tensor, y: Tensor) -> c_abi.WeightOnlyArgs:
    lut = layer.lut if layer.format in CODEBOOKS else None
    twin.watch(x, layer.packed, lut, layer.scale, layer.zero, layer.bias, outputs=(y,))
    return c_abi.weight_only_args(
        x,
        FORMATS[layer.format],
        layer.packed,
        lut,
        layer.scale,
        layer.zero,
        layer.group_size,
        y,
        layer.bias,
    )


def linear(layer: Layer, x: Tensor) -> Tensor:
    """y [m, n], written between guard columns that must stay NaN."""
    m, n = x.shape[0], layer.codes.shape[0]
    whole = torch.full((m, n + 3), torch.nan, dtype=x.dtype)
    args = arguments(layer, x, whole[:, 1 : n + 1])
    twin.check(twin.library().qk_cuda_weight_only_linear(ctypes.byref(args), None))
    assert whole[:, 0].isnan().all()
    assert whole[:, n + 1 :].isnan().all()
    return whole[:, 1 : n + 1]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, -1])
def test_matches_the_oracle(format: str, dtype: torch.dtype, group_size: int) -> None:
    torch.manual_seed(0)
    # K is no multiple of 64, 96 or 128: a short last group wherever the format has groups.
    for m, n, k, zero in [(3, 48, 416, False), (17, 33, 232, True)]:
        layer = random_layer(format, n, k, group_size, zero=zero, bias=zero)
        x = torch.randn(m, k).to(dtype)
        exact = layer(x.double(), "reference")
        error = relative_error(linear(layer, x), exact)
        assert error <= allowed_error(layer, x, exact), (m, n, k, error)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_have_the_same_bits_whatever_m_is(format: str) -> None:
    torch.manual_seed(1)
    layer = random_layer(format, 20, 200, 64, zero=True)
    x = torch.randn(17, 200).bfloat16()
    y = linear(layer, x)
    for m in range(1, 17):
        assert same_bits(linear(layer, x[:m]), y[:m]), m
        assert same_bits(linear(layer, x[17 - m :]), y[17 - m :]), m


@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 65])
def test_tails_and_strided_x(format: str, n: int) -> None:
    torch.manual_seed(n)
    for k in (1, 3, 8, 17, 100):
        layer = random_layer(format, n, k, -1, bias=True)
        wide = torch.randn(5, k + 21).half()
        for x in (wide[:, :k], wide[::2, 3 : 3 + k], wide[:, :k].contiguous()):
            exact = layer(x.double(), "reference")
            error = relative_error(linear(layer, x), exact)
            assert error <= allowed_error(layer, x, exact), (k, error)


@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("group_size", [32, -1])
def test_dequantize(format: str, group_size: int) -> None:
    torch.manual_seed(3)
    for n, k in [(33, 200), (70, 41)]:
        layer = random_layer(format, n, k, group_size, zero=True)
        weight = torch.full((n, k), torch.nan, dtype=torch.bfloat16)
        args = arguments(layer, torch.empty(0, k, dtype=torch.bfloat16), weight)
        args.m, args.n, args.k = 0, n, k
        args.group_size = group_size if group_size > 0 else k
        twin.check(twin.library().qk_cuda_dequantize(ctypes.byref(args), None))
        assert same_bits(weight, layer.weight(torch.bfloat16))
