"""int8_linear: exact integer sums, group scales on both sides, every integral codebook."""

from __future__ import annotations

from dataclasses import dataclass, replace

import c_abi
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import CODEBOOKS, same_bits
from torch import Tensor
from torch.nn.functional import pad

from quantkit import ops
from quantkit.ops import reference

ROWS = [*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129]
GROUPS = [16, 32, 64, 96, 128, -1]
LUTS = {
    "int8": None,
    "int4": CODEBOOKS["int4"],
    "uint4": CODEBOOKS["uint4"],
    "e2m1": CODEBOOKS["e2m1"],
    "int3": pad(torch.arange(8.0) - 4, (0, 8)),
    "int2": pad(torch.arange(4.0) - 2, (0, 12)),
}
USED_CODES = {"int3": 8, "int2": 4}


@dataclass(frozen=True)
class Call:
    """Arguments of int8_linear, by name."""

    xq: Tensor
    x_scale: Tensor
    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    lut: Tensor | None
    bias: Tensor | None
    n: int
    group_size: int
    out_dtype: torch.dtype = torch.float32
    x_group_size: int = -1

    def __call__(self, backend: str = "native", **change: object) -> Tensor:
        arguments = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return ops.get_backend(backend).int8_linear(**(arguments | change))

    def rows(self, select: slice) -> Call:
        x_scale = self.x_scale if self.x_scale.numel() == 1 else self.x_scale[select]
        return replace(self, xq=self.xq[select], x_scale=x_scale)

    def values(self) -> Tensor:
        """The decoded weight [N, K] before zeros and scales, float64."""
        k = self.xq.shape[-1]
        if self.lut is None:
            return reference.unpack_w8(self.packed, self.n, k).double()
        return self.lut[reference.unpack_w4(self.packed, self.n, k).long()].double()


def groups_of(group_size: int, k: int) -> int:
    return 1 if group_size == -1 else -(-k // group_size)


def random_call(
    format: str,
    m: int,
    n: int,
    k: int,
    group_size: int,
    x_group_size: int = -1,
    *,
    zero: bool = False,
    bias: bool = False,
    power_of_two: bool = False,
) -> Call:
    lut = LUTS[format]
    if lut is None:
        packed = ops.pack_w8(torch.randint(-128, 128, (n, k), dtype=torch.int8))
    else:
        high = USED_CODES.get(format, 16)
        packed = ops.pack_w4(torch.randint(0, high, (n, k), dtype=torch.uint8))
    scale_shape = (n, groups_of(group_size, k))
    x_scale_shape = (m, groups_of(x_group_size, k))

    def scales(shape: tuple[int, int]) -> Tensor:
        if power_of_two:
            return 2.0 ** -torch.randint(0, 8, shape)
        return torch.rand(shape) * 0.1 + 0.01

    zeros = torch.randint(-8, 16, scale_shape).float()
    if not power_of_two:
        zeros += torch.rand(scale_shape)
    return Call(
        torch.randint(-128, 128, (m, k), dtype=torch.int8),
        scales(x_scale_shape),
        packed,
        scales(scale_shape),
        zeros if zero else None,
        lut,
        torch.randn(n) if bias else None,
        n,
        group_size,
        x_group_size=x_group_size,
    )


def step_by_step(call: Call) -> Tensor:
    """The kernel's own sums: exact in a step, then fp32 in ascending order."""
    k = call.xq.shape[1]
    sizes = [k if g == -1 else g for g in (call.group_size, call.x_group_size)]
    step = min(*sizes, k)
    values, x = call.values(), call.xq.double()
    y = torch.zeros(x.shape[0], call.n)
    for first in range(0, k, step):
        columns = slice(first, min(first + step, k))
        group, x_group = first // sizes[0], first // sizes[1]
        sums = x[:, columns] @ values[:, columns].t()
        if call.zero is not None:
            sums -= x[:, columns].sum(1, keepdim=True) * call.zero[:, group].double()
        y += sums.float() * (call.x_scale[:, x_group, None] * call.scale[:, group])
    return y


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("format", LUTS)
def test_sums_are_exact(isa: str, format: str, group_size: int) -> None:
    """With powers of two for scales and whole zeros there is nothing to round but the sums."""
    torch.manual_seed(0)
    for n, k, zero, x_group in [(47, 200, False, -1), (66, 333, True, group_size)]:
        call = random_call(format, 19, n, k, group_size, x_group, zero=zero, power_of_two=True)
        expected = step_by_step(call)
        for m in (1, 2, 3, 7, 8, 13, 16, 19):
            assert same_bits(call.rows(slice(m))(), expected[:m]), (n, m)


@pytest.mark.parametrize("sizes", [(32, 64), (64, 32), (-1, 16), (16, -1), (96, 32), (128, 128)])
def test_groups_of_either_side_may_be_the_larger(isa: str, sizes: tuple[int, int]) -> None:
    torch.manual_seed(1)
    for format in ("int8", "uint4", "e2m1"):
        call = random_call(format, 9, 33, 416, *sizes, zero=True, power_of_two=True)
        assert same_bits(call(), step_by_step(call)), format


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("format", ["int8", "int4", "e2m1"])
def test_rows_have_the_same_bits_whatever_m_is(isa: str, format: str, zero: bool) -> None:
    torch.manual_seed(2)
    for group_size, x_group, k in [(64, -1, 320), (32, 32, 203), (-1, 64, 330), (-1, -1, 130)]:
        call = random_call(format, 300, 75, k, group_size, x_group, zero=zero, bias=True)
        y = call()
        for m in ROWS:
            assert same_bits(call.rows(slice(m))(), y[:m]), m
            assert same_bits(call.rows(slice(300 - m, 300))(), y[300 - m :]), m


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 47, 63, 64, 65, 130])
def test_tails_of_n_and_k(isa: str, format: str, n: int) -> None:
    torch.manual_seed(n)
    for k in (1, 2, 3, 5, 8, 15, 17, 63, 65, 100):
        for m in (1, 2, 9):
            call = random_call(format, m, n, k, -1, power_of_two=True)
            # The allocator hands freed memory out again: an output left unwritten would show.
            del [torch.full((m, n), torch.nan) for _ in range(3)][:]
            assert same_bits(call(), step_by_step(call)), (k, m)


