"""Block-wise distillation: scales, zero points, norms and codes trained on a block's output.

Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models" (arXiv
2407.11062, §3.2, Block-AP) train all numbers of a block at once on its output's error, by Adam,
straight through every rounding; their second phase (§3.3) is what `distill` does to the whole model
afterwards. The block's norms are trained with them, as by Li et al., "Norm Tweaking" (arXiv
2309.02784). What is trained of a weight is in `quantkit.algorithms.latent`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.algorithms.distill import BETAS, learning_rate
from quantkit.algorithms.latent import EPSILON, Weight
from quantkit.algorithms.training import Solved, Trained

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
            eps=EPSILON,
            fused=True,
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
