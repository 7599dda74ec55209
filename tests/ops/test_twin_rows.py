"""The CUDA kernels that quantize rows, alone and fused, run by the host twin."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import c_abi
import pytest
import torch
import twin
from ops_cases import activations, relative_error, same_bits
from torch import Tensor

from quantkit.ops import reference, reference_parts

DTYPES = [torch.bfloat16, torch.float16]
#: name -> (format, group, the oracle of rows that are given)
QUANTIZERS: dict[str, tuple[int, int, Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "int8": (c_abi.I8, -1, reference.quantize_int8_per_token),
    "fp8": (c_abi.F8, -1, reference.quantize_fp8_per_token),
    "fp8-128": (c_abi.F8, 128, reference.quantize_fp8_per_block),
}


class Codes:
    """Poisoned codes [m, k] and scales, each between guards that must stay."""

    def __init__(self, quantizer: str, m: int, k: int, dtype: torch.dtype) -> None:
        self.format, group, _ = QUANTIZERS[quantizer]
        self.group = k if group < 0 else group
        self.whole = torch.full((m * k + 32,), 0x5A, dtype=torch.uint8)
        self.scales = torch.full((m, -(-k // self.group)), torch.nan, dtype=dtype)
        code = torch.int8 if self.format == c_abi.I8 else torch.float8_e4m3fn
        self.codes = self.whole[16:-16].view(code).reshape(m, k)
        self.outputs = (self.whole, self.scales)

    def args(self, k: int, **rest: int) -> c_abi.QuantizeArgs:
        dtype = c_abi.DTYPES[self.scales.dtype]
        common = {"x_dtype": dtype, "format": self.format, "k": k, "group_size": self.group}
        outputs = {"scale": self.scales.data_ptr(), "q": self.codes.data_ptr()}
        return c_abi.QuantizeArgs(**(common | outputs | {"arith_dtype": dtype} | rest))

    def check(self, expected: tuple[Tensor, Tensor]) -> None:
        assert (self.whole[:16] == 0x5A).all()
        assert (self.whole[-16:] == 0x5A).all()
        assert same_bits(self.scales, expected[1].reshape(self.scales.shape))
        assert same_bits(self.codes, expected[0])


def quantize(quantizer: str, x: Tensor) -> Codes:
    (m, k), out = x.shape, Codes(quantizer, *x.shape, x.dtype)
    twin.watch(x, outputs=out.outputs)
    args = out.args(k, x=x.data_ptr(), ldx=x.stride(0), m=m)
    twin.check(twin.library().qk_cuda_quantize(ctypes.byref(args), None))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_codes_and_scales_have_the_bits_of_the_reference(
    quantizer: str, dtype: torch.dtype
) -> None:
    # Fewer columns than a vector, tails, fewer and more than a thread each, whole and part groups.
    for k in (1, 7, 8, 130, 256, 1016, 4352):
        x = activations(dtype, k, k=max(k, 8)).flatten(0, 1)[:, :k].contiguous()
        quantize(quantizer, x).check(QUANTIZERS[quantizer][2](x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_with_the_reciprocal_rounds_to_the_quotient(dtype: torch.dtype) -> None:
    """What the kernels divide by multiplication with, for every pair of significands."""
    ones = round(1 / torch.finfo(dtype).eps)
    numbers = torch.arange(ones, 2 * ones, dtype=torch.float32)
    product = numbers * (1 / numbers)[:, None]
    assert same_bits(product.to(dtype), (numbers / numbers[:, None]).to(dtype))


@pytest.mark.parametrize("scale", [1e-38, 1e-31, 1e-30, 1e30, 1e31, 3e36])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_scales_whose_reciprocal_is_no_float_or_hardly(quantizer: str, scale: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(4, 256) * scale).bfloat16()
    quantize(quantizer, x).check(QUANTIZERS[quantizer][2](x))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_strided_and_unaligned_rows(quantizer: str) -> None:
    wide = activations(torch.bfloat16, 3, k=400).flatten(0, 1)
    for x in (wide[:, :192], wide[:, 3:195], wide[::2, 8:200], wide[1:, 1:130]):
        quantize(quantizer, x).check(QUANTIZERS[quantizer][2](x))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("quantizer", ["int8", "fp8"])
def test_a_given_scale(quantizer: str, scale_dtype: torch.dtype) -> None:
    x = activations(torch.bfloat16, 11, k=72).flatten(0, 1)
    scale = torch.tensor([0.037], dtype=scale_dtype)
    out = Codes(quantizer, *x.shape, x.dtype)
    twin.watch(x, scale, outputs=(out.whole,))
    given = {"scale_given": 1, "scale": scale.data_ptr(), "arith_dtype": c_abi.DTYPES[scale_dtype]}
    args = out.args(72, x=x.data_ptr(), ldx=72, m=len(x), **given)
    twin.check(twin.library().qk_cuda_quantize(ctypes.byref(args), None))
    oracle = {"int8": reference.quantize_int8_static, "fp8": reference.quantize_fp8_static}
    assert same_bits(out.codes, oracle[quantizer](x, scale))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_no_number_shows_in_the_scale_of_its_row_only(quantizer: str) -> None:
    x = torch.randn(4, 256).half()
    clean = quantize(quantizer, x)
    x[1, 3], x[2, 200] = torch.nan, -torch.inf
    out = quantize(quantizer, x)
    assert out.scales[1].isnan().any()
    assert out.scales[2].isinf().any()
    for given, expected in ((out.scales, clean.scales), (out.codes, clean.codes)):
        assert same_bits(given[[0, 3]], expected[[0, 3]])


def add_rms_norm(
    residual: Tensor, branch: Tensor | None, weight: Tensor, dtype: torch.dtype, quantizer: str = ""
) -> Tensor | Codes:
    """The norm [m, n] between guard columns, or its codes."""
    m, n = residual.shape
    whole = torch.full((m, n + 16), torch.nan, dtype=dtype)
    y = whole[:, 8 : n + 8]
    codes = Codes(quantizer, m, n, dtype) if quantizer else None
    outputs = (residual, whole) if codes is None else (residual, *codes.outputs)
    twin.watch(branch, weight, outputs=outputs)
    args = c_abi.AddRmsNormArgs(
        m=m,
        n=n,
        residual=residual.data_ptr(),
        ld_residual=residual.stride(0),
        branch=None if branch is None else branch.data_ptr(),
        ld_branch=0 if branch is None else branch.stride(0),
        branch_dtype=0 if branch is None else c_abi.DTYPES[branch.dtype],
        weight=weight.data_ptr(),
        epsilon=1e-5,
        y_dtype=c_abi.DTYPES[dtype],
        y=y.data_ptr(),
        ldy=whole.stride(0),
    )
    sink = None if codes is None else ctypes.byref(codes.args(n))
    twin.check(twin.library().qk_cuda_add_rms_norm(ctypes.byref(args), sink, None))
    if codes is not None:
        return codes
    assert whole[:, :8].isnan().all()
    assert whole[:, n + 8 :].isnan().all()
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("branch_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_norm_matches_the_oracle_and_its_codes_the_norm(
    dtype: torch.dtype, branch_dtype: torch.dtype | None
) -> None:
    torch.manual_seed(0)
    for n in (1, 40, 131, 2304, 4480):
        before, weight = torch.randn(3, n) * 4, torch.randn(n)
        branch = None if branch_dtype is None else torch.randn(3, n + 8).to(branch_dtype)[:, :n]
        residual = before.clone()
        y = add_rms_norm(residual, branch, weight, dtype)
        assert isinstance(y, Tensor)
        assert same_bits(residual, before if branch is None else before + branch)
        exact = reference_parts.add_rms_norm(
            residual.double(), None, weight.double(), 1e-5, torch.float64
        )
        # Half a unit in the last place, and fp32 noise.
        unit = torch.finfo(dtype).eps / 2
        assert ((y.double() - exact).abs() <= exact.abs() * unit * 1.01 + 1e-7).all(), n
        for quantizer in QUANTIZERS:
            again = before.clone()
            codes = add_rms_norm(again, branch, weight, dtype, quantizer)
            assert isinstance(codes, Codes)
            assert same_bits(again, residual)
            codes.check(QUANTIZERS[quantizer][2](y.contiguous()))


def gated_activation(gate_up: Tensor, gate: int, quantizer: str = "") -> Tensor | Codes:
    m, n = gate_up.shape[0], gate_up.shape[1] // 2
    whole = torch.full((m, n + 16), torch.nan, dtype=gate_up.dtype)
    y = whole[:, 8 : n + 8]
    codes = Codes(quantizer, m, n, gate_up.dtype) if quantizer else None
    twin.watch(gate_up, outputs=(whole,) if codes is None else codes.outputs)
    args = c_abi.GateArgs(
        kind=gate,
        m=m,
        n=n,
        x=gate_up.data_ptr(),
        ldx=gate_up.stride(0),
        dtype=c_abi.DTYPES[gate_up.dtype],
        y=y.data_ptr(),
        ldy=whole.stride(0),
    )
    sink = None if codes is None else ctypes.byref(codes.args(n))
    twin.check(twin.library().qk_cuda_gated_activation(ctypes.byref(args), sink, None))
    if codes is not None:
        return codes
    assert whole[:, :8].isnan().all()
    assert whole[:, n + 8 :].isnan().all()
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [0, 1], ids=["silu", "gelu_tanh"])
def test_gate_matches_the_oracle_and_its_codes_the_gate(dtype: torch.dtype, gate: int) -> None:
    torch.manual_seed(gate)
    for n in (1, 40, 131, 4480):
        x = (torch.randn(3, 2 * n + 8) * 3).to(dtype)[:, : 2 * n]
        y = gated_activation(x, gate)
        assert isinstance(y, Tensor)
        exact = reference_parts.gated_activation(x.double(), gate)
        # GELU by tanh cancels for large negative gates: that error is absolute.
        unit, noise = torch.finfo(dtype).eps / 2, 2e-6 * x.abs().max() ** 2
        assert ((y.double() - exact).abs() <= exact.abs() * unit * 1.01 + noise).all(), n
        assert relative_error(y, exact) < unit
        for quantizer in QUANTIZERS:
            codes = gated_activation(x, gate, quantizer)
            assert isinstance(codes, Codes)
            codes.check(QUANTIZERS[quantizer][2](y.contiguous()))


def test_what_has_no_kernel_is_refused() -> None:
    library = twin.library()
    codes = Codes("fp8-128", 1, 256, torch.bfloat16)
    for wrong in ({"format": c_abi.I8}, {"group_size": 64}, {"x_dtype": 0}, {"k": 49153}):
        args = codes.args(256)
        args.m = 1
        for field, value in wrong.items():
            setattr(args, field, value)
        assert library.qk_cuda_quantize(ctypes.byref(args), None) == twin.UNSUPPORTED, wrong
    norm = c_abi.AddRmsNormArgs(m=1, n=24577, y_dtype=c_abi.DTYPES[torch.bfloat16])
    assert library.qk_cuda_add_rms_norm(ctypes.byref(norm), None, None) == twin.UNSUPPORTED