@pytest.mark.parametrize("k", [16_384, 16_448, 16_449, 16_512])
def test_rows_longer_than_those_that_lie_apart(isa: str, k: int) -> None:
    torch.manual_seed(4)
    call = random_call("int8", 17, 20, k, -1, power_of_two=True)
    expected = step_by_step(call)
    for m in (6, 7, 16, 17):
        assert same_bits(call.rows(slice(m))(), expected[:m]), m


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 80),
    k=st.integers(1, 300),
    sizes=st.sampled_from([(16, 16), (32, 64), (96, 48), (-1, 32), (64, -1), (-1, -1)]),
    format=st.sampled_from(list(LUTS)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    bf16_scale=st.booleans(),
    zero=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_matches_the_oracle(
    m: int,
    n: int,
    k: int,
    sizes: tuple[int, int],
    format: str,
    dtype: torch.dtype,
    bf16_scale: bool,
    zero: bool,
    bias: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    call = random_call(format, m, n, k, *sizes, zero=zero, bias=bias)
    if bf16_scale:
        call = replace(call, scale=call.scale.bfloat16())
    exact = call("reference", out_dtype=torch.float64)
    # Against the size of a sum's terms: a sum that cancels has no relative accuracy to keep.
    largest = call.values().abs().amax() + (call.zero.abs().amax() if zero else 0)
    size = call.xq.abs().double().sum(1, keepdim=True).clamp_min(128) * largest
    size = size * call.x_scale.double().amax() * call.scale.double().amax()
    step = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[dtype]
    allowed = step * exact.abs() + 2.0**-20 * size + 1e-6
    assert bool(((call(out_dtype=dtype).double() - exact).abs() <= allowed).all())


def test_a_scale_a_row_gives_the_bits_of_w8a8_linear(isa: str) -> None:
    torch.manual_seed(3)
    call = random_call("int8", 21, 50, 301, -1, bias=True)
    y = ops.w8a8_linear(call.xq, call.x_scale, call.packed, call.scale, call.bias, torch.bfloat16)
    assert same_bits(call(out_dtype=torch.bfloat16), y)


def test_the_weights_groups_are_assumed_for_the_activations() -> None:
    call = random_call("int4", 3, 20, 100, 32, 32)
    assert same_bits(call(x_group_size=None), call())
    call = random_call("int4", 3, 20, 100, 32, -1)
    assert same_bits(call(x_group_size=None), call())


def test_extreme_codes_do_not_overflow(isa: str) -> None:
    k = 70_000
    for x_code in (-128, 127):
        xq = torch.full((2, k), x_code, dtype=torch.int8)
        for low, codes in ((0.0, 15), (-128.0, 0), (-128.0, 15), (112.0, 15)):
            lut = torch.arange(16.0) + low
            packed = ops.pack_w4(torch.full((3, k), codes, dtype=torch.uint8))
            y = ops.int8_linear(
                xq, torch.ones(1), packed, torch.ones(3, 1), None, lut, None, 3, -1, torch.float32
            )
            expected = torch.tensor(float(x_code * lut[codes] * k))
            assert torch.equal(y, expected.expand(2, 3)), (x_code, low, codes)


def test_one_scale_for_all_rows(isa: str) -> None:
    call = random_call("int4", 5, 20, 100, 32, zero=True)
    one = call(x_scale=torch.tensor([0.03]))
    assert same_bits(one, call(x_scale=torch.full((5, 1), 0.03)))
    assert same_bits(one, call(x_scale=torch.tensor(0.03)))


def test_strided_batched_and_empty_inputs(isa: str) -> None:
    torch.manual_seed(4)
    call = random_call("int4", 1, 48, 96, 32, 32, zero=True)
    wide = torch.randint(-128, 128, (5, 7, 200), dtype=torch.int8)
    views = [
        wide[..., :96],
        wide[:, ::2, 3:99],
        wide.transpose(0, 1)[..., 100:196],
        wide[..., ::2][..., :96],
        wide[0, 0, :96],
        wide[:, :1, :96].expand(5, 4, 96),
        wide[:0, :, :96],
    ]
    for xq in views:
        x_scale = torch.rand(*xq.shape[:-1], 6)[..., ::2]
        y = call(xq=xq, x_scale=x_scale)
        assert y.shape == (*xq.shape[:-1], 48)
        assert y.is_contiguous()
        flat = call(xq=xq.reshape(-1, 96), x_scale=x_scale.reshape(-1, 3).contiguous())
        assert same_bits(y.reshape(-1, 48), flat)
    y = call()
    for table in ("scale", "zero"):
        values = getattr(call, table)
        strided = torch.empty(48, 6)[:, ::2].copy_(values)
        for other in (ops.pack_scale(values), strided, values.t().contiguous().t()):
            assert same_bits(call(**{table: other}), y)


def test_nan_inf_and_zero_scales_reach_their_own_row_or_column(isa: str) -> None:
    torch.manual_seed(5)
    for format in ("int8", "int4"):
        call = random_call(format, 12, 40, 128, 32, 32, zero=True, bias=True)
        clean = call()
        x_scale = call.x_scale.clone()
        x_scale[1, 2], x_scale[3, 0], x_scale[5] = torch.nan, torch.inf, 0
        y = call(x_scale=x_scale)
        assert bool(y[1].isnan().all())
        assert not bool(y[3].isfinite().any())
        assert torch.equal(y[5], call.bias)
        others = [0, 2, 4, *range(6, 12)]
        assert same_bits(y[others], clean[others])
        scale = call.scale.clone()
        scale[7], scale[9, 1] = 0, torch.nan
        y = call(scale=scale)
        assert torch.equal(y[:, 7], call.bias[7].expand(12))
        assert bool(y[:, 9].isnan().all())
        others = [i for i in range(40) if i not in (7, 9)]
        assert same_bits(y[:, others], clean[:, others])


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(6)
    for m in (1, 7, 300):
        call = random_call("int4", m, 333, 320, 64, 64, zero=True)
        ops.set_num_threads(1)
        expected = call()
        for threads in (2, 3, 7):
            ops.set_num_threads(threads)
            assert same_bits(call(), expected)


@pytest.mark.parametrize("format", ["int8", "int4", "e2m1"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_c_abi_writes_its_rows_and_nothing_else(
    isa: str, format: str, scale_dtype: torch.dtype
) -> None:
    torch.manual_seed(7)
    for m, n, k in [(1, 21, 75), (6, 64, 128), (40, 33, 100)]:
        call = random_call(format, m, n, k, 32, 32, zero=True)
        call = replace(call, scale=call.scale.to(scale_dtype))
        # Codes at an odd address, gaps between all rows, poison around the output.
        xq = torch.empty(m * (k + 3) + 1, dtype=torch.int8)[1:].view(m, k + 3)[:, :k]
        xq.copy_(call.xq)
        x_scale = torch.full((m, groups_of(32, k) + 2), torch.nan)
        x_scale[:, :-2] = call.x_scale
        rows_apart = ops.pack_scale(call.scale).to(scale_dtype)  # the fast order
        out = torch.full((m + 2, n + 5), torch.nan)
        y = out[1:-1, 2 : n + 2]
        number = c_abi.I8 if call.lut is None else c_abi.W4
        for scale in (call.scale, rows_apart):
            out.fill_(torch.nan)
            status = c_abi.int8_linear(
                xq, x_scale, number, call.packed, call.lut, scale, call.zero, 32, 32, y
            )
            assert status == c_abi.OK
            assert same_bits(y, call())
            assert int(out.isnan().sum()) == out.numel() - y.numel()


def test_c_abi_refuses_what_it_cannot_compute() -> None:
    call = random_call("int4", 2, 20, 96, 32)
    y = torch.empty(2, 20)

    def status(format: int, lut: Tensor | None, group: int, x_group: int) -> int:
        return c_abi.int8_linear(
            call.xq, call.x_scale, format, call.packed, lut, call.scale, None, group, x_group, y
        )

    assert status(c_abi.W4, call.lut, 32, -1) == c_abi.OK
    assert status(c_abi.W4, None, 32, -1) == c_abi.UNSUPPORTED
    assert status(c_abi.W4, CODEBOOKS["nf4"], 32, -1) == c_abi.UNSUPPORTED
    assert status(c_abi.W4, torch.full((16,), torch.nan), 32, -1) == c_abi.UNSUPPORTED
    assert status(c_abi.F8, None, 32, -1) == c_abi.UNSUPPORTED
    assert status(c_abi.B16, None, 32, -1) == c_abi.UNSUPPORTED
    assert status(c_abi.W4, call.lut, 32, 48) == c_abi.UNSUPPORTED
    assert status(c_abi.W4, call.lut, 8, -1) == c_abi.UNSUPPORTED


# ---- quantize_int8_per_group ---------------------------------------------------------------


def activations(dtype: torch.dtype, k: int, seed: int = 0) -> Tensor:
    """Rows of many magnitudes with ties, zeros, an all-zero row, subnormals, NaN and infinities."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(24, k, generator=generator) * torch.logspace(-6, 4, 24).unsqueeze(1)
    x[0] = 0
    x[1] = torch.randint(-255, 256, (k,), generator=generator) / 2
    x[1, 0] = 127.5
    x[2] = torch.where(torch.rand(k, generator=generator) < 0.5, 0.0, 1e-39)
    x[3, ::2] = -0.0
    x[4, 0] = 3e4
    x[5, k // 2] = torch.nan
    x[6, k // 3] = torch.inf
    x[7, -1] = -torch.inf
    x[8, k // 2] = 1e30
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_quantizer_matches_the_reference_to_the_bit(isa: str, dtype: torch.dtype) -> None:
    for k in (1, 15, 200, 577):
        for group in (1, 16, 32, 100, 128, k, 10**6):
            x = activations(dtype, k, group)
            codes, scale = ops.quantize_int8_per_group(x, group)
            expected_codes, expected_scale = reference.quantize_int8_per_group(x, group)
            assert codes.dtype == torch.int8
            assert scale.dtype == torch.float32
            torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(codes, expected_codes), (k, group)


def test_quantized_values_are_within_half_a_step(isa: str) -> None:
    x = activations(torch.float32, 320)[9:]
    codes, scale = ops.quantize_int8_per_group(x, 32)
    step = scale.repeat_interleave(32, 1)
    # absmax / 127.5 puts the largest value half a step past 127.
    assert bool(((codes * step - x).abs() <= 0.501 * step).all())


def test_nan_and_inf_show_in_the_scale_of_their_group_only(isa: str) -> None:
    x = torch.randn(4, 96)
    clean_codes, clean_scale = ops.quantize_int8_per_group(x, 32)
    x[1, 40], x[2, 70] = torch.nan, torch.inf
    codes, scale = ops.quantize_int8_per_group(x, 32)
    assert bool(scale[1, 1].isnan())
    assert bool(scale[2, 2].isinf())
    touched = torch.zeros(4, 3, dtype=torch.bool)
    touched[1, 1] = touched[2, 2] = True
    assert torch.equal(scale[~touched], clean_scale[~touched])
    columns = ~touched.repeat_interleave(32, 1)
    assert torch.equal(codes[columns], clean_codes[columns])


def test_quantizer_takes_any_strides_and_no_rows() -> None:
    wide = torch.randn(6, 100).bfloat16()
    for x in (wide[::2, 10:60], wide.t(), wide[:0], wide[:, ::2], wide[0]):
        codes, scale = ops.quantize_int8_per_group(x, 16)
        expected_codes, expected_scale = ops.quantize_int8_per_group(x.contiguous(), 16)
        assert codes.shape == x.shape
        assert scale.shape == (*x.shape[:-1], -(-x.shape[-1] // 16))
        assert same_bits(codes, expected_codes)
        assert same_bits(scale, expected_scale)


def test_quantized_product_is_close_to_the_exact_one(isa: str) -> None:
    torch.manual_seed(8)
    weight = random_call("int4", 1, 96, 512, 64)
    x = torch.randn(33, 512)
    x[:, 17] = 60.0  # an outlier spoils its own group's step, no other
    codes, scale = ops.quantize_int8_per_group(x, 64)
    y = weight(xq=codes, x_scale=scale, x_group_size=64)
    dequantized = (codes.double().unflatten(1, (8, 64)) * scale.unsqueeze(-1)).flatten(1)
    matrix = weight.values() * weight.scale.double().repeat_interleave(64, 1)
    exact = dequantized @ matrix.t()
    assert float((y - exact).norm() / exact.norm()) < 1e-6
    unrounded = x.double() @ matrix.t()
    assert float((exact - unrounded).norm() / unrounded.norm()) < 0.02


def test_errors_name_value_rule_and_remedy() -> None:
    call = random_call("int4", 2, 20, 96, 32, 32)
    cases = [
        ({"xq": call.xq.float()}, r"xq has dtype Float, must be int8; make it with quantkit"),
        ({"x_scale": torch.ones(2, 2)}, r"x_scale has shape \[2, 2\], must be \[2, 3\] for x_g"),
        ({"x_scale": torch.ones(3, 3)}, r"x_scale has shape \[3, 3\], must be \[2, 3\]"),
        ({"x_group_size": 48}, r"group_size 32 and x_group_size 48: one must divide the other"),
        ({"x_group_size": 8}, r"group_size 8 is not a multiple of 16"),
        ({"group_size": 24}, r"group_size 24 is not a multiple of 16"),
        ({"packed": ops.pack_w4(torch.zeros(20, 90, dtype=torch.uint8))[:1]}, "packed weight has"),
        ({"lut": None}, r"packed weight has shape .* make it with quantkit\.ops\.pack_w8"),
        ({"lut": CODEBOOKS["nf4"]}, r"lut holds values .* integers or halves.* use w4_linear"),
        ({"lut": torch.ones(15)}, r"lut has shape \[15\]"),
        ({"scale": call.scale.half()}, r"scale has dtype Half, must be float32 or bfloat16"),
        ({"zero": call.scale.bfloat16()}, r"zero has dtype BFloat16, must be float32;"),
        ({"scale": call.scale[:, :1]}, r"scale has shape \[20, 1\], must be .* \[20, 3\]"),
        ({"bias": torch.randn(31)}, r"bias has shape \[31\], must be \[N\] = \[20\]"),
    ]
    call()
    for change, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call(**change)
    with pytest.raises(ValueError, match=r"output dtype torch\.int8 is not supported"):
        call(out_dtype=torch.int8)
    wide = torch.zeros(1, 131072, dtype=torch.int8)
    with pytest.raises(RuntimeError, match=r"131072 columns share both scales, must be at most"):
        ops.int8_linear(
            wide,
            torch.ones(1),
            torch.zeros(1, 32768, 64, dtype=torch.uint8),
            torch.ones(1, 1),
            None,
            None,
            None,
            1,
            -1,
            torch.float32,
        )
    with pytest.raises(RuntimeError, match="group 0 must be positive"):
        ops.quantize_int8_per_group(torch.randn(2, 8), 0)
    with pytest.raises(RuntimeError, match="x has dtype Double, must be float32, float16"):
        ops.quantize_int8_per_group(torch.randn(2, 8).double(), 8)
    with pytest.raises(RuntimeError, match="its last dimension must not be empty"):
        ops.quantize_int8_per_group(torch.empty(2, 0), 8)
