"""A quantized weight in numbers that training moves: scales, zero points and codes.

As Chen et al., "EfficientQAT" (arXiv 2407.11062, §3.2), straight through every rounding:

    Ŵ = s₀ (1 + a) · (clip(⌊v⌉, q_min, q_max) − ⌊z₀ + b⌉)

with s₀ and z₀ the solver's scale and zero point. The paper trains a latent weight, this v: a weight
in steps of the code. So a change of scale moves no code, all learning rates are free of a layer's
size, and where codes are not trained they stay what the solver made them.

Where codes move, v begins at the weight nearest to the original one that rounds to the solver's
codes, `EDGE` away from the next code at least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit import numerics
from quantkit.numerics import QTensor

#: How near to the edge of its code's cell a weight begins: nearer, a first step would undo what
#: the solver rounded the other way.
EDGE = 0.05

#: Least share of its size that a scale or a norm may shrink to.
LEAST_SHARE = 0.1

#: Gradients of single weights are small: Adam must not take them for nothing.
EPSILON = 1e-15


class Weight:
    """One weight's trained numbers.

    Args:
        weight: ``[N, K]``, the original one; read only where codes move.
        start: its codes, and its scales in the model's dtype; integers where codes move.
        codes: they move.

    Attributes:
        numbers: what Adam moves, fp32: ``scale`` (a) and ``zero`` (b) in the scale's shape,
            ``codes`` (v) ``[N, K]``.
    """

    def __init__(self, weight: Tensor, start: QTensor, *, codes: bool) -> None:
        self.start = start
        self._first = start.scale.float()
        self.numbers = {"scale": torch.zeros_like(self._first)}
        if start.zero is not None:
            self.numbers["zero"] = torch.zeros_like(self._first)
        if codes:
            self.numbers["codes"] = _positions(weight, start)

    def quantized(self) -> QTensor:
        """What is stored: codes, scales in the model's dtype, zero points."""
        start, spec = self.start, self.start.spec
        codes, zero = start.codes, start.zero
        if "codes" in self.numbers:
            raw = torch.round(self.numbers["codes"])
            codes = raw.clamp_(spec.qmin, spec.qmax).to(torch.int8)
        if zero is not None:
            zero = torch.round(zero.float() + self.numbers["zero"]).to(torch.int8)
        scale = (self._first * (1 + self.numbers["scale"])).to(start.scale.dtype)
        return QTensor(codes, scale, zero, spec)

    def differentiate(self, gradient: Tensor) -> None:
        """Give every number its gradient, from that of the dequantized weight ``[N, K]``."""
        q = self.quantized()
        slopes = numerics.to_groups(gradient.float(), q.spec)
        levels = numerics.to_groups(q.codes.float(), q.spec)
        scale = q.scale.float()
        if q.zero is not None:
            levels -= q.zero.float().reshape(*levels.shape[:-1], 1)
            self.numbers["zero"].grad = -scale * slopes.sum(-1).reshape(scale.shape)
        by_scale = (slopes * levels).sum(-1).reshape(scale.shape)
        self.numbers["scale"].grad = self._first * by_scale
        if "codes" in self.numbers:
            pushes = slopes * scale.reshape(*slopes.shape[:-1], 1)
            self.numbers["codes"].grad = numerics.from_groups(pushes, q.spec, q.codes.shape)

    def reset(self) -> None:
        """Back to what the solver made, with codes that move in the middle of their cells."""
        for kind, number in self.numbers.items():
            if kind == "codes":
                number.copy_(self.start.codes)
            else:
                number.zero_()

    def confine(self) -> None:
        """Bring numbers back to where they stand for something that can be stored."""
        spec = self.start.spec
        self.numbers["scale"].clamp_(min=LEAST_SHARE - 1)
        if self.start.zero is not None:
            first = self.start.zero.float()
            zero = self.numbers["zero"]
            torch.clamp(zero, spec.qmin - first, spec.qmax - first, out=zero)
        if "codes" in self.numbers:
            # Half a step beyond the last code: from further a weight would never come back.
            self.numbers["codes"].clamp_(spec.qmin - 0.5, spec.qmax + 0.5)


def _positions(weight: Tensor, start: QTensor) -> Tensor:
    """The original weight in steps of the code, fp32 ``[N, K]``, moved into its code's cell."""
    spec = start.spec
    groups = numerics.to_groups(weight.float(), spec)
    position = groups / start.scale.float().reshape(*groups.shape[:-1], 1)
    if start.zero is not None:
        position += start.zero.float().reshape(*groups.shape[:-1], 1)
    codes = start.codes.float()
    reach = 0.5 - EDGE
    return numerics.from_groups(position, spec, start.codes.shape).clamp(
        codes - reach, codes + reach
    )
