"""SignRound: rounding offsets and clip ranges trained by signed gradient descent.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs"
(arXiv 2309.05516, §3): every weight has an offset V in [−0.5, 0.5] that is added before it is
rounded, and every scale a share α (and β, for the lower end) of the range it covers,

    Ŵ = s · (clip(⌊W / s + z + V⌉, q_min, q_max) − z)

and both take steps of a fixed size against the sign of the gradient of a block's output error,
straight through the rounding. A step's size falls linearly to zero. Signs make all weights move
alike, however unlike their gradients are, which suits what has to cover a known distance.

The paper trains from round-to-nearest. Here it starts from any solver's codes and scales: W is
replaced by the weight nearest to it that rounds to the solver's codes, so that V = 0 and α = β = 1
are the solver's result, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit import numerics
from quantkit.algorithms.training import Solved, Trained
from quantkit.numerics import QTensor
from quantkit.schemes import QuantSpec

#: steps: of signed gradient descent, each block.
#: windows: calibration windows a step.
#: lr: the first step of an offset, in steps of the code; ``auto`` is 1 / steps (§4.1).
#: range_lr: the first step of a clip range, as a share of it; ``auto`` is 1 / steps for any lr.
#: patience: steps without a better one after which a block is left; 0 never leaves early.
#: seed: of the order of windows.
OPTIONS: dict[str, Any] = {
    "steps": 200,
    "windows": 8,
    "lr": "auto",
    "range_lr": "auto",
    "patience": 0,
    "seed": 0,
}

#: Furthest an offset moves a weight, in steps of the code: up or down to the next code (§3.1).
REACH = 0.5

#: How near to the edge of its code's cell a start may lie; less would be lost in fp32 at 8 bits.
EDGE = 1e-3

#: Least share of its range that a scale may shrink to: a scale of zero has no codes.
LEAST_SHARE = 0.1


class Rounding:
    """One weight, its offsets and its clip ranges.

    A clip range never grows beyond the weights of its group, or beyond the start's where that
    reaches further.

    Args:
        weight: ``[N, K]``, the model's dtype.
        start: its codes and scales, integers with scales in the model's dtype.
    """

    def __init__(self, weight: Tensor, start: QTensor) -> None:
        self.spec = start.spec
        self.shape = start.codes.shape
        self.dtype = start.scale.dtype
        self._first = start.scale.float().unsqueeze(-1)
        codes = self._groups(start.codes)
        zero = start.zero.float().unsqueeze(-1) if start.zero is not None else _none(self._first)
        #: The start's range in its own steps, from the lowest to the highest code.
        self._low, self._high = self.spec.qmin - zero, self.spec.qmax - zero
        self.weight = _in_cells(self._groups(weight), codes, self._first, zero, self.spec)
        self.offsets = torch.zeros_like(self.weight)
        ends = 1 if self.spec.symmetric else 2
        #: Shares of the range: one for a symmetric scale, else of the upper and the lower end.
        self.shares = [torch.ones_like(self._first) for _ in range(ends)]
        widest, _ = numerics.compute_scales(
            *numerics.value_range(weight.float(), self.spec), self.spec
        )
        self._limit = (widest.unsqueeze(-1) / self._first.abs()).clamp_min(1.0)

    def quantized(self) -> QTensor:
        """What is stored: codes, scales in the model's dtype, zero points."""
        scale, zero = self._scales()
        raw = torch.round(self.weight / scale + zero + self.offsets)
        codes = raw.clamp_(self.spec.qmin, self.spec.qmax).to(torch.int8)
        shape = self._first.shape[:-1]
        return QTensor(
            numerics.from_groups(codes, self.spec, self.shape).contiguous(),
            scale.to(self.dtype).reshape(shape),
            None if self.spec.symmetric else zero.to(torch.int8).reshape(shape),
            self.spec,
        )

    def descend(self, gradient: Tensor, rate: float, range_rate: float) -> None:
        """One step against the signs of the gradients.

        Args:
            gradient: of the loss by the dequantized weight, ``[N, K]``.
            rate: of the offsets, in steps of the code.
            range_rate: of the clip ranges, a share of the start's.
        """
        scale, zero = self._scales()
        slopes = self._groups(gradient)
        position = self.weight / scale
        raw = torch.round(position + zero + self.offsets)
        inside = (raw >= self.spec.qmin) & (raw <= self.spec.qmax)
        levels = raw.clamp_(self.spec.qmin, self.spec.qmax) - zero
        by_scale = (slopes * (levels - position * inside)).sum(-1, keepdim=True)
        pushes = slopes * inside
        # A zero point moves what is clipped and nothing else: elsewhere it cancels.
        by_zero = (pushes - slopes).sum(-1, keepdim=True) * scale
        self.offsets.sub_(pushes.mul_(scale.sign()).sign_().mul_(rate)).clamp_(-REACH, REACH)
        for share, slope in zip(self.shares, self._share_slopes(by_scale, by_zero), strict=True):
            share.sub_(range_rate * slope.sign()).clamp_(min=LEAST_SHARE)
            torch.minimum(share, self._limit, out=share)

    def _scales(self) -> tuple[Tensor, Tensor]:
        """Scales, as they are stored, and zero points, fp32 with one column for a group's."""
        if self.spec.symmetric:
            return (self._first * self.shares[0]).to(self.dtype).float(), _none(self._first)
        high, low = self.shares
        steps = self.spec.qmax - self.spec.qmin
        grown = (self._high * high - self._low * low) / steps
        scale = (self._first * grown).to(self.dtype).float()
        zero = torch.round(self.spec.qmin - self._low * low * (self._first / scale))
        return scale, zero.clamp_(self.spec.qmin, self.spec.qmax)

    def _share_slopes(self, by_scale: Tensor, by_zero: Tensor) -> list[Tensor]:
        """The gradient by each share, from those by scale and zero point. With s₀ the start's
        scale and h, l its range in steps: s = s₀ (αh − βl) / steps and z = q_min − βl s₀ / s."""
        if self.spec.symmetric:
            return [by_scale * self._first]
        scale, _ = self._scales()
        ratio = self._first / scale
        steps = self.spec.qmax - self.spec.qmin
        through_scale = by_scale + by_zero * self._low * self.shares[1] * ratio / scale
        return [
            through_scale * self._high * self._first / steps,
            -through_scale * self._low * self._first / steps - by_zero * self._low * ratio,
        ]

    def _groups(self, x: Tensor) -> Tensor:
        return numerics.to_groups(x.float(), self.spec)


