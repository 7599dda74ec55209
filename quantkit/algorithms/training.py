"""What a block's training holds: a reconstructor makes one, `quantkit.reconstruct` drives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from quantkit.numerics import QTensor


@dataclass(frozen=True)
class Trained:
    """What of a block training changes, as it would be stored.

    Attributes:
        layers: quantized weights by layer.
        norms: weights of norms, the model's dtype, by module; empty where they are left alone.
    """

    layers: Mapping[str, QTensor]
    norms: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Solved:
    """A block as training finds it.

    Attributes:
        weights: the originals ``[N, K]`` of the layers that are trained, the model's dtype.
        layers: what the solvers made of them.
        norms: weights of the block's norms, the model's dtype.
        norm_offset: what the norms add to their weight before they multiply: 1 for Gemma's.
    """

    weights: Mapping[str, Tensor]
    layers: Mapping[str, QTensor]
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    norm_offset: float = 0.0


class Training(Protocol):
    """What is trained, and how it takes a step."""

    def trained(self) -> Trained:
        """As it would be stored now; before any step what was solved, to the bit."""

    def descend(self, gradients: Mapping[str, Tensor], step: int) -> None:
        """One step.

        Args:
            gradients: of the loss by each dequantized weight ``[N, K]`` and by each norm's weight
                of `trained`, by name.
            step: from 0.
        """


def window_losses(
    out: Tensor,
    target: Tensor,
    weights: Tensor | None = None,
    metric: Sequence[Tensor] = (),
) -> Tensor:
    """Mean squared error of a block's output, for each window, differentiable in ``out``.

    Args:
        out, target: ``[B, T, H]``.
        weights: what each token's error counts, fp32 ``[B, T]``; None for all alike.
        metric: symmetric matrices ``[n, n]``, H rows in all, that tell how errors of different
            channels count together; empty for the identity.

    Returns:
        fp32 ``[B]``.
    """
    error = out.float() - target.float()
    if metric:
        parts = error.split([len(block) for block in metric], dim=-1)
        seen = torch.cat([part @ block for part, block in zip(parts, metric, strict=True)], -1)
        costs = (seen * error).mean(-1)
    else:
        costs = error.square().mean(-1)
    return (costs if weights is None else costs * weights).mean(-1)
