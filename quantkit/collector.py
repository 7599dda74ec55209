"""Statistics of one group's common input, for as long as the group is being solved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from quantkit import numerics
from quantkit.algorithms import SOLVERS, Stats
from quantkit.observers import HessianAccumulator, Observer, make_observer
from quantkit.plan import PlannedLayer
from quantkit.quantize import QuantizedLayer, quantize_group
from quantkit.recipe import Step
from quantkit.schemes import QuantSpec

#: Tokens of the sample that each layer's output error is measured on.
SAMPLE_TOKENS = 256

#: Every token counts as much as any other.
EQUAL: Mapping[str, Tensor] = MappingProxyType({})


class Collector:
    """What the solvers of a group want to know of its input, and no more.

    Layers with one input may disagree in how they quantize it. Each is solved from the
    statistics of what it will itself multiply with.

    Args:
        members: layers that read the same tensor.
        observer: turns static activations into a range.
        weights: what each calibration token counts in the Hessian of a layer, fp32 ``[tokens]``
            in the order of the batches, by name; all alike for a layer that is not there.
    """

    def __init__(
        self,
        members: Sequence[PlannedLayer],
        observer: Step,
        weights: Mapping[str, Tensor] = EQUAL,
    ) -> None:
        self.members = members
        self.weights = weights
        self.range: Observer | None = None
        self.sample: Tensor | None = None
        self.tokens = 0
        columns = members[0].shape[1]
        #: By the dynamic spec that quantizes the input (None for the input as it is), and by the
        #: layer whose tokens are weighted.
        self.hessians = {
            self._key(layer): HessianAccumulator(columns)
            for layer in members
            if SOLVERS[layer.solver].needs_hessian
        }
        #: Likewise, where a solver compares its input with the unquantized model's.
        self.drifts = {
            _dynamic(layer): torch.zeros(columns, columns) for layer in members if layer.needs_drift
        }
        if any(layer.scheme.needs_static_input for layer in members):
            self.range = make_observer(observer.name, observer.options)

    def update(self, x: Tensor, unquantized: Tensor | None = None) -> None:
        """Take in one batch ``[..., K]``.

        Args:
            x: the input.
            unquantized: what the unquantized model has there, where a solver asks for it.
        """
        x = x.reshape(-1, x.shape[-1])
        if self.sample is None and len(x):
            self.sample = x[:SAMPLE_TOKENS].clone()
        for (spec, name), hessian in self.hessians.items():
            # Rounding is judged on what the layer will really multiply with.
            real = _as_multiplied(x, spec)
            if name is not None:
                weights = self.weights[name][self.tokens : self.tokens + len(x)]
                real = real * weights.sqrt().to(real)[:, None]
            hessian.update(real)
        self.tokens += len(x)
        for spec, drift in self.drifts.items():
            assert unquantized is not None
            real = _as_multiplied(x, spec).float()
            apart = unquantized.reshape(x.shape).float() - real
            drift.addmm_(apart.t().to(drift.device), real.to(drift.device))
        if self.range is not None:
            self.range.update(x)

    def solve(self, linears: Mapping[str, nn.Linear]) -> dict[str, QuantizedLayer]:
        """Quantize the group. See `quantkit.quantize.quantize_group`.

        Args:
            linears: the model's layers by name.
        """
        alike: dict[tuple[QuantSpec | None, str | None], list[PlannedLayer]] = {}
        for layer in self.members:
            alike.setdefault((layer.scheme.input, self._key(layer)[1]), []).append(layer)
        solved: dict[str, QuantizedLayer] = {}
        for (spec, _), layers in alike.items():
            hessian = self.hessians.get(self._key(layers[0]))
            drift = self.drifts.get(_dynamic(layers[0]))
            stats = Stats(
                None if hessian is None else hessian.value(),
                self.tokens,
                None if drift is None else drift / max(self.tokens, 1),
            )
            input_range = None
            if self.range is not None and spec is not None and not spec.dynamic:
                input_range = self.range.range(spec)
            weights = {layer.name: linears[layer.name].weight for layer in layers}
            solved |= quantize_group(layers, weights, stats, input_range, self.sample)
        return solved

    def _key(self, layer: PlannedLayer) -> tuple[QuantSpec | None, str | None]:
        return _dynamic(layer), layer.name if layer.name in self.weights else None


def _as_multiplied(x: Tensor, spec: QuantSpec | None) -> Tensor:
    return x if spec is None else numerics.fake_quantize_input(x, spec)


def _dynamic(layer: PlannedLayer) -> QuantSpec | None:
    """The spec of a layer's dynamic activations. A static scale is not known before the last
    batch, so static activations are observed as they are."""
    spec = layer.scheme.input
    return spec if spec is not None and spec.dynamic else None
