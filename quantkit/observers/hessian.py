"""The second moments of a layer's input, which GPTQ solves with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.errors import QuantkitError


class HessianAccumulator:
    """H = (1/n)·Σ xᵀx over n tokens x ``[1, K]``: second moments of a layer's input, fp32.

    GPTQ's objective is tr(ΔW·H·ΔWᵀ), the mean squared error of a layer's output over tokens.
    Frantar et al. (2022) write 2·Σ xᵀx; the factor changes neither the solution nor, damping
    being relative to the diagonal, the damped one. Dividing by n makes the objective
    comparable between layers and runs.

    Products of bf16 values are exact in fp32; the sums are rounded. Only the lower triangle
    is accumulated, in column blocks, each into its place without a temporary.

    Args:
        columns: K, the layer's in_features.
        device: where the sums live; inputs are moved there.
    """

    #: Tokens upcast at a time: K · 16 KiB.
    TOKENS = 4096

    #: Columns in a block on a CPU: at K = 1536 the blocks cover 9/16 of the square.
    COLUMNS = 192

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)

    @property
    def columns(self) -> int:
        return self._sum.shape[0]

    def update(self, x: Tensor) -> None:
        """Add inputs ``[..., K]`` of any float dtype. NaN is found by `value`."""
        if x.shape[-1] != self.columns:
            raise QuantkitError(f"inputs have {x.shape[-1]} columns, the layer {self.columns}")
        tokens = x.detach().reshape(-1, self.columns)
        on_cpu = self._sum.device.type == "cpu"
        step = self.COLUMNS if on_cpu else max(self.columns, 1)  # GPUs want one large product
        for chunk in tokens.split(self.TOKENS):
            wide = chunk.to(self._sum.device, torch.float32)
            for start in range(0, self.columns, step):
                stop = min(start + step, self.columns)
                self._sum[start:stop, :stop].addmm_(wide[:, start:stop].T, wide[:, :stop])
        self.count += len(tokens)

    def merge(self, other: HessianAccumulator) -> HessianAccumulator:
        """The accumulator of the tokens of both."""
        if self.columns != other.columns:
            raise QuantkitError(f"cannot merge {self.columns} columns with {other.columns}")
        merged = HessianAccumulator(self.columns, self._sum.device)
        merged._sum = self._sum + other._sum.to(self._sum.device)
        merged.count = self.count + other.count
        return merged

    def value(self) -> Tensor:
        """H, symmetric fp32 ``[K, K]``.

        Raises:
            QuantkitError: no tokens, or NaN or infinite inputs. By Cauchy–Schwarz the
                diagonal shows them all: xᵢ·xⱼ is not finite only if xᵢ² or xⱼ² is not.
        """
        if self.count == 0:
            raise QuantkitError(
                "no tokens were observed", remedy="did every calibration batch reach this layer?"
            )
        bad = int((~self._sum.diagonal().isfinite()).sum())
        if bad:
            raise QuantkitError(
                f"inputs hold NaN or infinite values in {bad} of {self.columns} columns",
                remedy="run the model in bfloat16 or float32, and check the checkpoint",
            )
        lower = self._sum.tril()
        return lower.add_(lower.tril(-1).T).div_(self.count)

    def state(self) -> dict[str, Tensor]:
        """Sums and count, for storage."""
        return {"sum": self._sum.tril(), "count": torch.tensor(self.count)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> HessianAccumulator:
        """The inverse of `state`."""
        accumulator = cls(0)
        accumulator._sum, accumulator.count = state["sum"].clone(), int(state["count"])
        return accumulator
