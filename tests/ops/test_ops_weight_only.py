"""w4_linear and w8_linear against the fp64 oracle, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import (
    CODEBOOKS,
    FORMATS,
    allowed_error,
    random_layer,
    relative_error,
    same_bits,
)

from quantkit import ops

ROWS = [*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, -1])
def test_matches_the_oracle(isa: str, format: str, dtype: torch.dtype, group_size: int) -> None:
    torch.manual_seed(0)
    # K is no multiple of 64, 96 or 128: a short last group wherever the format has groups.
    for n, k, zero in [(96, 416, False), (33, 232, True)]:
        layer = random_layer(format, n, k, group_size, zero=zero, bias=zero)
        for m in (1, 5, 19):
            x = torch.randn(m, k).to(dtype)
            exact = layer(x.double(), "reference")
            y = layer(x)
            assert y.dtype == dtype
            error = relative_error(y, exact)
            assert error <= allowed_error(layer, x, exact), (n, k, zero, m, error)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_have_the_same_bits_whatever_m_is(isa: str, format: str) -> None:
    torch.manual_seed(1)
    for dtype, group_size, k in [(torch.bfloat16, 64, 640), (torch.float32, -1, 603)]:
        layer = random_layer(format, 75, k, group_size, zero=True)
        x = torch.randn(300, k).to(dtype)
        y = layer(x)
        for m in ROWS:
            assert same_bits(layer(x[:m]), y[:m]), m
            assert same_bits(layer(x[300 - m :]), y[300 - m :]), m


@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 47, 63, 64, 65, 130])
def test_tails_of_n_and_k(isa: str, format: str, n: int) -> None:
    torch.manual_seed(n)
    for k in (1, 2, 3, 5, 8, 15, 17, 63, 65, 100):
        layer = random_layer(format, n, k, -1, bias=True)
        for m in (1, 2, 9):
            x = torch.randn(m, k)
            # The allocator hands freed memory out again: an output left unwritten would show.
            del [torch.full((m, n), torch.nan) for _ in range(3)][:]
            y = layer(x)
            exact = layer(x.double(), "reference")
            assert relative_error(y, exact) < 1e-5, (k, m)


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 80),
    k=st.integers(1, 300),
    group=st.sampled_from([16, 32, 48, 80, 128, -1]),
    format=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES),
    zero=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_matches_the_oracle(
    m: int, n: int, k: int, group: int, format: str, dtype: torch.dtype, zero: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = random_layer(format, n, k, group, zero=zero)
    x = torch.randn(m, k).to(dtype)
    exact = layer(x.double(), "reference")
    # Against the scale of a sum's terms: a sum that cancels has no relative accuracy to keep.
    terms = x.double().abs() @ layer.weight(torch.float64).abs().t()
    if zero:
        largest = 8 if format in CODEBOOKS else 448
        spread = (layer.zero.abs() + largest) * layer.scale
        terms = terms + x.double().abs().sum(-1, keepdim=True) * spread.double().amax(-1)
    step = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-19}[dtype]
    assert bool(((layer(x).double() - exact).abs() <= step * terms + 1e-6).all())


def test_strided_inputs(isa: str) -> None:
    torch.manual_seed(2)
    layer = random_layer("int4", 48, 96, 32)
    wide = torch.randn(5, 7, 200).bfloat16()
    views = [
        wide[..., :96],
        wide[:, ::2, 3:99],
        wide.transpose(0, 1)[..., 100:196],
        wide[..., ::2][..., :96],
        wide[0, 0, :96],
        wide[:, :1, :96].expand(5, 4, 96),
    ]
    for x in views:
        y = layer(x)
        assert y.shape == (*x.shape[:-1], 48)
        assert y.is_contiguous()
        assert same_bits(y, layer(x.contiguous()))
    strided = torch.empty(48, 6)[:, ::2].copy_(layer.scale)
    for scale in (ops.pack_scale(layer.scale), strided):
        y = ops.w4_linear(views[0], layer.packed, scale, None, layer.lut, None, 48, 32)
        assert same_bits(y, layer(views[0]))


@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("m", [1, 40])
def test_nan_and_inf_reach_their_own_row_only(isa: str, format: str, m: int) -> None:
    torch.manual_seed(3)
    layer = random_layer(format, 40, 128, 64)
    for dtype in DTYPES:
        x = torch.randn(m + 2, 128).to(dtype)
        clean = layer(x)
        poisoned = x.clone()
        poisoned[0, 5] = torch.nan
        poisoned[1, 7] = torch.inf
        y = layer(poisoned)
        assert bool(y[0].isnan().all())
        # An infinity times a code of 0 is NaN, times any other an infinity: never finite.
        assert not bool(y[1].isfinite().any())
        assert same_bits(y[2:], clean[2:])


def test_nan_codes_of_fp8_stay_nan(isa: str) -> None:
    codes = torch.randn(20, 64).to(torch.float8_e4m3fn)
    codes[3, 10] = torch.nan
    scale = torch.ones(20, 1)
    for dtype in DTYPES:
        y = ops.w8_linear(
            torch.ones(3, 64, dtype=dtype), ops.pack_w8(codes), scale, None, None, "fp8", -1
        )
        assert bool(y[:, 3].isnan().all())
        assert not bool(y[:, :3].isnan().any() | y[:, 4:].isnan().any())


def test_every_8_bit_code_decodes_exactly(isa: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(256, 1).repeat(1, 4)
    codes[:, 1:] = 0
    x = torch.tensor([[1.0, 0, 0, 0]])
    for kind, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        expected = codes[:, 0].contiguous().view(dtype).float()
        for x_dtype in (torch.float32, torch.bfloat16):
            # Tables and arithmetic differ between few and many rows: try both.
            for m in (1, 20):
                y = ops.w8_linear(
                    x.to(x_dtype).repeat(m, 1),
                    ops.pack_w8(codes),
                    torch.ones(256, 1),
                    None,
                    None,
                    kind,
                    -1,
                )
                torch.testing.assert_close(
                    y.float(), expected.expand(m, -1), rtol=0, atol=0, equal_nan=True
                )


def test_subnormal_fp8_survive_flush_to_zero(isa: str) -> None:
    codes = torch.tensor([[1, 2, 7, 0x81]] * 16, dtype=torch.uint8)
    x = torch.ones(1, 4)
    expected = codes.view(torch.float8_e4m3fn).float().sum(-1)
    torch.set_flush_denormal(True)
    try:
        y = ops.w8_linear(x, ops.pack_w8(codes), torch.ones(16, 1), None, None, "fp8", -1)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(y[0], expected)


def test_zero_scales_and_outliers(isa: str) -> None:
    torch.manual_seed(4)
    layer = random_layer("int4", 32, 128, 32)
    layer.scale[5] = 0
    x = torch.randn(4, 128)
    x[:, 17] = 1e4
    y = layer(x)
    assert bool((y[:, 5] == 0).all())
    exact = layer(x.double(), "reference")
    assert relative_error(y, exact) < 1e-6
    bf16 = x.bfloat16()
    exact = layer(bf16.double(), "reference")
    assert relative_error(layer(bf16), exact) <= allowed_error(layer, bf16, exact)


def test_no_rows(isa: str) -> None:
    layer = random_layer("int4", 32, 64, 32)
    assert layer(torch.empty(0, 64)).shape == (0, 32)
    assert layer(torch.empty(2, 0, 64)).shape == (2, 0, 32)


@pytest.mark.parametrize("format", ["uint4", "nf4", "int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_is_exact(isa: str, format: str, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    layer = random_layer(format, 37, 101, 32, zero=True)
    n, k = layer.codes.shape
    if format in CODEBOOKS:
        weight = ops.dequantize_w4(
            layer.packed, layer.scale, layer.zero, layer.lut, n, k, 32, dtype
        )
    else:
        weight = ops.dequantize_w8(layer.packed, layer.scale, layer.zero, n, k, format, 32, dtype)
    assert torch.equal(weight, layer.weight(dtype))


def test_row_major_8_bit_codes_are_packed_on_the_fly() -> None:
    layer = random_layer("int8", 40, 64, 32)
    x = torch.randn(3, 64)
    y = ops.w8_linear(x, layer.codes.view(torch.int8), layer.scale, None, None, "int8", 32)
    assert same_bits(y, layer(x))


def test_errors_name_value_rule_and_remedy() -> None:
    layer = random_layer("int4", 32, 64, 32)

    def call(**change: object) -> None:
        arguments = {
            "x": torch.randn(2, 64),
            "packed": layer.packed,
            "scale": layer.scale,
            "zero": None,
            "lut": layer.lut,
            "bias": None,
            "n": 32,
            "group_size": 32,
        }
        ops.w4_linear(**(arguments | change))

    call()
    cases = [
        ({"group_size": 24}, r"group_size 24 is not a multiple of 16; use 32, 64 or 128"),
        ({"group_size": 0}, r"group_size 0 must be positive, or -1"),
        ({"x": torch.randn(2, 72)}, r"packed weight has shape .* K = 72; make it with .*pack_w4"),
        ({"x": torch.randn(2, 64).double()}, r"x has dtype Double, must be float32, float16"),
        ({"scale": layer.scale.bfloat16()}, r"scale has dtype BFloat16, must be float32"),
        ({"scale": layer.scale[:, :1]}, r"scale has shape \[32, 1\], must be .* \[32, 2\]"),
        ({"zero": layer.scale[:4]}, r"zero has shape \[4, 2\]"),
        ({"bias": torch.randn(31)}, r"bias has shape \[31\], must be \[N\] = \[32\]"),
        ({"lut": torch.randn(8)}, r"lut has shape \[8\]"),
        ({"n": 40}, r"packed weight has shape"),
    ]
    for change, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call(**change)
    with pytest.raises(ValueError, match="kind 'int7' is unknown; use 'int8' or 'fp8'"):
        ops.w8_linear(torch.randn(2, 64), layer.packed, layer.scale, None, None, "int7", 32)
    with pytest.raises(RuntimeError, match="kind 7 is unknown; use 1 for int8"):
        torch.ops.quantkit.w8_linear(
            torch.randn(2, 64), layer.codes, layer.scale, None, None, 7, 32
        )
