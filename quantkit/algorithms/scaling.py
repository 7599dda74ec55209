"""What rescalers work on: consumers of one scaled input, and the error they leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit import numerics
from quantkit.schemes import QuantSpec


@dataclass(frozen=True)
class Consumer:
    """A linear layer that reads the scaled input.

    Attributes:
        weight: ``[N, K]``, the model's dtype.
        spec: how it will be quantized; None when it is kept.
        inputs: how its input will be quantized, or None.
        costs: fp32 ``[tokens]`` of the sample, what a squared error of its output costs at each,
            summed over the tokens that one stands for; None where all tokens are alike.
    """

    weight: Tensor
    spec: QuantSpec | None
    inputs: QuantSpec | None = None
    costs: Tensor | None = None


@dataclass(frozen=True)
class Scaling:
    """One input and what reads it.

    Attributes:
        consumers: all layers that read it.
        channels: int64 ``[K]``, the producer's channel behind each column: a scale is chosen
            for each channel, and columns of one channel share it.
        maxima, means: fp32 ``[K]``, the largest and the mean |x| of each column.
        sample: inputs ``[tokens, K]``, the model's dtype, spread over the calibration set.
        hessian: fp32 ``[K, K]``, xᵀx / tokens over every calibration token, for a rescaler that
            asks for it.
    """

    consumers: tuple[Consumer, ...]
    channels: Tensor
    maxima: Tensor
    means: Tensor
    sample: Tensor
    hessian: Tensor | None = None

    @property
    def count(self) -> int:
        """P, how many scales there are to choose."""
        return int(self.channels.max()) + 1

    def by_channel(self, values: Tensor, how: str = "amax") -> Tensor:
        """Values of columns ``[K]`` gathered by channel ``[P]``: ``amax`` or ``mean``."""
        out = torch.zeros(self.count, dtype=values.dtype, device=values.device)
        return out.scatter_reduce_(0, self.channels, values, how, include_self=False)

    def scaled(self, scales: Tensor) -> Scaling:
        """The same after the input was divided by ``scales`` fp32 ``[P]``: exact for all
        statistics, up to the rounding of weights and sample to their dtypes."""
        columns = scales[self.channels]
        return replace(
            self,
            consumers=tuple(
                replace(c, weight=(c.weight.float() * columns).to(c.weight.dtype))
                for c in self.consumers
            ),
            maxima=self.maxima / columns,
            means=self.means / columns,
            sample=(self.sample.float() / columns).to(self.sample.dtype),
            hessian=None
            if self.hessian is None
            else self.hessian / columns[:, None] / columns[None, :],
        )


def output_errors(scaling: Scaling, candidates: Sequence[Tensor]) -> list[float]:
    """What rounding to nearest costs after the input was divided by each of the candidates.

    Where activations stay as they are, the error is linear in the input and
    tr((Ŵ − W) H (Ŵ − W)ᵀ) is exact over all calibration tokens; else it is measured on the
    sample.

    Args:
        scaling: what is scaled.
        candidates: fp32 ``[P]`` each.

    Returns:
        the squared error of an output vector, mean over tokens, summed over all consumers; of
        those that have costs, the sum over tokens of what it costs.
    """
    exact = [
        scaling.sample.float() @ c.weight.float().t() if _is_sampled(scaling, c) else None
        for c in scaling.consumers
    ]
    without_hessian = replace(scaling, hessian=None)  # the unscaled one is what is needed
    totals = []
    for scales in candidates:
        after = without_hessian.scaled(scales)
        columns = scales[scaling.channels]
        total = 0.0
        for before, consumer, wanted in zip(scaling.consumers, after.consumers, exact, strict=True):
            if consumer.spec is None:
                continue
            q = numerics.quantize_weight(consumer.weight, consumer.spec)
            restored = numerics.dequantize(q, torch.float32)
            if wanted is None:
                assert scaling.hessian is not None
                delta = restored / columns - before.weight.float()
                total += float(((delta @ scaling.hessian) * delta).sum())
                continue
            x = after.sample
            if consumer.inputs is not None:
                scale = _static_scale(after, consumer)
                x = numerics.fake_quantize_input(x, consumer.inputs, scale)
            errors = (x.float() @ restored.t() - wanted).square().sum(1)
            costs = 1 / max(len(errors), 1) if consumer.costs is None else consumer.costs
            total += float((errors * costs).sum())
        totals.append(total)
    return totals


def least_error(scaling: Scaling, candidates: Sequence[Tensor]) -> Tensor:
    """The candidate ``[P]`` with the least of `output_errors`; the first of equals."""
    errors = output_errors(scaling, candidates)
    return candidates[min(range(len(errors)), key=errors.__getitem__)]


def best_or_unscaled(scaling: Scaling, candidates: Sequence[Tensor]) -> Tensor:
    """`least_error`, or ones ``[P]`` where no candidate's error is below the unscaled input's."""
    unscaled = torch.ones(scaling.count, device=scaling.channels.device, dtype=torch.float32)
    return least_error(scaling, [unscaled, *candidates])


def _is_sampled(scaling: Scaling, consumer: Consumer) -> bool:
    """Whether the consumer's error is measured on the sample."""
    exact = consumer.inputs is None and consumer.costs is None
    linear = exact and scaling.hessian is not None
    return consumer.spec is not None and not linear


def _static_scale(scaling: Scaling, consumer: Consumer) -> Tensor | None:
    """``[1]`` from the observed maxima, for a static input spec."""
    if consumer.inputs is None or consumer.inputs.dynamic:
        return None
    high = scaling.maxima.max().to(consumer.weight.dtype)
    return numerics.compute_scales(-high, high, consumer.inputs)[0].reshape(1)
