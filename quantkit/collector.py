"""Statistics of one group's common input, for as long as the group is being solved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from quantkit import numerics
from quantkit.algorithms import SOLVERS, Stats
from quantkit.input_range import InputRange, choose_range, sample_tokens
from quantkit.observers import Candidates, HessianAccumulator
from quantkit.plan import PlannedLayer
from quantkit.quantize import QuantizedLayer, quantize_group
from quantkit.recipe import Step
from quantkit.schemes import QuantSpec

#: Tokens of the sample that each layer's output error is measured on.
SAMPLE_TOKENS = 256


class Collector:
    """What the solvers of a group want to know of its input, and no more.

    Layers with one input may disagree in how they quantize it. Each is solved from the
    statistics of what it will itself multiply with.

    Args:
        members: layers that read the same tensor.
        observer: turns static activations into a range.
    """

    def __init__(self, members: Sequence[PlannedLayer], observer: Step) -> None:
        self.members = members
        self.sample: Tensor | None = None
        self.tokens = 0
        #: By the spec that quantizes the input; None for the input as it is.
        self.moments = {layer.scheme.input: _Moments(layer.shape[1]) for layer in members}
        for layer in members:
            moments = self.moments[layer.scheme.input]
            moments.needs_hessian |= SOLVERS[layer.solver].needs_hessian
            moments.needs_drift |= layer.needs_drift
        self.candidates: Candidates | None = None
        if any(layer.scheme.needs_static_input for layer in members):
            self.candidates = Candidates.of(observer.name, observer.options)
        #: A static scale is known only behind the last batch: then these are gone through again.
        #: They cost nothing, as the paused passes hold them in any case.
        self.held: list[tuple[Tensor, Tensor | None]] = []

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
        for spec, moments in self.moments.items():
            if spec is None or spec.dynamic:
                moments.update(_as_multiplied(x, spec), unquantized)
        if self.candidates is not None:
            self.candidates.update(x)
            self.held.append((x, unquantized))

    def solve(self, linears: Mapping[str, nn.Linear]) -> dict[str, QuantizedLayer]:
        """Quantize the group. See `quantkit.quantize.quantize_group`.

        Args:
            linears: the model's layers by name.
        """
        alike: dict[QuantSpec | None, list[PlannedLayer]] = {}
        for layer in self.members:
            alike.setdefault(layer.scheme.input, []).append(layer)
        solved: dict[str, QuantizedLayer] = {}
        for spec, layers in alike.items():
            weights = {layer.name: linears[layer.name].weight for layer in layers}
            moments = self.moments[spec]
            found = None
            if spec is not None and not spec.dynamic:
                found = self._range(spec, list(weights.values()))
                scale = found.scale(spec, next(iter(weights.values())).dtype)
                for x, unquantized in self.held:
                    moments.update(_as_multiplied(x, spec, scale), unquantized)
            stats = Stats(moments.hessian_value(), self.tokens, moments.drift_value())
            solved |= quantize_group(layers, weights, stats, found, self.sample)
        return solved

    def _range(self, spec: QuantSpec, weights: Sequence[Tensor]) -> InputRange:
        assert self.candidates is not None
        ranges = self.candidates.ranges(spec)
        sample = sample_tokens([x for x, _ in self.held])
        return choose_range(ranges, sample, weights, spec)


class _Moments:
    """Second moments of what some layers multiply with."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.needs_hessian = self.needs_drift = False
        self.tokens = 0
        self.hessian: HessianAccumulator | None = None
        self.drift: Tensor | None = None

    def update(self, x: Tensor, unquantized: Tensor | None) -> None:
        """Add tokens ``[tokens, K]``: rounding is judged on what a layer really multiplies with."""
        self.tokens += len(x)
        if self.needs_hessian:
            if self.hessian is None:
                self.hessian = HessianAccumulator(self.columns)
            self.hessian.update(x)
        if self.needs_drift:
            assert unquantized is not None
            if self.drift is None:
                self.drift = torch.zeros(self.columns, self.columns)
            real = x.float()
            apart = unquantized.reshape(x.shape).float() - real
            self.drift.addmm_(apart.t().to(self.drift.device), real.to(self.drift.device))

    def hessian_value(self) -> Tensor | None:
        return None if self.hessian is None else self.hessian.value()

    def drift_value(self) -> Tensor | None:
        return None if self.drift is None else self.drift / max(self.tokens, 1)


def _as_multiplied(x: Tensor, spec: QuantSpec | None, scale: Tensor | None = None) -> Tensor:
    if spec is None:
        return x
    return numerics.fake_quantize_input(x, spec, None if scale is None else scale.to(x.device))
