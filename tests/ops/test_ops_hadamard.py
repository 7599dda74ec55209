"""Products with Hadamard matrices: rows in their dtype, fp32 inside, rounded once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import same_bits
from torch import Tensor

from quantkit import ops
from quantkit.errors import KernelMissingError
from quantkit.hadamard import factor, multiply
from quantkit.ops import reference_parts

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HALF_STEP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
#: Columns and orders: one run and several, factors below and above a register, MLPs of models.
SIZES = [
    *[(1, 1), (2, 2), (4, 4), (6, 2), (8, 8), (16, 16), (32, 32), (48, 16), (256, 256)],
    *[(12, 12), (24, 12), (24, 24), (40, 20), (76, 76), (280, 280), (1536, 1536), (896, 896)],
]


def turned(x: Tensor, order: int) -> Tensor:
    return ops.hadamard(x, factor(order), order)


def allowed(x: Tensor, exact: Tensor, order: int) -> Tensor:
    """One rounding to the dtype of x, and fp32's along the way: of the size of a run's length."""
    length = x.double().unflatten(-1, (-1, order)).norm(dim=-1, keepdim=True)
    slack = length.expand(*length.shape[:-1], order).reshape(exact.shape)
    return HALF_STEP[x.dtype] * exact.abs() + 1e-6 * slack + 2.0**-25


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_literal_product(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for n, order in SIZES:
        for m in (1, 3, 19):
            x = torch.randn(m, n).to(dtype)
            exact = multiply(x.double(), order)
            y = turned(x, order)
            assert y.shape == (m, n)
            assert y.dtype == dtype
            assert bool(((y.double() - exact).abs() <= allowed(x, exact, order)).all()), (n, m)


@settings(max_examples=40, deadline=None)
@given(
    base=st.sampled_from([1, 2, 12, 20, 28, 36, 76, 140]),
    doublings=st.integers(0, 5),
    runs=st.integers(1, 3),
    rows=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    outlier=st.sampled_from([1.0, 1e3]),
    seed=st.integers(0, 2**31),
)
def test_any_order_matches_the_oracle(
    base: int, doublings: int, runs: int, rows: int, dtype: torch.dtype, outlier: float, seed: int
) -> None:
    torch.manual_seed(seed)
    order = base << doublings
    x = torch.randn(rows, runs * order)
    x[:, seed % x.shape[1]] *= outlier
    x = x.to(dtype)
    exact = multiply(x.double(), order)
    assert bool(((turned(x, order).double() - exact).abs() <= allowed(x, exact, order)).all())
    # The reference computes in fp64 there.
    torch.testing.assert_close(
        reference_parts.hadamard(x.double(), factor(order), order), exact, rtol=1e-6, atol=1e-6
    )


def test_rows_have_the_same_bits_whatever_surrounds_them(isa: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(150, 96).bfloat16()
    y = turned(x, 48)
    for m in (1, 2, 15, 64, 129):
        assert same_bits(turned(x[:m], 48), y[:m]), m
    wide = torch.randn(150, 130).bfloat16()
    wide[:, 7:103] = x
    assert same_bits(turned(wide[:, 7:103], 48), y)
    assert same_bits(turned(x.reshape(3, 50, 96), 48), y.reshape(3, 50, 96))
    for threads in (1, 2, 3, 7):
        ops.set_num_threads(threads)
        assert same_bits(turned(x, 48), y)


def test_nan_and_inf_stay_in_their_run(isa: str) -> None:
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(2))
    clean = turned(x, 48)
    x[1, 3], x[2, 95] = torch.nan, torch.inf
    y = turned(x, 48)
    assert bool(y[1, :48].isnan().all())
    assert not bool(y[2, 48:].isfinite().any())
    kept = torch.ones(4, 96, dtype=torch.bool)
    kept[1, :48] = kept[2, 48:] = False
    assert same_bits(y[kept], clean[kept])


def test_an_outlier_is_spread_evenly(isa: str) -> None:
    x = torch.zeros(1, 1536)
    x[0, 77] = 39.0
    torch.testing.assert_close(
        turned(x, 1536).abs(), torch.full_like(x, 39 / 1536**0.5), rtol=1e-6, atol=0
    )


def test_the_reference_has_a_gradient() -> None:
    """Calibration trains through it: the gradient of a product is the transposed product."""
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    out = torch.randn(3, 24, dtype=torch.float64)
    reference_parts.hadamard(x, factor(24), 24).backward(out)
    matrix = multiply(torch.eye(24, dtype=torch.float64), 24)
    torch.testing.assert_close(x.grad, out @ matrix.t(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "order", "told", "message"),
    [
        ((3, 40), 48, 48, r"x has shape \[3, 40\], .* a multiple of the order 48"),
        ((), 1, 1, "x"),
        ((3, 48), 48, 36, "order 36 must be a power of two times 12, the rows of factor"),
        ((3, 48), 48, 0, "order 0 must be a power of two times 12"),
    ],
)
def test_refusals(shape: tuple[int, ...], order: int, told: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.hadamard(torch.zeros(shape), factor(order), told)


def test_a_factor_of_another_shape_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"factor has shape \[12, 12\], .*hadamard\.factor"):
        ops.hadamard(torch.zeros(3, 48), factor(48)[:, :12], 48)
    with pytest.raises(RuntimeError, match=r"factor has dtype .*, must be float32"):
        ops.hadamard(torch.zeros(3, 48), factor(48).double(), 48)
    with pytest.raises(RuntimeError, match="factor has shape"):
        ops.hadamard(torch.zeros(3, 1024), torch.zeros(1024, 1024), 1024)


def test_there_is_no_kernel_on_a_gpu() -> None:
    x = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(KernelMissingError, match="hadamard has no CUDA kernel"):
        ops.hadamard(x, factor(4), 4)  # type: ignore[arg-type]
