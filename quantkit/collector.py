"""Statistics of one group's common input, for as long as the group is being solved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from quantkit import numerics
from quantkit.algorithms import SOLVERS, Stats
from quantkit.observers import HessianAccumulator, Observer, make_observer
from quantkit.plan import PlannedLayer
from quantkit.quantize import QuantizedLayer, quantize_group
from quantkit.recipe import Step

#: Tokens of the sample that each layer's output error is measured on.
SAMPLE_TOKENS = 256


class Collector:
    """What the solvers of a group want to know of its input, and no more.

    Args:
        members: layers that read the same tensor.
        observer: turns static activations into a range.
    """

    def __init__(self, members: Sequence[PlannedLayer], observer: Step) -> None:
        self.members = members
        self.hessian: HessianAccumulator | None = None
        self.drift: Tensor | None = None
        self.range: Observer | None = None
        self.sample: Tensor | None = None
        self.tokens = 0
        inputs = members[0].scheme.input
        self.dynamic = inputs if inputs is not None and inputs.dynamic else None
        if any(SOLVERS[layer.solver].needs_hessian for layer in members):
            self.hessian = HessianAccumulator(members[0].shape[1])
        if any(layer.needs_drift for layer in members):
            self.drift = torch.zeros(2 * (members[0].shape[1],), dtype=torch.float32)
        if any(layer.scheme.needs_static_input for layer in members):
            self.range = make_observer(observer.name, observer.options)
            self.spec = next(x.scheme.input for x in members if x.scheme.needs_static_input)

    def update(self, x: Tensor, unquantized: Tensor | None = None) -> None:
        """Take in one batch ``[..., K]``.

        Args:
            x: the input.
            unquantized: what the unquantized model has there, where a solver asks for it.
        """
        x = x.reshape(-1, x.shape[-1])
        if self.sample is None and len(x):
            self.sample = x[:SAMPLE_TOKENS].clone()
        self.tokens += len(x)
        if self.hessian is not None:
            # Rounding is judged on what the layer will really multiply with.
            self.hessian.update(
                numerics.fake_quantize_input(x, self.dynamic) if self.dynamic else x
            )
        if self.drift is not None:
            assert unquantized is not None
            real = numerics.fake_quantize_input(x, self.dynamic) if self.dynamic else x
            real = real.float()
            apart = unquantized.reshape(x.shape).float() - real
            self.drift.addmm_(apart.t().to(self.drift.device), real.to(self.drift.device))
        if self.range is not None:
            self.range.update(x)

    def solve(self, linears: Mapping[str, nn.Linear]) -> dict[str, QuantizedLayer]:
        """Quantize the group. See `quantkit.quantize.quantize_group`.

        Args:
            linears: the model's layers by name.
        """
        hessian = None if self.hessian is None else self.hessian.value()
        input_range = None
        if self.range is not None:
            assert self.spec is not None
            input_range = self.range.range(self.spec)
        drift = None if self.drift is None else self.drift / max(self.tokens, 1)
        stats = Stats(hessian, self.tokens, drift)
        weights = {layer.name: linears[layer.name].weight for layer in self.members}
        return quantize_group(self.members, weights, stats, input_range, self.sample)
