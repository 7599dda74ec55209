"""Choosing one block's scalings, before its layers are quantized.

One forward pass through the block, as the quantized blocks before it feed it, gives the
statistics of every input that a scaling divides. Each rescaler then starts from what the one
before it left: statistics are divided as the input is, so that no further pass is needed.

Where one of an input's rescalers asks for costs, the searches of all of that input's go by them;
where none does, all tokens are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantkit.algorithms import RESCALERS
from quantkit.algorithms.scaling import Consumer, Scaling
from quantkit.errors import QuantkitError
from quantkit.observers import ChannelMagnitudes, HessianAccumulator
from quantkit.parallel import ALONE, World
from quantkit.plan import PlannedFold, PlannedLayer

if TYPE_CHECKING:
    from quantkit.importance import Importance

#: Tokens of the sample on which output errors are measured where activations are quantized.
SAMPLE_TOKENS = 512

#: The same where tokens have costs, which are unlike each other: half of the sample are those whose
#: errors cost most.
COSTED_TOKENS = 2048


def choose_scales(
    folds: Sequence[PlannedFold],
    layers: Mapping[str, PlannedLayer],
    linears: Mapping[str, nn.Linear],
    runs: Sequence[Callable[[], Tensor]],
    advance: Callable[[], None] = lambda: None,
    together: World = ALONE,
    importance: Importance | None = None,
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
        importance: what errors cost, for the inputs that a rescaler asks it for.

    Returns:
        fp32 ``[P]`` by producer, for `quantkit.folding.apply_scales`.

    Raises:
        QuantkitError: NaN in an input or weight; names the fold.
    """
    batches = sum(together.agree(len(runs)))
    costs = {} if importance is None else importance.costs
    seen = {fold.producer: _Input(fold, linears, batches, costs) for fold in folds}
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
        total = torch.ones(fold.outputs, device=scaling.channels.device, dtype=torch.float32)
        for step in fold.steps:
            scales = RESCALERS[step.name].scales(scaling, step.options)
            total = total * scales
            scaling = scaling.scaled(scales)
    except QuantkitError as e:
        raise QuantkitError(f"{fold.label}: {e.message}", remedy=e.remedy) from e
    return total.cpu()


class _Input:
    """Statistics of the input that one fold scales."""

    def __init__(
        self,
        fold: PlannedFold,
        linears: Mapping[str, nn.Linear],
        batches: int,
        costs: Mapping[str, Tensor],
    ) -> None:
        self.fold = fold
        weight = linears[fold.consumers[0]].weight
        self.device, self.columns = weight.device, weight.shape[1]
        self.magnitudes = ChannelMagnitudes(self.columns)
        needed = any(RESCALERS[step.name].needs_hessian for step in fold.steps)
        self.hessian = HessianAccumulator(self.columns, self.device) if needed else None
        #: Consumer → what an error costs at each of this process's tokens.
        self.costs = {name: costs[name] for name in fold.consumers if name in costs}
        tokens = COSTED_TOKENS if self.costs else SAMPLE_TOKENS
        self.share = -(-tokens // max(batches, 1))
        self.seen = 0
        self.sample: list[Tensor] = []
        self.sampled_costs: dict[str, list[Tensor]] = {name: [] for name in self.costs}

    def update(self, x: Tensor) -> None:
        """Take in one batch ``[..., K]``."""
        x = x.reshape(-1, x.shape[-1])
        self.magnitudes.update(x)
        if self.hessian is not None:
            self.hessian.update(x)
        if self.costs:
            here = slice(self.seen, self.seen + len(x))
            rows, counts = spread(torch.stack([c[here] for c in self.costs.values()]), self.share)
            for name, costs in self.costs.items():
                self.sampled_costs[name].append(costs[here][rows] * counts)
        else:
            every = max(len(x) // self.share, 1)
            rows = torch.arange(len(x))[::every][: self.share]
        self.seen += len(x)
        self.sample.append(x[rows.to(x.device)])

    def pool(self, together: World) -> None:
        """Bring what all processes saw together on the first."""
        if self.hessian is not None:
            counts = together.gather(self.hessian.count)
            self.hessian.pool(together.add, sum(counts))
        seen = together.gather(self.magnitudes)
        self.magnitudes = reduce(ChannelMagnitudes.merge, seen, ChannelMagnitudes(self.columns))
        self.sample = [x for sample in together.gather(self.sample) for x in sample]
        for name, own in self.sampled_costs.items():
            self.sampled_costs[name] = [x for costs in together.gather(own) for x in costs]

    def scaling(
        self, layers: Mapping[str, PlannedLayer], linears: Mapping[str, nn.Linear]
    ) -> Scaling:
        consumers = []
        for name in self.fold.consumers:
            scheme = layers[name].scheme if name in layers else None
            costs = self.sampled_costs.get(name)
            consumers.append(
                Consumer(
                    linears[name].weight,
                    scheme.weight if scheme else None,
                    scheme.input if scheme else None,
                    torch.cat(costs).to(self.device) if costs else None,
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


def spread(costs: Tensor, share: int) -> tuple[Tensor, Tensor]:
    """Tokens to measure a batch's errors on, and how many tokens each of them stands for.

    A few tokens carry most of the cost, and to miss one is to miss its share: half of the sample
    are the dearest, each for itself; the other half, spread evenly, stand for all others.

    Args:
        costs: fp32 ``[layers, tokens]``, each layer's in its own units.
        share: how many tokens, at most.

    Returns:
        rows int64 ``[S]`` and counts fp32 ``[S]``, S = min(share, tokens).
    """
    tokens = costs.shape[1]
    if tokens <= share:
        return torch.arange(tokens), torch.ones(tokens, dtype=torch.float32)
    order = (
        (costs / costs.sum(1, keepdim=True).clamp(min=1e-30))
        .sum(0)
        .argsort(descending=True, stable=True)
    )
    dearest, others = order[: share // 2], order[share // 2 :].sort().values
    few = share - len(dearest)
    others = others[torch.arange(few) * len(others) // few]
    counts = torch.full((few,), (tokens - len(dearest)) / few, dtype=torch.float32)
    return torch.cat((dearest, others)), torch.cat(
        (torch.ones(len(dearest), dtype=torch.float32), counts)
    )
