"""Statistics of one group's common input, for as long as the group is being solved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantkit import numerics
from quantkit.algorithms import SOLVERS, Stats
from quantkit.input_range import InputRange, choose_range, sample_tokens
from quantkit.observers import Candidates, HessianAccumulator
from quantkit.parallel import ALONE, World, check_alike
from quantkit.plan import PlannedLayer
from quantkit.quantize import QuantizedLayer, quantize_group
from quantkit.recipe import Step
from quantkit.schemes import QuantSpec

if TYPE_CHECKING:
    from quantkit.importance import Importance

#: Tokens of the sample that each layer's output error is measured on.
SAMPLE_TOKENS = 256

#: Whose statistics these are: the spec that quantizes the input (None for the input as it is), and
#: the layer, where its tokens have weights of their own.
_Key = tuple[QuantSpec | None, str | None]


class Collector:
    """What the solvers of a group want to know of its input, and no more.

    Layers with one input may disagree in how they quantize it. Each is solved from the
    statistics of what it will itself multiply with.

    Args:
        members: layers that read the same tensor.
        observer: turns static activations into a range.
        importance: of tokens in the order of the batches, and of outputs; None where all are
            alike.
        together: the processes that read the other batches.
    """

    def __init__(
        self,
        members: Sequence[PlannedLayer],
        observer: Step,
        importance: Importance | None = None,
        together: World = ALONE,
    ) -> None:
        self.members = members
        self.together = together
        self.importance = importance
        self.weights: Mapping[str, Tensor] = {} if importance is None else importance.weights
        self.sample: Tensor | None = None
        self.tokens = 0
        self.moments: dict[_Key, _Moments] = {}
        for layer in members:
            key = self._key(layer)
            if key not in self.moments:
                self.moments[key] = _Moments(layer.shape[1], self.weights.get(layer.name))
            moments = self.moments[key]
            moments.needs_hessian |= SOLVERS[layer.solver].needs_hessian
            moments.needs_drift |= layer.needs_drift
        self.candidates: Candidates | None = None
        if any(layer.scheme.needs_static_input for layer in members):
            self.candidates = Candidates.of(observer.name, observer.options)
        #: A static scale is known only behind the last batch: then these are gone through again.
        #: Paused passes hold them in any case; repeated ones do not (`quantkit.footprint`).
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
        for (spec, _), moments in self.moments.items():
            if spec is None or spec.dynamic:
                moments.update(_as_multiplied(x, spec), unquantized)
        if self.candidates is not None:
            self.candidates.update(x)
            self.held.append((x, unquantized))

    def solve(self, linears: Mapping[str, nn.Linear]) -> dict[str, QuantizedLayer]:
        """Quantize the group. See `quantkit.quantize.quantize_group`.

        The first process does, on what all of them saw.

        Args:
            linears: the model's layers by name.
        """
        names = [layer.name for layer in self.members]
        check_alike(self.together, "order of layers", names)
        static = {
            layer.scheme.input: self._range(layer.scheme.input, linears)
            for layer in self.members
            if layer.scheme.input is not None and not layer.scheme.input.dynamic
        }
        dtype = linears[names[0]].weight.dtype
        for (spec, _), moments in self.moments.items():
            found = None if spec is None else static.get(spec)
            if spec is not None and found is not None:
                for x, unquantized in self.held:
                    moments.update(_as_multiplied(x, spec, found.scale(spec, dtype)), unquantized)
            moments.pool(self.together)
        self.tokens = sum(self.together.agree(self.tokens))
        samples = [x for x in self.together.gather(self.sample) if x is not None]
        self.sample = samples[0] if samples else None
        return self.together.first(lambda: self._solve(linears, static))

    def _solve(
        self, linears: Mapping[str, nn.Linear], static: Mapping[QuantSpec, InputRange]
    ) -> dict[str, QuantizedLayer]:
        alike: dict[_Key, list[PlannedLayer]] = {}
        for layer in self.members:
            alike.setdefault(self._key(layer), []).append(layer)
        solved: dict[str, QuantizedLayer] = {}
        for (spec, name), layers in alike.items():
            weights = {layer.name: linears[layer.name].weight for layer in layers}
            moments = self.moments[spec, name]
            found = None if spec is None else static.get(spec)
            coupled = self.importance.outputs(name) if self.importance and name else ()
            stats = Stats(moments.hessian_value(), self.tokens, moments.drift_value(), coupled)
            solved |= quantize_group(layers, weights, stats, found, self.sample)
        return solved

    def _key(self, layer: PlannedLayer) -> _Key:
        return layer.scheme.input, layer.name if layer.name in self.weights else None

    def _range(self, spec: QuantSpec, linears: Mapping[str, nn.Linear]) -> InputRange:
        """One range for all layers of this spec: they share the input, and so its scale."""
        weights = [linears[x.name].weight for x in self.members if x.scheme.input == spec]
        sample = sample_tokens([x for x, _ in self.held], together=self.together)
        observed = self.together.gather(self.candidates)

        def choose() -> InputRange:
            kept = [each for each in observed if each is not None]
            return choose_range(reduce(Candidates.merge, kept).ranges(spec), sample, weights, spec)

        return self.together.first(choose)


class _Moments:
    """Second moments of what some layers multiply with.

    Args:
        columns: K.
        weights: what each token counts in the Hessian, fp32 ``[tokens]``; None for all alike.
    """

    def __init__(self, columns: int, weights: Tensor | None) -> None:
        self.columns = columns
        self.weights = weights
        self.needs_hessian = self.needs_drift = False
        self.tokens = 0
        self.hessian: HessianAccumulator | None = None
        self.drift: Tensor | None = None

    def update(self, x: Tensor, unquantized: Tensor | None) -> None:
        """Add tokens ``[tokens, K]``: rounding is judged on what a layer really multiplies with."""
        counts = None
        if self.weights is not None:
            counts = self.weights[self.tokens : self.tokens + len(x)].to(x.device)
        if self.needs_hessian:
            if self.hessian is None:
                self.hessian = HessianAccumulator(self.columns)
            self.hessian.update(x if counts is None else x * counts.sqrt().to(x)[:, None])
        self.tokens += len(x)
        if self.needs_drift:
            assert unquantized is not None
            if self.drift is None:
                self.drift = torch.zeros(self.columns, self.columns, dtype=torch.float64)
            real = x.float()
            apart = unquantized.reshape(x.shape).float() - real
            if counts is not None:
                apart *= counts[:, None]
            self.drift += (apart.t() @ real).to(self.drift.device)

    def pool(self, together: World) -> None:
        """Bring what all processes saw together on the first."""
        self.tokens = sum(together.agree(self.tokens))
        if self.needs_hessian:
            if self.hessian is None:
                self.hessian = HessianAccumulator(self.columns)
            self.hessian.pool(together.add, self.tokens)
        if self.needs_drift:
            if self.drift is None:
                self.drift = torch.zeros(self.columns, self.columns, dtype=torch.float64)
            together.add(self.drift)

    def hessian_value(self) -> Tensor | None:
        return None if self.hessian is None else self.hessian.value()

    def drift_value(self) -> Tensor | None:
        return None if self.drift is None else (self.drift / max(self.tokens, 1)).float()


def _as_multiplied(x: Tensor, spec: QuantSpec | None, scale: Tensor | None = None) -> Tensor:
    if spec is None:
        return x
    return numerics.fake_quantize_input(x, spec, None if scale is None else scale.to(x.device))
