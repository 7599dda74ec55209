"""float_linear, and the C ABI's bf16 scales: weights and tables that are floats."""

from __future__ import annotations

import c_abi
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import CODEBOOKS, FORMATS, random_layer, relative_error, same_bits
from torch import Tensor
from torch.nn.functional import linear

from quantkit import ops
from quantkit.ops import reference

ROWS = [*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129]
X_DTYPES = [torch.bfloat16, torch.float16, torch.float32]
W_DTYPES = [torch.bfloat16, torch.float32]


def exact_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ weight.double().t()
    return y if bias is None else y + bias.double()


# ---- packing ---------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 150),
    k=st.integers(1, 90),
    dtype=st.sampled_from(W_DTYPES),
    seed=st.integers(0, 2**31),
)
def test_packing_is_exact_both_ways_and_matches_the_reference(
    n: int, k: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Any bits at all: NaNs with payloads, infinities, subnormals.
    bits = torch.randint(-(2**31), 2**31, (n, k), generator=generator)
    values = bits.to(torch.int32 if dtype == torch.float32 else torch.int16).view(dtype)
    packed = ops.pack_float(values)
    assert packed.dtype == dtype
    assert same_bits(packed, reference.pack_float(values))
    assert same_bits(ops.unpack_float(packed, n, k), values)


def test_layout_value_by_value() -> None:
    values = torch.zeros(17, 3)
    values[2] = torch.tensor([1.0, -2.0, 3.0])
    values[16, 2] = 5.0
    packed = ops.pack_float(values)
    assert packed.shape == (2, 3, 16)
    chunks = packed.reshape(3, 2, 16)  # chunks of the two blocks alternate
    assert chunks[:, 0, 2].tolist() == [1, -2, 3]
    assert chunks[:, 1, 0].tolist() == [0, 0, 5]
    packed = ops.pack_float(values.bfloat16())
    assert packed.shape == (2, 2, 32)
    chunks = packed.reshape(2, 2, 32)
    assert chunks[:, 0, 4:6].tolist() == [[1, -2], [3, 0]]
    assert chunks[:, 1, :2].tolist() == [[0, 0], [5, 0]]
    assert int(packed.count_nonzero()) == 4


def test_packing_takes_any_strides() -> None:
    values = torch.randn(40, 24)
    for view in (values.t(), values[::2, ::3], values[:, 3:20], values[:1, :1]):
        assert same_bits(ops.pack_float(view), ops.pack_float(view.contiguous()))


# ---- products --------------------------------------------------------------------------------


@pytest.mark.parametrize("w_dtype", W_DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", X_DTYPES, ids=str)
def test_matches_the_oracle(isa: str, x_dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for n, k, with_bias in [(96, 416, False), (33, 1231, True)]:
        weight = torch.randn(n, k).to(w_dtype)
        packed = ops.pack_float(weight)
        bias = torch.randn(n).to(x_dtype) if with_bias else None
        for m in (1, 2, 5, 19, 70):
            x = torch.randn(m, k).to(x_dtype)
            exact = exact_product(x, weight, bias)
            y = ops.float_linear(x, packed, bias, n)
            assert y.dtype == x_dtype
            # At most twice the error of torch, which rounds the result to the same dtype.
            peer = linear(x.float(), weight.float(), None if bias is None else bias.float())
            allowed = 2 * relative_error(peer.to(x_dtype), exact) + 2e-6
            assert relative_error(y, exact) <= allowed, (n, k, m)
            for oracle in (x, x.double()):
                y = reference.float_linear(oracle, packed, bias, n)
                assert relative_error(y, exact) <= (allowed if oracle is x else 1e-14)


@pytest.mark.parametrize("w_dtype", W_DTYPES, ids=str)
def test_rows_have_the_same_bits_whatever_m_is(isa: str, w_dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for x_dtype, k in [(torch.bfloat16, 640), (torch.float32, 603)]:
        packed = ops.pack_float(torch.randn(75, k).to(w_dtype))
        x = torch.randn(300, k).to(x_dtype)
        y = ops.float_linear(x, packed, None, 75)
        for m in ROWS:
            assert same_bits(ops.float_linear(x[:m], packed, None, 75), y[:m]), m
            assert same_bits(ops.float_linear(x[300 - m :], packed, None, 75), y[300 - m :]), m


@pytest.mark.parametrize("w_dtype", W_DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 47, 63, 64, 65, 130])
def test_tails_of_n_and_k(isa: str, w_dtype: torch.dtype, n: int) -> None:
    torch.manual_seed(n)
    for k in (1, 2, 3, 5, 8, 15, 17, 63, 65, 100):
        # Whole numbers: every order of summation gives the same bits.
        weight = torch.randint(-8, 9, (n, k)).to(w_dtype)
        packed = ops.pack_float(weight)
        for m in (1, 2, 9):
            for x_dtype in (torch.float32, torch.bfloat16):
                x = torch.randint(-8, 9, (m, k)).to(x_dtype)
                # The allocator hands freed memory out again: an unwritten output would show.
                del [torch.full((m, n), torch.nan) for _ in range(3)][:]
                y = ops.float_linear(x, packed, None, n)
                assert torch.equal(y, exact_product(x, weight).to(x_dtype)), (k, m)


def test_every_bf16_value_is_multiplied_exactly(isa: str) -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = bits[bits.isfinite() & ((bits == 0) | (bits.abs() >= 2.0**-126))]
    weight = torch.zeros(values.numel(), 4, dtype=torch.bfloat16)
    weight[:, 1] = values
    packed = ops.pack_float(weight)
    for x_dtype in (torch.bfloat16, torch.float32):
        for m in (1, 20):
            x = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=x_dtype).repeat(m, 1)
            y = ops.float_linear(x, packed, None, values.numel())
            assert torch.equal(y.float(), values.float().expand(m, -1))


def test_nan_and_inf_reach_their_own_row_or_column_only(isa: str) -> None:
    torch.manual_seed(3)
    for m in (1, 40):
        for w_dtype in W_DTYPES:
            weight = torch.randn(40, 130).to(w_dtype)
            packed = ops.pack_float(weight)
            for x_dtype in X_DTYPES:
                x = torch.randn(m + 2, 130).to(x_dtype)
                clean = ops.float_linear(x, packed, None, 40)
                poisoned = x.clone()
                poisoned[0, 5], poisoned[1, 7] = torch.nan, torch.inf
                y = ops.float_linear(poisoned, packed, None, 40)
                assert bool(y[0].isnan().all())
                assert not bool(y[1].isfinite().any())
                assert same_bits(y[2:], clean[2:])
                spoiled = weight.clone()
                spoiled[3, 9] = torch.nan
                y = ops.float_linear(x, ops.pack_float(spoiled), None, 40)
                assert bool(y[:, 3].isnan().all())
                others = [i for i in range(40) if i != 3]
                assert same_bits(y[:, others], clean[:, others])


def test_outliers_keep_their_small_neighbours(isa: str) -> None:
    torch.manual_seed(4)
    weight = torch.randn(48, 256)
    x = torch.randn(4, 256)
    x[:, 17] = 1e4
    y = ops.float_linear(x, ops.pack_float(weight), None, 48)
    assert relative_error(y, exact_product(x, weight)) < 1e-6


def test_strided_batched_and_empty_inputs(isa: str) -> None:
    torch.manual_seed(5)
    packed = ops.pack_float(torch.randn(48, 96).bfloat16())
    wide = torch.randn(5, 7, 200).bfloat16()
    views = [
        wide[..., :96],
        wide[:, ::2, 3:99],
        wide.transpose(0, 1)[..., 100:196],
        wide[..., ::2][..., :96],
        wide[0, 0, :96],
        wide[:, :1, :96].expand(5, 4, 96),
        wide[:0, :, :96],
    ]
    for x in views:
        y = ops.float_linear(x, packed, None, 48)
        assert y.shape == (*x.shape[:-1], 48)
        assert y.is_contiguous()
        assert same_bits(y, ops.float_linear(x.contiguous(), packed, None, 48))
    (moved,) = ops.consolidate([packed])
    assert same_bits(
        ops.float_linear(wide[0, :, :96], moved, None, 48)[0],
        ops.float_linear(views[4], packed, None, 48),
    )


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(6)
    packed = ops.pack_float(torch.randn(333, 320).bfloat16())
    for m in (1, 7, 300):
        x = torch.randn(m, 320).bfloat16()
        ops.set_num_threads(1)
        expected = ops.float_linear(x, packed, None, 333)
        for threads in (2, 3, 7):
            ops.set_num_threads(threads)
            assert same_bits(ops.float_linear(x, packed, None, 333), expected)


def test_errors_name_value_rule_and_remedy() -> None:
    x, packed = torch.randn(2, 64), ops.pack_float(torch.randn(20, 64))
    cases = [
        ((x, packed.to(torch.uint8), None, 20), r"has dtype Byte, must be bfloat16 or float32; ma"),
        ((x, packed, None, 40), r"packed weight has shape \[2, 64, 16\], must be .* \[3, 64, 16\]"),
        ((x[:, :60], packed, None, 20), r"for N = 20 and K = 60; make it with .*pack_float"),
        ((x.double(), packed, None, 20), r"x has dtype Double, must be float32, float16"),
        ((x, packed, torch.randn(3), 20), r"bias has shape \[3\], must be \[N\] = \[20\]"),
        ((x, packed, None, 0), r"K = 64 and N = 0 must be positive"),
    ]
    for arguments, message in cases:
        with pytest.raises(RuntimeError, match=message):
            ops.float_linear(*arguments)
    with pytest.raises(RuntimeError, match="values have dtype Half, must be bfloat16 or float32"):
        ops.pack_float(torch.randn(2, 3).half())
    with pytest.raises(RuntimeError, match=r"values have shape \[3\], must be \[N, K\]"):
        ops.pack_float(torch.randn(3))


# ---- bf16 scales, gaps between rows: by the C ABI ------------------------------------------


@pytest.mark.parametrize("format", [*FORMATS, "bfloat16", "float32"])
@pytest.mark.parametrize("x_dtype", X_DTYPES, ids=str)
def test_bf16_scales_give_the_bits_of_the_same_fp32_scales(
    isa: str, format: str, x_dtype: torch.dtype
) -> None:
    torch.manual_seed(7)
    numbers = {"int8": c_abi.I8, "fp8": c_abi.F8, "bfloat16": c_abi.B16, "float32": c_abi.F32W}
    for m, n, k, group in [(1, 21, 80, 32), (6, 64, 128, 64), (40, 33, 100, -1)]:
        layer = random_layer(format if format in FORMATS else "int8", n, k, group, zero=True)
        packed = layer.packed
        if format not in FORMATS:
            packed = ops.pack_float(torch.randn(n, k).to(getattr(torch, format)))
        x = torch.randn(m, k).to(x_dtype)
        lut = CODEBOOKS.get(format)
        half = layer.scale.bfloat16()
        fast = half.t().contiguous().t()
        results = []
        for scale in (half.float(), half, fast):
            out = torch.full((m + 2, n + 5), torch.nan, dtype=x_dtype)
            y = out[1:-1, 2 : n + 2]
            number = numbers.get(format, c_abi.W4)
            status = c_abi.weight_only(x, number, packed, lut, scale, layer.zero, group, y)
            assert status == c_abi.OK
            assert int(out.isnan().sum()) == out.numel() - y.numel()
            results.append(y.clone())
        assert same_bits(results[1], results[0])
        assert same_bits(results[2], results[0])
        if format not in FORMATS:
            values = ops.unpack_float(packed, n, k).double()
        else:
            kernels = reference.unpack_w4 if lut is not None else reference.unpack_w8
            if lut is not None:
                values = lut[kernels(packed, n, k).long()].double()
            else:
                values = kernels(packed, n, k, format).double()
        columns = torch.arange(k) // (k if group == -1 else group)
        weight = (values - layer.zero.double()[:, columns]) * half.double()[:, columns]
        exact = x.double() @ weight.t()
        terms = (
            x.double().abs()
            @ (
                (values.abs() + layer.zero.double().abs()[:, columns]) * half.double()[:, columns]
            ).t()
        )
        step = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-19}[x_dtype]
        assert bool(((results[0].double() - exact).abs() <= step * terms + 1e-6).all())
