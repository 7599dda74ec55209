"""Quantized layers that are read from their checkpoint whenever they run.

A model of them takes the memory of its largest layer, and a pass through it the time of reading
the whole checkpoint: right for the one pass that checks a reload.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from quantkit.layers import QuantLinear


class StreamedLinear(nn.Module):
    """``y = x Ŵᵀ + b`` with Ŵ ``[N, K]`` on disk.

    Args:
        read: makes the layer; called for every forward pass.
        shape: ``(N, K)``.
    """

    #: T5's feed-forward layers ask for its dtype, and take no tensor for an answer.
    weight = None

    def __init__(self, read: Callable[[], QuantLinear], shape: tuple[int, int]) -> None:
        super().__init__()
        self.read = read
        self.out_features, self.in_features = shape

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` → ``[..., N]`` in x's dtype."""
        out: Tensor = self.read().to(x.device)(x)
        return out
