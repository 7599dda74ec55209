"""One group of layers + statistics of their common input → quantized layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit import numerics
from quantkit.algorithms import SOLVERS, Stats
from quantkit.errors import QuantkitError
from quantkit.input_range import InputRange
from quantkit.numerics import QTensor
from quantkit.plan import PlannedLayer
from quantkit.rounding import Rounding, audit
from quantkit.schemes import Granularity, QuantSpec, ScaleFormat


@dataclass(frozen=True)
class Reconstruction:
    """What training a block came to (`quantkit.reconstruct`).

    Attributes:
        start_loss: mean squared error of the block's output as the solvers left it, over all
            windows or those that were held back, as tokens and channels are weighed.
        loss: the same of what is kept; ``start_loss`` if that is the start.
        steps: how many were taken.
    """

    start_loss: float
    loss: float
    steps: int


@dataclass(frozen=True)
class QuantizedLayer:
    """A solved layer.

    Attributes:
        qtensor: its weight.
        input_scale: ``[1]``, for static activations.
        input_range: where that scale comes from.
        weight_error: ‖W − Ŵ‖ / ‖W‖ (Frobenius).
        output_error: ‖X(W − Ŵ)ᵀ‖ / ‖XWᵀ‖ on a sample of its calibration input (after
            activation quantization, where the scheme has one); None without data.
        rounding: who rounded it, and what came of that.
        reconstruction: of its block, if the layer was trained in it.
    """

    qtensor: QTensor
    input_scale: Tensor | None
    weight_error: float
    output_error: float | None
    input_range: InputRange | None = None
    rounding: Rounding | None = None
    reconstruction: Reconstruction | None = None


def quantize_group(
    layers: Sequence[PlannedLayer],
    weights: Mapping[str, Tensor],
    stats: Stats,
    input_range: InputRange | None,
    sample: Tensor | None,
) -> dict[str, QuantizedLayer]:
    """Solve layers that share one input.

    Layers that agree in spec, solver and options are stacked by rows, so that the Hessian is
    factored once; rows never influence each other, so the result is the same. A layer whose outputs
    are coupled has statistics of its own, and is not stacked.

    Args:
        layers: what is planned for each.
        weights: ``[N, K]`` each, the model's dtype.
        stats: of the common input.
        input_range: of static activations.
        sample: inputs ``[tokens, K]`` for measuring the error, or None.

    Raises:
        QuantkitError: NaN in a weight, a Hessian that cannot be factored, a solver that did no
            better than rounding to nearest; names the layer.
    """
    # Statistics are summed up on the CPU, and wherever the weights are they are solved.
    device = weights[layers[0].name].device
    stats = replace(
        stats,
        hessian=None if stats.hessian is None else stats.hessian.to(device),
        drift=None if stats.drift is None else stats.drift.to(device),
    )
    solved: dict[str, QTensor] = {}
    for members in _stackable(layers):
        first = members[0]
        names = [layer.name for layer in members]
        for name in names:
            numerics.check_finite(weights[name], name)
        solver = SOLVERS[first.solver]
        stacked = torch.cat([weights[name] for name in names]) if len(names) > 1 else None
        try:
            q = solver.solve(
                weights[first.name] if stacked is None else stacked,
                stats,
                first.scheme.weight,
                first.options,
            )
        except QuantkitError as e:
            raise QuantkitError(f"{names[0]}: {e.message}", remedy=e.remedy) from e
        start = 0
        for name in names:
            stop = start + weights[name].shape[0]
            solved[name] = q if len(names) == 1 else q.rows(start, stop)
            start = stop
    result = {}
    for layer in layers:
        spec = layer.scheme.input
        scale = None
        if spec is not None and not spec.dynamic:
            if input_range is None:
                raise QuantkitError(
                    f"{layer.name}: static activations need calibration data",
                    remedy="give --data FILE, or use a dynamic scheme",
                )
            scale = input_range.scale(spec, weights[layer.name].dtype)
        new = measured(solved[layer.name], weights[layer.name], spec, scale, sample)
        static = scale is not None
        result[layer.name] = replace(
            new,
            input_range=input_range if static else None,
            rounding=_audit(layer, weights[layer.name], solved[layer.name], stats),
        )
    return result


def _audit(layer: PlannedLayer, weight: Tensor, q: QTensor, stats: Stats) -> Rounding:
    try:
        return audit(weight, q, stats, layer.solver, layer.options)
    except QuantkitError as e:
        raise QuantkitError(f"{layer.name}: {e.message}", remedy=e.remedy) from e


@contextmanager
def quantized_inputs(
    linears: Mapping[str, nn.Linear],
    layers: Mapping[str, PlannedLayer],
    results: Mapping[str, QuantizedLayer],
) -> Iterator[None]:
    """While active, layers with quantized activations compute on quantized inputs.

    Wraps ``forward`` rather than hooking in front of it: a leader pauses in a hook, on its
    unquantized input, and has a static scale only when it goes on.

    Args:
        linears: the model's layers by name.
        layers: the planned ones among them.
        results: looked up when a layer runs, so it may still be filling.
    """

    def wrap(name: str, spec: QuantSpec, forward: Callable[[Tensor], Tensor]) -> Any:
        def quantized(x: Tensor) -> Tensor:
            return forward(numerics.fake_quantize_input(x, spec, results[name].input_scale))

        return quantized

    wrapped = {n: x.scheme.input for n, x in layers.items() if x.scheme.input is not None}
    for name, spec in wrapped.items():
        module = linears[name]
        module.forward = wrap(name, spec, module.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name in wrapped:
            del linears[name].forward


def _stackable(layers: Sequence[PlannedLayer]) -> list[list[PlannedLayer]]:
    groups: dict[object, list[PlannedLayer]] = {}
    for layer in layers:
        spec = layer.scheme.weight
        by_row = (
            spec.granularity in (Granularity.CHANNEL, Granularity.GROUP)
            and spec.scale is not ScaleFormat.E4M3  # one global scale a layer
        )
        alone = None if by_row else layer.name
        key = (spec, layer.solver, tuple(sorted(layer.options.items())), alone)
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def measured(
    q: QTensor, weight: Tensor, spec: QuantSpec | None, scale: Tensor | None, sample: Tensor | None
) -> QuantizedLayer:
    """A layer with its errors against the weight ``[N, K]`` that it stands for.

    Args:
        q: the quantized weight.
        weight: the original one.
        spec: of quantized inputs, and ``scale`` of static ones.
        sample: inputs ``[tokens, K]`` for the output error, or None.
    """
    reference = weight.float()
    restored = numerics.dequantize(q, torch.float32)
    weight_error = _relative(restored, reference)
    output_error = None
    if sample is not None:
        x = sample if spec is None else numerics.fake_quantize_input(sample, spec, scale)
        output_error = _relative(x.float() @ restored.t(), sample.float() @ reference.t())
    return QuantizedLayer(q, scale, weight_error, output_error)


def _relative(value: Tensor, reference: Tensor) -> float:
    norm = float(reference.norm())
    return float((value - reference).norm()) / norm if norm else 0.0
