"""Choosing one block's scalings, before its layers are quantized.

One forward pass through the block, as the quantized blocks before it feed it, gives the
statistics of every input that a scaling divides. Each rescaler then starts from what the one
before it left: statistics are divided as the input is, so that no further pass is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce

import torch
from torch import Tensor, nn

from quantkit.algorithms import RESCALERS
from quantkit.algorithms.scaling import Consumer, Scaling
from quantkit.errors import QuantkitError
from quantkit.observers import ChannelMagnitudes, HessianAccumulator
from quantkit.parallel import ALONE, World
from quantkit.plan import PlannedFold, PlannedLayer

#: Tokens of the sample on which output errors are measured where activations are quantized.
SAMPLE_TOKENS = 512


def choose_scales(
    folds: Sequence[PlannedFold],
    layers: Mapping[str, PlannedLayer],
    linears: Mapping[str, nn.Linear],
    runs: Sequence[Callable[[], Tensor]],
    advance: Callable[[], None] = lambda: None,
    together: World = ALONE,
) -> dict[str, Tensor]:
    """What to divide each producer of a block by.

    Holds the sums of all inputs that a rescaler asks for the Hessian of at once: 8·K² bytes each.

    Args:
        folds: where a scaling folds in this block, and the rescalers of each.
        layers: the block's planned layers by name.
        linears: the model's layers by name; not changed.
        runs: a forward pass through the block for each batch.
        advance: called after each pass.
        together: the processes that run the other batches.

    Returns:
        fp32 ``[P]`` by producer, for `quantkit.folding.apply_scales`.

    Raises:
        QuantkitError: NaN in an input or weight; names the fold.
    """
    batches = sum(together.agree(len(runs)))
    seen = {fold.producer: _Input(fold, linears, batches) for fold in folds}
    hooks = [
        linears[fold.consumers[0]].register_forward_pre_hook(
            lambda _, inputs, fold=fold: seen[fold.producer].update(inputs[0])
        )
        for fold in folds
    ]
    try:
        for run in runs:
            run()
            advance()
    finally:
        for hook in hooks:
            hook.remove()
    chosen = {}
    for fold in folds:
        found = seen.pop(fold.producer)
        found.pool(together)
        chosen[fold.producer] = together.first(partial(_choose, fold, found, layers, linears))
    return chosen


def _choose(
    fold: PlannedFold,
    found: _Input,
    layers: Mapping[str, PlannedLayer],
    linears: Mapping[str, nn.Linear],
) -> Tensor:
    try:
        scaling = found.scaling(layers, linears)
        total = torch.ones(fold.outputs, device=scaling.channels.device)
        for step in fold.steps:
            scales = RESCALERS[step.name].scales(scaling, step.options)
            total = total * scales
            scaling = scaling.scaled(scales)
    except QuantkitError as e:
        raise QuantkitError(f"{fold.label}: {e.message}", remedy=e.remedy) from e
    return total.cpu()


class _Input:
    """Statistics of the input that one fold scales."""

    def __init__(self, fold: PlannedFold, linears: Mapping[str, nn.Linear], batches: int) -> None:
        self.fold = fold
        weight = linears[fold.consumers[0]].weight
        self.device, self.columns = weight.device, weight.shape[1]
        self.magnitudes = ChannelMagnitudes(self.columns)
        needed = any(RESCALERS[step.name].needs_hessian for step in fold.steps)
        self.hessian = HessianAccumulator(self.columns, self.device) if needed else None
        self.share = -(-SAMPLE_TOKENS // max(batches, 1))
        self.sample: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Take in one batch ``[..., K]``."""
        x = x.reshape(-1, x.shape[-1])
        self.magnitudes.update(x)
        if self.hessian is not None:
            self.hessian.update(x)
        every = max(len(x) // self.share, 1)
        self.sample.append(x[::every][: self.share].clone())

    def pool(self, together: World) -> None:
        """Bring what all processes saw together on the first."""
        if self.hessian is not None:
            counts = together.gather(self.hessian.count)
            self.hessian.pool(together.add, sum(counts))
        seen = together.gather(self.magnitudes)
        self.magnitudes = reduce(ChannelMagnitudes.merge, seen, ChannelMagnitudes(self.columns))
        self.sample = [x for sample in together.gather(self.sample) for x in sample]

    def scaling(
        self, layers: Mapping[str, PlannedLayer], linears: Mapping[str, nn.Linear]
    ) -> Scaling:
        consumers = []
        for name in self.fold.consumers:
            scheme = layers[name].scheme if name in layers else None
            consumers.append(
                Consumer(
                    linears[name].weight,
                    scheme.weight if scheme else None,
                    scheme.input if scheme else None,
                )
            )
        return Scaling(
            tuple(consumers),
            self.fold.channels().to(self.device),
            self.magnitudes.maxima().to(self.device),
            self.magnitudes.means().to(self.device),
            torch.cat(self.sample),
            None if self.hessian is None else self.hessian.value(),
        )
