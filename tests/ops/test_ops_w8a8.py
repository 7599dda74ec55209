"""w8a8_linear: int32 sums are exact on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import same_bits

from quantkit import ops
from quantkit.ops import reference


def random_int8(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def exact_sums(xq: torch.Tensor, wq: torch.Tensor) -> torch.Tensor:
    return xq.double() @ wq.double().t()


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 64, 129])
def test_sums_are_exact(isa: str, m: int) -> None:
    torch.manual_seed(m)
    for n, k in [(1, 1), (16, 4), (47, 63), (130, 576)]:
        xq, wq = random_int8(m, k), random_int8(n, k)
        y = ops.w8a8_linear(xq, torch.ones(m), ops.pack_w8(wq), torch.ones(n), None, torch.float32)
        assert torch.equal(y.double(), exact_sums(xq, wq))


def test_nothing_times_something_negative_is_a_positive_zero() -> None:
    xq, wq = torch.zeros(2, 1, dtype=torch.int8), torch.full((48, 1), -3, dtype=torch.int8)
    for weight in (wq, ops.pack_w8(wq)):
        arguments = (xq, torch.ones(1, 1), weight, torch.ones(48, 1), None, torch.float32)
        assert not bool(reference.w8a8_linear(*arguments).signbit().any())
        assert not bool(ops.w8a8_linear(*arguments).signbit().any())


def test_extreme_codes_do_not_overflow(isa: str) -> None:
    # 70000 is past 65793, where unsigned activations would overflow a signed sum; then the longest.
    for k in (70_000, 131_071):
        for x_code, w_code in [(-128, -128), (127, -128), (-128, 127), (127, 127)]:
            xq = torch.full((1, k), x_code, dtype=torch.int8)
            wq = torch.full((3, k), w_code, dtype=torch.int8)
            y = ops.w8a8_linear(xq, torch.ones(1), wq, torch.ones(3), None, torch.float32)
            expected = torch.tensor(float(x_code * w_code * k))  # rounds to fp32 once
            assert torch.equal(y, expected.expand(1, 3))


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 70),
    k=st.integers(1, 200),
    bias=st.booleans(),
    per_token=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_scales_and_bias_match_the_reference(
    m: int, n: int, k: int, bias: bool, per_token: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    xq, wq = random_int8(m, k), random_int8(n, k)
    x_scale = (torch.rand(m if per_token else 1) * 0.01).to(dtype)
    arguments = (
        xq,
        x_scale.unsqueeze(-1),
        ops.pack_w8(wq),
        torch.rand(n, 1) * 0.01,
        torch.randn(n).to(dtype) if bias else None,
        dtype,
    )
    assert same_bits(ops.w8a8_linear(*arguments), reference.w8a8_linear(*arguments))


def test_rows_have_the_same_bits_whatever_m_is(isa: str) -> None:
    torch.manual_seed(0)
    xq, packed = random_int8(300, 100), ops.pack_w8(random_int8(90, 100))
    x_scale, w_scale = torch.rand(300), torch.rand(90)
    y = ops.w8a8_linear(xq, x_scale, packed, w_scale, None, torch.bfloat16)
    for m in (1, 2, 4, 5, 6, 7, 8, 11, 33, 240, 241):
        part = ops.w8a8_linear(xq[:m], x_scale[:m], packed, w_scale, None, torch.bfloat16)
        assert same_bits(part, y[:m])


def test_strided_batched_and_empty_inputs() -> None:
    wide = random_int8(3, 5, 40)
    packed, w_scale = ops.pack_w8(random_int8(20, 32)), torch.rand(20)
    x = wide[..., 4:36]
    y = ops.w8a8_linear(x, torch.rand(1), packed, w_scale, None, torch.float32)
    assert y.shape == (3, 5, 20)
    empty = ops.w8a8_linear(x[:0], torch.rand(1), packed, w_scale, None, torch.float32)
    assert empty.shape == (0, 5, 20)


def test_a_nan_scale_reaches_its_row_only() -> None:
    xq, packed = random_int8(3, 32), ops.pack_w8(random_int8(20, 32))
    x_scale = torch.tensor([1.0, torch.nan, 1.0])
    y = ops.w8a8_linear(xq, x_scale, packed, torch.ones(20), None, torch.float32)
    assert bool(y[1].isnan().all())
    assert bool(y[[0, 2]].isfinite().all())


def test_errors_name_value_rule_and_remedy() -> None:
    xq, wq, one = random_int8(2, 32), random_int8(20, 32), torch.ones(20)
    with pytest.raises(RuntimeError, match=r"xq has dtype Float, must be int8; make it with"):
        ops.w8a8_linear(xq.float(), one[:1], wq, one, None, torch.float32)
    with pytest.raises(RuntimeError, match=r"x_scale has 3 values, must have 1 or one a row"):
        ops.w8a8_linear(xq, one[:3], wq, one, None, torch.float32)
    with pytest.raises(RuntimeError, match=r"weight has shape \[20, 32\], must be \[19, 32\]"):
        ops.w8a8_linear(xq, one[:1], wq, one[:19], None, torch.float32)
    with pytest.raises(ValueError, match=r"output dtype torch\.int8 is not supported"):
        ops.w8a8_linear(xq, one[:1], wq, one, None, torch.int8)
