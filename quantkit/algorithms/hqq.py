"""Half-quadratic quantization: scales and zero points from the weights alone.

Badri, Shaji: "Half-Quadratic Quantization of Large Machine Learning Models", Mobius Labs, 2023,
https://mobiusml.github.io/hqq_blog. The rounding error of a group is measured by Σ |w − ŵ|^p with
p < 1, which forgives a few large errors for many small ones. Half-quadratic splitting gives those
an estimate e of their own, and takes turns between

    e ← shrink(w − ŵ, β)                   (sp₁: the shrinkage of the l_p norm)
    z ← mean(q − (w − e) / s)              (sp₂: least squares of w − e, with q the nearest codes)

while β grows. The paper keeps the scale s and takes any number for z. Checkpoints have integer
zero points, which then hardly ever move, or none: here least squares fits s as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit import numerics
from quantkit.algorithms.clip import has_one_code_more
from quantkit.numerics import QTensor
from quantkit.schemes import QuantSpec

if TYPE_CHECKING:
    from quantkit.algorithms import Stats

#: p: of the norm, above 0. The authors take 0.7; 1 is the absolute error, and 2, the most, plain
#:     least squares, whose shrinkage only slows the steps. 0.7 is what hurts most as measured.
#: iterations: the most that a group takes.
OPTIONS: dict[str, Any] = {"p": 1.0, "iterations": 20}

#: β of the first iteration, and what each one multiplies it by; the authors' settings. Errors are
#: in steps of the group's own scale, so that β means the same in every group.
BETA, KAPPA = 10.0, 1.01

#: Weights that are solved together: some ten fp32 tensors of this size are held.
_WEIGHTS = 1 << 22


def solve(weight: Tensor, stats: Stats, spec: QuantSpec, options: Mapping[str, Any]) -> QTensor:
    """Quantize ``weight [N, K]``; no group's Σ |w − ŵ|^p is above that of min-max scales.

    Args:
        weight: ``[N, K]``, the model's dtype, which is the dtype of the scales.
        stats: not looked at.
        spec: any spec of integer codes.
        options: see `OPTIONS`.

    Raises:
        QuantkitError: the weight holds NaN or infinity.
    """
    numerics.check_finite(weight, f"weight {tuple(weight.shape)}")
    low, high = numerics.value_range(weight, spec)
    scale, zero = numerics.compute_scales(low, high, spec)
    groups = numerics.to_groups(weight, spec)
    flat = groups.reshape(-1, groups.shape[-1])
    start = Grid(scale.reshape(-1, 1), None if zero is None else zero.reshape(-1, 1).float())
    step = max(_WEIGHTS // flat.shape[1], 1)
    found = [
        _best(flat[i : i + step].float(), start.rows(slice(i, i + step)), spec, options)
        for i in range(0, len(flat), step)
    ]
    scale = torch.cat([grid.scale for grid in found]).reshape(scale.shape)
    if zero is not None:
        zero = torch.cat([_zeros(grid) for grid in found]).to(torch.int8).reshape(scale.shape)
    # Codes are the nearest in fp32, which is what errors were compared in.
    q = numerics.quantize(weight.float(), scale.float(), zero, spec)
    return QTensor(q.codes, scale, zero, spec)


@dataclass(frozen=True)
class Grid:
    """What the codes of each group stand for: scale · (code − zero).

    Attributes:
        scale: ``[G, 1]``, the model's dtype; negative where the codes are turned over.
        zero: fp32 ``[G, 1]`` whole numbers, or None.
    """

    scale: Tensor
    zero: Tensor | None

    def rows(self, which: slice | Tensor) -> Grid:
        return Grid(self.scale[which], None if self.zero is None else self.zero[which])

    def put(self, rows: Tensor, other: Grid) -> None:
        """Replace these rows in place."""
        self.scale[rows] = other.scale
        if self.zero is not None:
            self.zero[rows] = _zeros(other)


def _zeros(grid: Grid) -> Tensor:
    assert grid.zero is not None
    return grid.zero


def _best(groups: Tensor, start: Grid, spec: QuantSpec, options: Mapping[str, Any]) -> Grid:
    """The grid of the least error for fp32 groups ``[G, n]``, from either sign of the scale."""
    best, error = alternate(groups, start, spec, **options)
    if has_one_code_more(spec):
        turned, other = alternate(groups, Grid(-start.scale, start.zero), spec, **options)
        rows = (other < error).nonzero().squeeze(1)
        best.put(rows, turned.rows(rows))
    return best


def alternate(
    groups: Tensor, start: Grid, spec: QuantSpec, p: float, iterations: int
) -> tuple[Grid, Tensor]:
    """The half-quadratic alternation. A group ends as in the authors' code: after the first
    iteration that does not lower its error, or after ``iterations``.

    Args:
        groups: fp32 ``[G, n]``.
        start: where it begins.
        spec: of the codes.
        p, iterations: see `OPTIONS`.

    Returns:
        each group's best grid, and Σ |w − ŵ|^p under it, fp32 ``[G]``.
    """
    best = Grid(start.scale.clone(), None if start.zero is None else start.zero.clone())
    codes, apart = _round(groups, start, spec)
    least = _error(apart, start, p)
    live, grid, beta = torch.arange(len(groups), device=groups.device), start, BETA
    for _ in range(iterations):
        grid = _fitted(codes, apart - shrink(apart, p, beta), grid, spec)
        beta *= KAPPA
        codes, apart = _round(groups, grid, spec)
        error = _error(apart, grid, p)
        better = (error < least[live]).nonzero().squeeze(1)
        live, groups, codes, apart = live[better], groups[better], codes[better], apart[better]
        grid = grid.rows(better)
        if len(live) == 0:
            break
        least[live] = error[better]
        best.put(live, grid)
    return best, least


def shrink(x: Tensor, p: float, beta: float) -> Tensor:
    """The paper's generalized soft-thresholding, sign(x) · max(|x| − |x|^(p−1) / β, 0)."""
    size = x.abs()
    return torch.sign(x) * (size - size.pow(p - 1) / beta).clamp(min=0)


def _round(groups: Tensor, grid: Grid, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Codes less their zero point, and how far w lies from them, in steps; ``[G, n]`` each."""
    steps = groups / grid.scale.float()
    zero = 0.0 if grid.zero is None else grid.zero
    codes = numerics.round_to_codes(steps + zero, spec) - zero
    return codes, steps - codes


def _error(apart: Tensor, grid: Grid, p: float) -> Tensor:
    """Σ |w − ŵ|^p ``[G]``."""
    return apart.abs().pow(p).sum(1) * grid.scale.float().abs().squeeze(1).pow(p)


def _fitted(codes: Tensor, moved: Tensor, grid: Grid, spec: QuantSpec) -> Grid:
    """The zero point, then the scale, of least squares to ``codes + moved`` steps ``[G, n]``."""
    zero, target = grid.zero, codes + moved
    if zero is not None:
        # mean(q − target), with q = codes + zero.
        zero = (zero - moved.mean(1, keepdim=True)).round().clamp(spec.qmin, spec.qmax)
        codes = codes + (_zeros(grid) - zero)
    ratio = (target * codes).sum(1, keepdim=True) / codes.square().sum(1, keepdim=True)
    scale = (grid.scale.float() * ratio).to(grid.scale.dtype)
    # A group of zeros says nothing of its scale, and a scale never changes its sign.
    usable = scale.isfinite() & (scale * torch.sign(grid.scale) > 0)
    return Grid(torch.where(usable, scale, grid.scale), zero)