class SignRound:
    """A block's offsets and clip ranges; see `quantkit.algorithms.training.Training`."""

    def __init__(self, solved: Solved, options: Mapping[str, Any]) -> None:
        self.rounding = {
            name: Rounding(weight, solved.layers[name]) for name, weight in solved.weights.items()
        }
        self.steps = int(options["steps"])
        self.rates = [
            1.0 / self.steps if options[key] == "auto" else float(options[key])
            for key in ("lr", "range_lr")
        ]

    def trained(self) -> Trained:
        return Trained({name: rounding.quantized() for name, rounding in self.rounding.items()})

    def descend(self, gradients: Mapping[str, Tensor], step: int) -> None:
        rate, range_rate = (step_size(first, step, self.steps) for first in self.rates)
        for name, rounding in self.rounding.items():
            rounding.descend(gradients[name], rate, range_rate)


def _none(scale: Tensor) -> Tensor:
    """The zero point of codes that have none."""
    return scale.new_zeros(())


def _in_cells(
    weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec
) -> Tensor:
    """The weight nearest to this one that rounds to these codes, all in groups.

    A cell of the first and the last code has no end: what was clipped stays where it is.
    """
    position = weight / scale + zero
    half = REACH - EDGE
    below = torch.where(codes == spec.qmin, -torch.inf, codes - half)
    above = torch.where(codes == spec.qmax, torch.inf, codes + half)
    moved = position.clamp(below, above)
    return torch.where(moved == position, weight, (moved - zero) * scale)


def step_size(first: float, step: int, steps: int) -> float:
    """Linear decay from ``first`` to zero (§4.1)."""
    return first * (1.0 - step / steps)
