"""What must hold of every quantized block and of every exported tensor, or the run fails."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from quantkit import numerics
from quantkit.algorithms import SOLVERS
from quantkit.errors import QuantkitError
from quantkit.plan import Plan, PlannedLayer
from quantkit.quantize import QuantizedLayer

#: Largest relative output error ‖X(W − Ŵ)ᵀ‖ / ‖XWᵀ‖ of a layer with a quantized input. At 1 it is
#: no better than a layer of zeros; a permuted one has √2, one of another sign 2.
ERROR_BOUND = 0.9

#: The same for a layer whose input is not quantized, by the weight's bits: at least twice what the
#: worst layer of SmolLM2-135M has (0.25 at 4 bits by `rtn`, 0.13 at 5, 0.02 at 8). At 2 bits that
#: is 0.66, and twice as much would let zeros pass: `ERROR_BOUND` holds.
WEIGHT_ONLY_BOUND: Mapping[int, float] = {8: 0.25, 7: 0.25, 6: 0.25, 5: 0.4, 4: 0.5, 3: 0.8}

#: Part of a module's name below which a router decides which tokens a layer sees.
ROUTED = "experts"

_DEFECT = "this is a defect in quantkit; please report it with the recipe"


def check_block(
    planned: Mapping[str, PlannedLayer], solved: Mapping[str, QuantizedLayer], tokens: int | None
) -> None:
    """One finished block: its layers, who rounded them, on how many tokens, and how well.

    Args:
        planned: the block's layers.
        solved: what became of them, in this run or in one that it resumes.
        tokens: calibration tokens; 0 without data, None where layers need not all see the same
            ones, as in an encoder and its decoder: then each needs at least one.

    Raises:
        QuantkitError: it names the first layer of which something does not hold.
    """
    for name in planned.keys() ^ solved.keys():
        what = "planned, but not quantized" if name in planned else "quantized, but not planned"
        raise QuantkitError(f"{name}: {what}", remedy=_DEFECT)
    for name, layer in planned.items():
        _check_solver(layer, solved[name])
        _check_tokens(layer, solved[name], tokens)
        _check_numbers(name, solved[name])
        _check_error(layer, solved[name])


def _check_solver(layer: PlannedLayer, done: QuantizedLayer) -> None:
    ran = done.rounding.solver if done.rounding else "nothing that is known"
    if ran != layer.solver:
        raise QuantkitError(
            f"{layer.name}: planned for {layer.solver}, and {ran} rounded it", remedy=_DEFECT
        )


def _check_tokens(layer: PlannedLayer, done: QuantizedLayer, tokens: int | None) -> None:
    seen = done.rounding.tokens if done.rounding else 0
    routed = ROUTED in layer.name.split(".")
    if seen == tokens or (seen > 0 and (routed or tokens is None)):
        return
    total = "" if tokens is None else f" of {tokens:,}"
    raise QuantkitError(
        f"{layer.name}: calibrated on {seen:,}{total} tokens",
        remedy="no expert may go without: calibrate on more samples" if routed else _DEFECT,
    )


def _check_numbers(name: str, done: QuantizedLayer) -> None:
    scale = numerics.float_scale(done.qtensor)
    if not numerics.is_finite(scale):
        raise QuantkitError(f"{name}: a weight's scale is NaN or infinite", remedy=_DEFECT)
    if done.input_scale is not None and not 0 < float(done.input_scale) < float("inf"):
        raise QuantkitError(
            f"{name}: the input's scale is {float(done.input_scale)}",
            remedy="calibrate on text that this layer answers to, or use a dynamic scheme",
        )


def _check_error(layer: PlannedLayer, done: QuantizedLayer) -> None:
    bound = error_bound(layer)
    # Written so that NaN fails.
    if done.output_error is not None and not done.output_error <= bound:
        raise QuantkitError(
            f"{layer.name}: its output is off by {done.output_error:.1%}, and {layer.scheme.name} "
            f"may be off by {bound:.0%}",
            remedy="give this layer more bits by a rule, or smooth or rotate its input",
        )


def few_tokens(plan: Plan, layers: Mapping[str, QuantizedLayer]) -> str | None:
    """A warning when a layer's Hessian is of fewer tokens than it has columns, or None.

    Such a Hessian leaves directions of the input that nothing was learnt of.
    """
    short = {
        layer.name: (done.tokens, layer.shape[1])
        for layer in plan.layers
        if (done := layers[layer.name].rounding) is not None
        and SOLVERS[layer.solver].needs_hessian
        and done.tokens < layer.shape[1]
    }
    if not short:
        return None
    name, (tokens, columns) = min(short.items(), key=lambda item: item[1][0] / item[1][1])
    return (
        f"{len(short)} of {len(plan.layers)} layers were calibrated on fewer tokens than they have "
        f"columns ({name}: {tokens:,} tokens, {columns:,} columns); calibrate on more samples"
    )


def error_bound(layer: PlannedLayer) -> float:
    """The relative output error that a layer may have."""
    if layer.scheme.input is not None:
        return ERROR_BOUND
    return WEIGHT_ONLY_BOUND.get(layer.scheme.weight.bits, ERROR_BOUND)


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Every tensor of an export holds numbers.

    Raises:
        QuantkitError: it names the first that holds NaN or infinity.
    """
    for name in not_finite(tensors.items()):
        raise QuantkitError(
            f"{name}: holds NaN or infinite values",
            remedy="the original model is damaged there; check it or download it again",
        )


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> Iterable[str]:
    """Names of the tensors that hold NaN or infinity, in whatever format they are stored."""
    for name, tensor in tensors:
        if tensor.dtype is torch.uint8 and name.endswith("weight_scale"):
            if bool((tensor == 255).any()):  # E8M0's NaN
                yield name
        elif tensor.is_floating_point():
            wide = tensor.float() if tensor.element_size() == 1 else tensor
            if not numerics.is_finite(wide):
                yield name
