"""Scales in fp16, where a format asks for them, and what rounding them cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import UsageError


@dataclass(frozen=True)
class Rounding:
    """What became of numbers that were rounded.

    Attributes:
        total: numbers.
        changed: those that another number stands for now.
        worst: the largest relative change.
    """

    total: int = 0
    changed: int = 0
    worst: float = 0.0

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(
            self.total + other.total,
            self.changed + other.changed,
            max(self.worst, other.worst),
        )


def to_half(x: Tensor, name: str) -> tuple[Tensor, Rounding]:
    """Numbers as fp16, same shape. bf16 numbers between 2^-17 and 65504 stay what they are.

    Args:
        x: any float dtype.
        name: of the layer, for messages.

    Raises:
        UsageError: a number above fp16's range.
    """
    half = x.to(torch.float16)
    wide, found = x.float(), half.float()
    if not bool(torch.isfinite(found).all()):
        raise UsageError(
            f"{name}: a scale of {float(wide.abs().max()):.3g} is above fp16's 65504, in which the "
            "format stores scales",
            remedy="keep the checkpoint in compressed-tensors' format",
        )
    error = (found - wide).abs()
    relative = error / wide.abs().clamp(min=torch.finfo(torch.float32).tiny)
    worst = float(relative.max()) if x.numel() else 0.0
    return half, Rounding(x.numel(), int(error.count_nonzero()), worst)
