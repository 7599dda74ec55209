"""The CUDA kernel of Hadamard products, alone and fused, run by the host twin."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import c_abi
import pytest
import torch
import twin
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import same_bits
from torch import Tensor

from quantkit.hadamard import base_order, factor, multiply
from quantkit.ops import get_backend, pack_hadamard, reference, unpack_hadamard

DTYPES = [torch.bfloat16, torch.float16]
#: name -> (format, group, the oracle of rows that are given)
QUANTIZERS: dict[str, tuple[int, int, Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "int8": (c_abi.I8, -1, reference.quantize_int8_per_token),
    "fp8": (c_abi.F8, -1, reference.quantize_fp8_per_token),
    "fp8-128": (c_abi.F8, 128, reference.quantize_fp8_per_block),
}
#: (columns, order): one matrix and several, of fewer runs than a warp takes, as many and more; B of
#: less than a fragment, of one, two, three, five and more, and of several words of signs.
SIZES = [
    *[(1, 1), (3, 1), (6, 2), (4, 4), (16, 8), (16, 16), (48, 16), (80, 16), (40, 20), (36, 36)],
    *[(12, 12), (24, 24), (96, 96), (384, 192), (256, 256), (768, 256), (1536, 1536), (896, 896)],
    *[(76, 76), (304, 152), (1216, 1216), (560, 280), (432, 432), (2048, 2048), (4480, 2240)],
]


def half_step(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def allowed(x: Tensor, exact: Tensor, order: int, dtype: torch.dtype) -> Tensor:
    """One rounding to the dtype, and fp32's along the way: of the size of a matrix's rows."""
    length = x.double().unflatten(-1, (-1, order)).norm(dim=-1, keepdim=True)
    slack = length.expand(*length.shape[:-1], order).reshape(exact.shape)
    return half_step(dtype) * exact.abs() + 1e-6 * slack + 2.0**-25


class Codes:
    """Poisoned codes [m, n] between guards, and scales."""

    def __init__(self, quantizer: str, m: int, n: int, dtype: torch.dtype) -> None:
        self.format, group, self.oracle = QUANTIZERS[quantizer]
        self.group = n if group < 0 or group > n else group
        self.whole = torch.full((m * n + 32,), 0x5A, dtype=torch.uint8)
        self.scales = torch.full((m, -(-n // self.group)), torch.nan, dtype=dtype)
        code = torch.int8 if self.format == c_abi.I8 else torch.float8_e4m3fn
        self.codes = self.whole[16:-16].view(code).reshape(m, n)

    def args(self, **rest: int) -> c_abi.QuantizeArgs:
        dtype = c_abi.DTYPES[self.scales.dtype]
        outputs = {"scale": self.scales.data_ptr(), "q": self.codes.data_ptr()}
        common = {"format": self.format, "group_size": self.group, "arith_dtype": dtype}
        return c_abi.QuantizeArgs(**(common | outputs | rest))

    def check(self, values: Tensor) -> None:
        """The codes of these values, and nothing beside them."""
        codes, scales = self.oracle(values)
        assert (self.whole[:16] == 0x5A).all()
        assert (self.whole[-16:] == 0x5A).all()
        assert same_bits(self.scales, scales.reshape(self.scales.shape))
        assert same_bits(self.codes, codes)


def arguments(x: Tensor, order: int, gate: int | None, signs: Tensor) -> c_abi.HadamardArgs:
    return c_abi.HadamardArgs(
        order=order,
        base=factor(order).shape[0],
        signs=signs.data_ptr(),
        gated=gate is not None,
        gate=gate or 0,
        m=x.shape[0],
        n=x.shape[1] // (1 if gate is None else 2),
        x=x.data_ptr(),
        ldx=x.stride(0),
        dtype=c_abi.DTYPES[x.dtype],
    )


def turned(x: Tensor, order: int, gate: int | None = None) -> Tensor:
    """The product [m, n], between guard columns that must stay."""
    signs = pack_hadamard(factor(order))
    args = arguments(x, order, gate, signs)
    whole = torch.full((args.m, args.n + 16), torch.nan, dtype=x.dtype)
    y = whole[:, 8 : args.n + 8]
    args.y, args.ldy = y.data_ptr(), whole.stride(0)
    twin.watch(x, signs, outputs=(whole,))
    twin.check(twin.library().qk_cuda_hadamard(ctypes.byref(args), None, None))
    assert whole[:, :8].isnan().all()
    assert whole[:, args.n + 8 :].isnan().all()
    return y.contiguous()


def quantized(x: Tensor, order: int, quantizer: str, gate: int | None = None) -> Codes:
    signs = pack_hadamard(factor(order))
    args = arguments(x, order, gate, signs)
    codes = Codes(quantizer, args.m, args.n, x.dtype)
    twin.watch(x, signs, outputs=(codes.whole, codes.scales))
    sink = codes.args()
    twin.check(twin.library().qk_cuda_hadamard(ctypes.byref(args), ctypes.byref(sink), None))
    return codes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "order"), SIZES, ids=str)
def test_it_is_the_literal_product_and_its_codes_are_the_products(
    n: int, order: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(n)
    x = torch.randn(2, n).to(dtype)
    x[0, n // 2] *= 100
    exact = multiply(x.double(), order)
    y = turned(x, order)
    assert bool(((y.double() - exact).abs() <= allowed(x, exact, order, dtype)).all())
    for quantizer in QUANTIZERS:
        quantized(x, order, quantizer).check(y)


#: S of 1 to 6 stages beyond a warp's runs, of 4 tiles, 2 and 1.
LONG = [768, 3072, 8192, 4864, 3200, 12288, 14336, 24576]


@pytest.mark.parametrize("n", LONG)
def test_long_rows(n: int) -> None:
    torch.manual_seed(n)
    x = torch.randn(1, n).bfloat16()
    y, exact = turned(x, n), multiply(x.double(), n)
    assert bool(((y.double() - exact).abs() <= allowed(x, exact, n, x.dtype)).all())
    quantized(x, n, "int8").check(y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [0, 1], ids=["silu", "gelu_tanh"])
@pytest.mark.parametrize(("n", "order"), [(96, 48), (896, 896), (768, 256), (304, 152)], ids=str)
def test_behind_the_gate(n: int, order: int, gate: int, dtype: torch.dtype) -> None:
    """To the bit what the gate's own kernel rounds, turned."""
    torch.manual_seed(gate)
    gate_up = (torch.randn(2, 2 * n + 8) * 2).to(dtype)[:, : 2 * n]
    row = torch.empty(2, n, dtype=dtype)
    twin.watch(gate_up, outputs=(row,))
    args = c_abi.GateArgs(
        kind=gate, m=2, n=n, x=gate_up.data_ptr(), ldx=gate_up.stride(0),
        dtype=c_abi.DTYPES[dtype], y=row.data_ptr(), ldy=n,
    )  # fmt: skip
    twin.check(twin.library().qk_cuda_gated_activation(ctypes.byref(args), None, None))
    y = turned(gate_up, order, gate)
    assert same_bits(y, turned(row, order))
    for quantizer in QUANTIZERS:
        quantized(gate_up, order, quantizer, gate).check(y)


