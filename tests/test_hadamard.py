"""Hadamard matrices: orthogonal, the same every time, and multiplied by fast."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard as sylvester

from quantkit.errors import UsageError
from quantkit.hadamard import base_order, factor, hadamard_matrix, largest_order, multiply

#: Widths of real models: hidden sizes, head sizes.
WIDTHS = (64, 80, 96, 128, 576, 640, 768, 896, 960, 1152, 1536, 2048, 2304, 2560, 3072, 3584)
KNOWN = (1, 2, 4, 12, 20, 24, 28, 36, 40, 44, 60, 68, 76, 84, 108, 140)


@pytest.mark.parametrize("n", sorted({*KNOWN, *WIDTHS}))
def test_rows_are_orthogonal(n: int) -> None:
    matrix = hadamard_matrix(n)
    assert matrix.shape == (n, n)
    assert set(matrix.unique().tolist()) <= {1.0, -1.0}
    assert torch.equal(matrix @ matrix.t(), n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 8, 64, 256])
def test_powers_of_two_are_sylvesters(n: int) -> None:
    assert torch.equal(hadamard_matrix(n), torch.from_numpy(sylvester(n)).double())


@pytest.mark.parametrize(
    ("n", "base"), [(64, 1), (576, 36), (1536, 12), (896, 28), (14336, 28), (5120, 20), (8960, 140)]
)
def test_the_dense_factor_is_small(n: int, base: int) -> None:
    assert base_order(n) == base


@settings(max_examples=40, deadline=None)
@given(
    order=st.sampled_from([1, 2, 8, 12, 20, 36, 48, 56, 64, 144]),
    blocks=st.integers(1, 4),
    rows=st.integers(0, 3),
    seed=st.integers(0, 2**31 - 1),
)
def test_the_fast_product_is_the_literal_one(order: int, blocks: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, blocks * order, generator=generator, dtype=torch.float64)
    dense = torch.block_diag(*[hadamard_matrix(order)] * blocks) / order**0.5
    torch.testing.assert_close(multiply(x, order), x @ dense, rtol=0, atol=1e-12)
    if rows:
        torch.testing.assert_close(multiply(x, order).norm(), x.norm())


@pytest.mark.parametrize("order", [1, 2, 8, 16, 64, 12, 24, 576, 280, 1536])
def test_the_kernels_factor_makes_up_the_matrix(order: int) -> None:
    found = factor(order)
    base = len(found)
    assert found.dtype == torch.float32
    assert found.shape == (base, -(-base // 16) * 16)
    assert not found[:, base:].any()
    assert base == order if order < 16 else base >= 12
    blocks = torch.from_numpy(sylvester(order // base)).double()
    whole = torch.kron(blocks, found[:, :base].double()) * order**0.5
    torch.testing.assert_close(whole, hadamard_matrix(order), rtol=0, atol=1e-6)


def test_lengths_survive_in_every_dtype() -> None:
    x = torch.full((2, 576), 300.0)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        y = multiply(x.to(dtype), 576)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float().norm(), x.norm(), rtol=tolerance, atol=0)


@pytest.mark.parametrize(("n", "least"), [(172, 4), (11008, 256), (18, 2), (1023, 1)])
def test_other_sizes_name_the_largest_order_within(n: int, least: int) -> None:
    assert base_order(n) is None
    assert largest_order(n) == least
    with pytest.raises(UsageError, match=rf"order {n}: .*{least} is the largest order"):
        hadamard_matrix(n)
    with pytest.raises(UsageError, match=rf"order {n}"):
        multiply(torch.ones(1, n), n)
    with pytest.raises(UsageError, match=rf"order {n}"):
        factor(n)
