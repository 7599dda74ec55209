"""Block-wise distillation: scales, zero points, norms and codes trained on a block's output.

Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models" (arXiv
2407.11062, §3.2, Block-AP) train all numbers of a block at once on its output's error, by Adam,
straight through every rounding; their second phase (§3.3) is what `distill` does to the whole model
afterwards. The block's norms are trained with them, as by Li et al., "Norm Tweaking" (arXiv
2309.02784). A weight is

    Ŵ = s₀ (1 + a) · (clip(⌊v⌉, q_min, q_max) − ⌊z₀ + b⌉)

with s₀ and z₀ the solver's scale and zero point. The paper trains a latent weight, this v: a weight
in steps of the code. So a change of scale moves no code, all learning rates are free of a layer's
size, and with `weight_lr` 0 the solver's codes stay what they are.

Where codes move, v begins at the weight nearest to the original one that rounds to the solver's
codes, `EDGE` away from the next code at least.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit import numerics
from quantkit.algorithms.distill import BETAS, learning_rate
from quantkit.algorithms.training import Solved, Trained
from quantkit.numerics import QTensor

#: steps: of Adam, each block, with a warm-up of 5 and a cosine down to a twentieth.
#: windows: calibration windows a step.
#: scale_lr, norm_lr: learning rates, relative to a scale's and to a norm's size; 0 leaves them.
#: zero_lr, weight_lr: of zero points and of weights, in steps of the code; 0 leaves them.
#: seed: of the windows that are held back, and of the order of the others.
OPTIONS: dict[str, Any] = {
    "steps": 60,
    "windows": 2,
    "scale_lr": 0.005,
    "norm_lr": 0.0015,
    "zero_lr": 0.0,
    "weight_lr": 0.0,
    "seed": 0,
}

#: How near to the edge of its code's cell a weight begins: nearer, a first step would undo what
#: the solver rounded the other way.
EDGE = 0.05

#: Least share of its size that a scale or a norm may shrink to.
LEAST_SHARE = 0.1

#: Gradients of single weights are small: Adam must not take them for nothing.
_EPSILON = 1e-15


class Weight:
    """One weight's trained numbers.

    Args:
        weight: ``[N, K]``, the original one.
        start: its codes and scales, integers with scales in the model's dtype.
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


class BlockDistill:
    """A block's trained numbers; see `quantkit.algorithms.training.Training`."""

    def __init__(self, solved: Solved, options: Mapping[str, Any]) -> None:
        moving = float(options["weight_lr"]) > 0
        self.weights = {
            name: Weight(weight, solved.layers[name], codes=moving)
            for name, weight in solved.weights.items()
        }
        self.first = dict(solved.norms) if float(options["norm_lr"]) > 0 else {}
        #: A norm's change is measured in the root mean square of what it multiplies by.
        self.sizes = {
            name: (norm.float() + solved.norm_offset).square().mean().sqrt()
            for name, norm in self.first.items()
        }
        self.norms = {name: torch.zeros_like(norm.float()) for name, norm in self.first.items()}
        self.steps = int(options["steps"])
        groups: dict[str, list[Tensor]] = {
            rate: [w.numbers[kind] for w in self.weights.values() if kind in w.numbers]
            for kind, rate in _RATES.items()
        }
        groups["norm_lr"] = list(self.norms.values())
        self.adam = torch.optim.Adam(
            [{"params": x, "lr": float(options[rate])} for rate, x in groups.items() if x],
            betas=BETAS,
            eps=_EPSILON,
        )
        self.rates = [group["lr"] for group in self.adam.param_groups]

    def trained(self) -> Trained:
        norms = {}
        for name, first in self.first.items():
            moved = first.float() + self.sizes[name] * self.norms[name]
            norms[name] = moved.to(first.dtype)
        return Trained({name: weight.quantized() for name, weight in self.weights.items()}, norms)

    def descend(self, gradients: Mapping[str, Tensor], step: int) -> None:
        for name, weight in self.weights.items():
            weight.differentiate(gradients[name])
        for name, change in self.norms.items():
            change.grad = gradients[name].float() * self.sizes[name]
        share = learning_rate(step, self.steps)
        for group, full in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = full * share
        self.adam.step()
        for weight in self.weights.values():
            weight.confine()


#: A weight's numbers → the option that is their learning rate.
_RATES = {"scale": "scale_lr", "zero": "zero_lr", "codes": "weight_lr"}


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