@settings(max_examples=25, deadline=None)
@given(
    base=st.sampled_from([1, 12, 20, 28, 36, 76, 140]),
    doublings=st.integers(0, 6),
    matrices=st.integers(1, 3),
    rows=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    quantizer=st.sampled_from(sorted(QUANTIZERS)),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_any_order_is_linear_and_keeps_lengths(
    base: int,
    doublings: int,
    matrices: int,
    rows: int,
    dtype: torch.dtype,
    quantizer: str,
    scale: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    order = min(base << doublings, 2240)
    order = order if base_order(order) else base
    x = (torch.randn(rows, matrices * order) * scale).to(dtype)
    x[:, seed % x.shape[1]] *= 16
    y, exact = turned(x, order), multiply(x.double(), order)
    assert bool(((y.double() - exact).abs() <= allowed(x, exact, order, dtype)).all())
    loss = half_step(dtype) + 1e-5
    lengths = x.double().norm(dim=-1)
    assert bool(((y.double().norm(dim=-1) - lengths).abs() <= loss * lengths + 1e-6).all())
    # Powers of two scale every rounding with them, as long as nothing is subnormal. A sum that is 0
    # is +0 either way.
    if dtype == torch.bfloat16:
        assert torch.equal(turned(-4 * x, order), -4 * y)
    quantized(x, order, quantizer).check(y)


def test_orders_of_blocks_and_threads_change_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 1792).bfloat16()
    y, codes = turned(x, 896), quantized(x, 896, "int8")
    for seed in (1, 2):
        twin.library().qk_twin_shuffle(seed)
        try:
            assert same_bits(turned(x, 896), y)
            assert same_bits(quantized(x, 896, "int8").whole, codes.whole)
        finally:
            twin.library().qk_twin_shuffle(0)
    for m in (1, 2):
        assert same_bits(turned(x[:m], 896), y[:m])


@pytest.mark.parametrize("order", [2, 48, 56])
def test_strided_and_unaligned_rows(order: int) -> None:
    torch.manual_seed(order)
    wide = torch.randn(4, 3 * order + 12).bfloat16()
    n = 2 * order
    for x in (wide[:, :n], wide[:, 3 : n + 3], wide[::2, 8 : n + 8], wide[1:, 1 : n + 1]):
        same = x.contiguous()
        assert same_bits(turned(x, order), turned(same, order))
        assert same_bits(quantized(x, order, "fp8").whole, quantized(same, order, "fp8").whole)


def test_no_number_stays_in_its_matrix_and_its_token() -> None:
    torch.manual_seed(2)
    x = torch.randn(4, 96).half()
    clean, codes = turned(x, 48), quantized(x, 48, "int8")
    x[1, 3], x[2, 95] = torch.nan, torch.inf
    y, spoiled = turned(x, 48), quantized(x, 48, "int8")
    assert y[1, :48].isnan().all()
    assert not y[2, 48:].isfinite().any()
    kept = torch.ones(4, 96, dtype=torch.bool)
    kept[1, :48] = kept[2, 48:] = False
    assert same_bits(y[kept], clean[kept])
    assert not spoiled.scales[1:3].isfinite().any()
    assert same_bits(spoiled.scales[[0, 3]], codes.scales[[0, 3]])
    assert same_bits(spoiled.codes[[0, 3]], codes.codes[[0, 3]])


@pytest.mark.parametrize("quantizer", ["int8", "fp8"])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_given_scale(scale_dtype: torch.dtype, quantizer: str) -> None:
    torch.manual_seed(3)
    x, scale = torch.randn(3, 224).bfloat16(), torch.tensor([0.037], dtype=scale_dtype)
    signs, codes = pack_hadamard(factor(224)), Codes(quantizer, 3, 224, x.dtype)
    args = arguments(x, 224, None, signs)
    told = {"scale_given": 1, "arith_dtype": c_abi.DTYPES[scale_dtype]}
    sink = codes.args(scale=scale.data_ptr(), **told)
    twin.watch(x, signs, scale, outputs=(codes.whole,))
    twin.check(twin.library().qk_cuda_hadamard(ctypes.byref(args), ctypes.byref(sink), None))
    oracle = {"int8": reference.quantize_int8_static, "fp8": reference.quantize_fp8_static}
    assert same_bits(codes.codes, oracle[quantizer](turned(x, 224), scale))


@pytest.mark.parametrize("order", [1, 2, 8, 16, 12, 28, 36, 76, 148, 432])
def test_signs_come_back_as_they_were(order: int) -> None:
    found = factor(order)
    base = len(found)
    signs = pack_hadamard(found)
    assert signs.dtype == torch.int32
    assert signs.shape == (-(-base // 16), -(-base // 64), 32)
    torch.testing.assert_close(unpack_hadamard(signs, base) / math.sqrt(order), found[:, :base])
    # The formula of the C header, for some elements.
    for b, c in ((0, 0), (base // 2, base - 1), (base - 1, base // 3)):
        word = int(signs[c // 16, b // 64, c % 8 * 4 + b % 16 // 4])
        f, r, e = b // 16 % 4, 2 * (b % 4 // 2) + c % 16 // 8, b % 2
        assert bool(word >> (16 * e + 15 - 4 * f - r) & 1) == bool(found[b, c] < 0)


def test_other_factors_have_no_signs() -> None:
    for wrong in (
        torch.tensor([[1.0, 0.5], [0.5, 1.0]]),
        torch.ones(4, 3),
        torch.full((2, 2), torch.nan),
    ):
        with pytest.raises(ValueError, match=r"no multiple of a matrix of 1 and -1"):
            pack_hadamard(wrong)


def test_the_reference_is_the_product() -> None:
    x = torch.randn(2, 112, dtype=torch.float64)
    signs = pack_hadamard(factor(56))
    y = get_backend("reference").hadamard_mma(x, signs, 28, 56)
    torch.testing.assert_close(y, multiply(x, 56), rtol=1e-6, atol=1e-6)


def test_what_has_no_kernel_is_refused() -> None:
    library, x = twin.library(), torch.zeros(1, 96, dtype=torch.bfloat16)
    signs = pack_hadamard(factor(48))
    refused = {
        twin.UNSUPPORTED: [{"dtype": 0}, {"n": 58128}, {"gated": 1, "gate": 7}],
        twin.INVALID_ARGUMENT: [
            *[{"n": 0}, {"n": 72}, {"m": -1}, {"signs": None}, {"order": 36}, {"order": 0}],
            *[{"base": 0}, {"base": 513, "order": 513, "n": 513}],
        ],
    }
    for status, cases in refused.items():
        for wrong in cases:
            args = arguments(x, 48, None, signs)
            for field, value in wrong.items():
                setattr(args, field, value)
            assert library.qk_cuda_hadamard(ctypes.byref(args), None, None) == status, wrong
    args = arguments(x, 48, None, signs)
    args.m = 0
    assert library.qk_cuda_hadamard(ctypes.byref(args), None, None) == twin.OK
    for wrong in ({"format": c_abi.I8, "group_size": 64}, {"format": 0}):
        sink = Codes("fp8", 1, 96, x.dtype).args(**wrong)
        status = library.qk_cuda_hadamard(ctypes.byref(args), ctypes.byref(sink), None)
        assert status == twin.UNSUPPORTED, wrong
