"""How large each channel of a layer's input is, which rescalers choose their scales by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.errors import QuantkitError


class ChannelMagnitudes:
    """Largest and mean |x| of each column over tokens x ``[1, K]``.

    Args:
        columns: K, the layer's in_features.
    """

    def __init__(self, columns: int) -> None:
        self.count = 0
        self._maxima = torch.zeros(columns, dtype=torch.float32)
        self._sums = torch.zeros(columns, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Add inputs ``[..., K]``. NaN is found by `maxima`."""
        magnitudes = x.detach().reshape(-1, x.shape[-1]).abs()
        if len(magnitudes) == 0:
            return
        # amax gives NaN for a column that holds one.
        self._maxima = torch.maximum(self._maxima, magnitudes.amax(0).float().cpu())
        self._sums += magnitudes.sum(0, dtype=torch.float32).double().cpu()
        self.count += len(magnitudes)

    def merge(self, other: ChannelMagnitudes) -> ChannelMagnitudes:
        """The magnitudes over the tokens of both."""
        merged = ChannelMagnitudes(len(self._maxima))
        merged._maxima = torch.maximum(self._maxima, other._maxima)
        merged._sums = self._sums + other._sums
        merged.count = self.count + other.count
        return merged

    def maxima(self) -> Tensor:
        """max |x| of each column, fp32 ``[K]``.

        Raises:
            QuantkitError: no tokens, or NaN or infinite inputs.
        """
        if self.count == 0:
            raise QuantkitError(
                "no tokens were observed", remedy="did every calibration batch reach this layer?"
            )
        bad = int((~self._maxima.isfinite()).sum())
        if bad:
            raise QuantkitError(
                f"inputs hold NaN or infinite values in {bad} of {len(self._maxima)} columns",
                remedy="run the model in bfloat16 or float32, and check the checkpoint",
            )
        return self._maxima.clone()

    def means(self) -> Tensor:
        """Mean |x| of each column, fp32 ``[K]``. Raises what `maxima` raises."""
        self.maxima()
        return (self._sums / self.count).float()

    def state(self) -> dict[str, Tensor]:
        """Maxima, sums and count, for storage."""
        return {"maxima": self._maxima, "sums": self._sums, "count": torch.tensor(self.count)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> ChannelMagnitudes:
        """The inverse of `state`."""
        magnitudes = cls(0)
        magnitudes._maxima, magnitudes._sums = state["maxima"].clone(), state["sums"].clone()
        magnitudes.count = int(state["count"])
        return magnitudes
