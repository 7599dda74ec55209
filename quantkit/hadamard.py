"""Hadamard matrices, and the fast multiplication by them.

A Hadamard matrix H holds 1 and −1, and H Hᵀ = n I. Orders here are 2^k · m, H = S ⊗ B, with S
Sylvester's matrix of order 2^k and B of order m from one of Paley's constructions:

    Paley: "On Orthogonal Matrices", Journal of Mathematics and Physics 12 (1933), 311–320.
    I:  order q + 1 for a prime q ≡ 3 (mod 4)
    II: order 2 (q + 1) for a prime q ≡ 1 (mod 4)

Sources may take prime powers too; primes reach the widths of the models at hand.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from quantkit.errors import UsageError

#: Largest order that is built as a whole: a dense factor makes the fast transform slow.
LARGEST_BASE = 512


@cache
def base_order(n: int) -> int | None:
    """The least m with n = 2^k · m for which a matrix is built as a whole; None if there is none.

    1 for a power of two.
    """
    m = n // (n & -n) if n > 0 else 0
    while 0 < m <= min(n, LARGEST_BASE):
        if m == 1 or _paley_prime(m):
            return m
        m *= 2
    return None


def largest_order(n: int) -> int:
    """The largest order that divides n."""
    return next(d for d in range(n, 0, -1) if n % d == 0 and base_order(d))


@cache
def hadamard_matrix(n: int) -> Tensor:
    """A Hadamard matrix, fp64 ``[n, n]`` of 1 and −1: S ⊗ B as in the module's docstring.

    Raises:
        UsageError: none of this order is built.
    """
    base = base_order(n)
    if base is None:
        raise UsageError(
            f"no Hadamard matrix of order {n}: orders are 2^k · m, with m at most {LARGEST_BASE} "
            "from Paley's constructions over a prime",
            remedy=f"{largest_order(n)} is the largest order that divides it",
        )
    matrix = _base_matrix(base)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.kron(two, matrix)
    return matrix


def multiply(x: Tensor, order: int) -> Tensor:
    """x · H / √order along the last dimension, block by block of ``order`` columns.

    Butterflies for S and a product for B: O(log 2^k + m) operations a value.

    Args:
        x: floating, ``[..., n]`` with n a multiple of ``order``.
        order: see `hadamard_matrix`.

    Returns:
        a new tensor in x's shape and dtype.

    Raises:
        UsageError: no matrix of this order is built.
    """
    base = base_order(order)
    if base is None:
        hadamard_matrix(order)  # raises
    assert base is not None
    # The scale comes first: sums of fp16 values stay in range.
    y = x.reshape(-1, order // base, base) * (1 / math.sqrt(order))
    if base > 1:
        y = y @ _base_matrix(base).to(y)
    half = 1
    while half < order // base:
        pairs = y.reshape(-1, order // base // (2 * half), 2, half, base)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack((low + high, low - high), dim=2)
        half *= 2
    return y.reshape(x.shape)


@cache
def factor(order: int) -> Tensor:
    """H / √order without Sylvester's part, as the kernels take it (`quantkit.ops.hadamard`).

    Returns:
        fp32 ``[B, B rounded up to a multiple of 16]``, zeros from column B on. H of this order is
        S ⊗ the rest: B is `base_order`, or up to 16 where that is 1, for the kernels' registers.

    Raises:
        UsageError: no matrix of this order is built.
    """
    base = base_order(order)
    matrix = hadamard_matrix(min(16, order) if base == 1 else base or order)
    padded = torch.zeros(len(matrix), -(-len(matrix) // 16) * 16, dtype=torch.float32)
    padded[:, : len(matrix)] = matrix / math.sqrt(order)
    return padded


@cache
def _base_matrix(order: int) -> Tensor:
    """Paley's matrix of this order, or [[1]]."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    q = _paley_prime(order)
    border = torch.ones(q, dtype=torch.float64)
    jacobsthal = _jacobsthal(q)
    if q + 1 == order:
        # I + C with the skew C = [[0, 1ᵀ], [−1, Q]].
        skew = torch.zeros(order, order, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = border, -border, jacobsthal
        return skew + torch.eye(order, dtype=torch.float64)
    # The symmetric C = [[0, 1ᵀ], [1, Q]], each 0 and ±1 replaced by a 2 × 2 matrix.
    symmetric = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    symmetric[0, 1:], symmetric[1:, 0], symmetric[1:, 1:] = border, border, jacobsthal
    off = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    eye = torch.eye(q + 1, dtype=torch.float64)
    return torch.kron(symmetric, off) + torch.kron(eye, diagonal)


def _jacobsthal(q: int) -> Tensor:
    """Q[i, j] = χ(i − j), the quadratic character of the integers modulo the prime q."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(1, q) ** 2 % q] = 1.0
    character[0] = 0.0
    index = torch.arange(q)
    return character[(index[:, None] - index[None, :]) % q]


def _paley_prime(order: int) -> int:
    """The prime behind a matrix of this order; 0 if neither construction gives one."""
    if order % 4 == 0 and _is_prime(order - 1):
        return order - 1
    if order % 4 == 0 and (order // 2) % 4 == 2 and _is_prime(order // 2 - 1):
        return order // 2 - 1
    return 0


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
