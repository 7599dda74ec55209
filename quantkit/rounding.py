"""Did a layer's solver do its work? Its result against round-to-nearest on the same scales.

A solver that spreads rounding errors and ends up at round-to-nearest has failed, however well
the run looks: Hessians that were never filled, updates that were lost. That shows in two ways,
and both stop the run: hardly a code differs from the nearest one, or the error that the solver
minimises is larger than that of rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit import numerics
from quantkit.algorithms import SOLVERS
from quantkit.errors import QuantkitError
from quantkit.numerics import QTensor
from quantkit.schemes import Granularity, ScaleFormat

if TYPE_CHECKING:
    from quantkit.algorithms import Stats

#: How much larger a solver's loss may be than that of rounding to nearest. The greedy order of
#: GPTQ promises no less; healthy layers are 20–90 % below it, and 8 bits may gain nothing.
TOLERANCE = 0.05

#: Rows of a layer that are looked at, in `SPANS` places. Rows are solved apart from each other,
#: so a few hundred tell of all, at a fraction of what solving them cost.
ROWS = 256
SPANS = 8

#: Share of codes that must differ from the nearest one. It depends on how inputs move together, not
#: on the number of bits: layers of language models are at 5–50 %, and inputs that do not move
#: together at all at 1 %. A tie that two implementations break differently is rarer.
LEAST_MOVED = 1e-3

#: In fewer weights than this, all of them may round to nearest by chance.
LEAST_WEIGHTS = 4096

#: ‖D‖ / ‖W‖ of rounding to nearest below which the weights lie on the grid already, up to bf16's
#: own rounding: nothing is left to spread.
ON_GRID = 2e-3


@dataclass(frozen=True)
class Rounding:
    """What is known of how a layer was rounded.

    Attributes:
        solver: the algorithm that ran, by its name in `quantkit.algorithms.SOLVERS`.
        tokens: calibration tokens whose input it was told of; 0 without data.
        moved: share of weights whose code is not the nearest one, neither in fp32 nor in the
            model's dtype, in which `rtn` divides; None for a solver that rounds to nearest by
            design, as for the next two.
        loss: tr(D H Dᵀ) / tr(W H Wᵀ) of D = Ŵ − W, with the solver's damping and feedback: what
            it minimises. Feedback takes its gain off, so that it may be negative.
        nearest_loss: the same for round-to-nearest.
    """

    solver: str
    tokens: int
    moved: float | None = None
    loss: float | None = None
    nearest_loss: float | None = None


def audit(
    weight: Tensor, q: QTensor, stats: Stats, solver: str, options: Mapping[str, Any]
) -> Rounding:
    """Compare a solved layer with round-to-nearest on the scales that the solver chose.

    Args:
        weight: what was solved, ``[N, K]``.
        q: the solver's answer.
        stats: what it was given.
        solver: its name.
        options: its options.

    Raises:
        QuantkitError: fewer than `LEAST_MOVED` of the codes are other than the nearest ones, or the
            loss is more than `TOLERANCE` above that of rounding to nearest.
    """
    known = Rounding(solver, stats.tokens)
    if SOLVERS[solver].nearest or stats.hessian is None:
        return known
    objective = _Objective.of(stats, options, weight.device)
    moved = weights = 0
    loss = nearest_loss = scale = apart = norm = 0.0
    for rows, part in _spans(weight, q):
        original = rows.float()
        nearest = _nearest(original, part)
        moved += _moved(part, nearest, rows)
        weights += part.codes.numel()
        loss += objective.loss(part, original)
        nearest_loss += objective.loss(nearest, original)
        scale += objective.weigh(original)
        apart += float((numerics.dequantize(nearest, torch.float32) - original).square().sum())
        norm += float(original.square().sum())
    if scale <= 0:
        return known  # a layer of zeros
    found = replace(
        known, moved=moved / weights, loss=loss / scale, nearest_loss=nearest_loss / scale
    )
    if weights >= LEAST_WEIGHTS and apart > ON_GRID**2 * norm:
        _check_moved(found, weights)
    if not stats.outputs:  # else it is not rows by themselves that were rounded well
        _check_loss(found)
    return found


def _check_moved(found: Rounding, weights: int) -> None:
    assert found.moved is not None
    if found.moved < LEAST_MOVED:
        raise QuantkitError(
            f"{found.solver} gave round-to-nearest: {found.moved:.2%} of {weights:,} codes that "
            "were looked at differ from the nearest ones",
            remedy="this is a defect in the solver or in its statistics; please report it, or ask "
            "for `algorithm: rtn`",
        )


def _check_loss(found: Rounding) -> None:
    assert found.loss is not None
    assert found.nearest_loss is not None
    # Written so that NaN fails.
    if not found.loss <= found.nearest_loss + TOLERANCE * abs(found.nearest_loss):
        raise QuantkitError(
            f"{found.solver} ended at a loss of {found.loss:.3g}, and rounding to nearest has "
            f"{found.nearest_loss:.3g}",
            remedy="calibrate on more samples, raise `damp`, or ask for `algorithm: rtn`",
        )


@dataclass(frozen=True)
class _Objective:
    """What a solver minimises over Ŵ: ‖Ŵx − Wx̃‖² over tokens, less what no Ŵ changes.

    Attributes:
        hessian: fp32 ``[K, K]``.
        lift: what damping adds to its diagonal.
        drift: the share of the drift that feedback makes up for, ``[K, K]``, or None.
    """

    hessian: Tensor
    lift: float
    drift: Tensor | None

    @staticmethod
    def of(stats: Stats, options: Mapping[str, Any], device: torch.device) -> _Objective:
        assert stats.hessian is not None
        lift = float(options.get("damp", 0.0)) * float(stats.hessian.diagonal().mean())
        share = float(options.get("feedback", 0.0))
        drift = share * stats.drift.to(device) if share and stats.drift is not None else None
        return _Objective(stats.hessian.to(device), lift, drift)

    def weigh(self, x: Tensor) -> float:
        """tr(X (H + λI) Xᵀ) of ``[rows, K]``."""
        return float(((x @ self.hessian) * x).sum() + self.lift * x.square().sum())

    def loss(self, q: QTensor, weight: Tensor) -> float:
        """tr(D (H + λI) Dᵀ) − 2 ⟨D, W C⟩ of D = Ŵ − W."""
        apart = numerics.dequantize(q, torch.float32) - weight
        value = self.weigh(apart)
        if self.drift is None:
            return value
        return value - 2.0 * float((apart * (weight @ self.drift)).sum())


def _spans(weight: Tensor, q: QTensor) -> Iterator[tuple[Tensor, QTensor]]:
    """Rows of a layer in `SPANS` places, in whole blocks where blocks share scales."""
    count = weight.shape[0]
    if count <= ROWS:
        yield weight, q
        return
    if q.spec.granularity is not Granularity.BLOCK:
        length = ROWS // SPANS
        for start in torch.linspace(0, count - length, SPANS, dtype=torch.float32).long().tolist():
            yield weight[start : start + length], q.rows(start, start + length)
        return
    assert q.spec.block is not None
    length = q.spec.block[0]
    for block in sorted({0, (count - 1) // length}):
        rows = slice(block * length, (block + 1) * length)
        yield weight[rows], replace(q, codes=q.codes[rows], scale=q.scale[block : block + 1])


def _moved(q: QTensor, nearest: QTensor, weight: Tensor) -> int:
    """Codes of ``q`` that rounding to nearest gives in no precision: a quotient of bf16 numbers is
    off by up to half a step of 8 bits."""
    codes = numerics.code_values(q)
    moved = codes != numerics.code_values(nearest)
    if q.spec.scale is ScaleFormat.MODEL:
        coarse = numerics.quantize(weight, q.scale, q.zero, q.spec)
        moved &= codes != numerics.code_values(coarse)
    return int(moved.sum())


def _nearest(weight: Tensor, q: QTensor) -> QTensor:
    """Round-to-nearest on the scales of ``q``, in fp32 as solvers round."""
    if q.spec.scale is ScaleFormat.E8M0:
        scale = numerics.exponents_to_scales(q.scale, torch.float32)
    else:
        scale = q.scale.float()
    rounded = numerics.quantize(weight, scale, q.zero, q.spec, q.global_scale)
    return replace(q, codes=rounded.codes)
