"""The second moments of a layer's input, which GPTQ solves with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quantkit import ops
from quantkit.errors import QuantkitError

#: Inputs that the native kernel reads as they are; any other is converted to fp32.
NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class HessianAccumulator:
    """H = (1/n)·Σ xᵀx over n tokens x ``[1, K]``: second moments of a layer's input, fp32.

    GPTQ's objective is tr(ΔW·H·ΔWᵀ), the mean squared error of a layer's output over tokens.
    Frantar et al. (2022) write 2·Σ xᵀx; the factor changes neither the solution nor, damping
    being relative to the diagonal, the damped one. Dividing by n makes the objective
    comparable between layers and runs.

    Products of bf16 values are exact in fp32. Sums over a few hundred tokens are fp32, those of
    all fp64, so that it makes no difference in which order, or by how many processes, batches are
    added: GPTQ decides its codes by the last digits. Only the lower triangle is accumulated.

    Args:
        columns: K, the layer's in_features.
        device: where the sums live; inputs are moved there.
        kernels: ``native`` for `quantkit.ops.syrk_accumulate`; ``reference`` for matrix
            products in torch, which any device but a CPU gets.
    """

    #: Tokens upcast at a time in torch: K · 16 KiB.
    TOKENS = 4096

    #: Columns in a block of torch's on a CPU: at K = 1536 the blocks cover 9/16 of the square.
    COLUMNS = 192

    def __init__(
        self, columns: int, device: torch.device | str = "cpu", kernels: str = "native"
    ) -> None:
        self.count = 0
        self.kernels = kernels
        self._sum = torch.zeros(columns, columns, dtype=torch.float64, device=device)

    @property
    def columns(self) -> int:
        return self._sum.shape[0]

    def update(self, x: Tensor) -> None:
        """Add inputs ``[..., K]`` of any float dtype. NaN is found by `value`."""
        if x.shape[-1] != self.columns:
            raise QuantkitError(f"inputs have {x.shape[-1]} columns, the layer {self.columns}")
        tokens = x.detach().reshape(-1, self.columns)
        if self._sum.device.type == "cpu" and self.kernels == "native":
            dtype = tokens.dtype if tokens.dtype in NATIVE_DTYPES else torch.float32
            ops.syrk_accumulate(self._sum, tokens.to("cpu", dtype))
        else:
            self._update_in_torch(tokens)
        self.count += len(tokens)

    def _update_in_torch(self, tokens: Tensor) -> None:
        """Column blocks of the lower half, each added to its place."""
        on_cpu = self._sum.device.type == "cpu"
        step = self.COLUMNS if on_cpu else max(self.columns, 1)  # GPUs want one large product
        for chunk in tokens.split(self.TOKENS):
            wide = chunk.to(self._sum.device, torch.float32)
            for start in range(0, self.columns, step):
                stop = min(start + step, self.columns)
                self._sum[start:stop, :stop] += wide[:, start:stop].T @ wide[:, :stop]

    def pool(self, add: Callable[[Tensor], None], count: int) -> None:
        """Take in what others saw, where sums lie in other processes.

        Args:
            add: adds the others' sums to the tensor that it is given.
            count: tokens of all.
        """
        add(self._sum)
        self.count = count

    def merge(self, other: HessianAccumulator) -> HessianAccumulator:
        """The accumulator of the tokens of both."""
        if self.columns != other.columns:
            raise QuantkitError(f"cannot merge {self.columns} columns with {other.columns}")
        merged = HessianAccumulator(self.columns, self._sum.device, self.kernels)
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
        # Row by row: a second matrix of doubles would be the largest thing in memory.
        lower = torch.empty(self._sum.shape, dtype=torch.float32, device=self._sum.device)
        for rows, sums in zip(
            lower.split(self.COLUMNS), self._sum.split(self.COLUMNS), strict=True
        ):
            rows.copy_(sums / self.count)
        lower.tril_()
        return lower.add_(lower.tril(-1).T)

    def state(self) -> dict[str, Tensor]:
        """Sums and count, for storage."""
        return {"sum": self._sum.tril(), "count": torch.tensor(self.count)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> HessianAccumulator:
        """The inverse of `state`."""
        accumulator = cls(0)
        accumulator._sum, accumulator.count = state["sum"].clone(), int(state["count"])
        return accumulator
