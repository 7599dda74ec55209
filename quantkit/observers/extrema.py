"""Observers that keep extrema only, and what an observer is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from quantkit.errors import QuantkitError, UsageError
from quantkit.schemes import QuantSpec


class Observer(Protocol):
    """What turns a stream of values into the range that a scale is computed from."""

    def update(self, x: Tensor) -> None:
        """Add the values of a tensor of any shape.

        Raises:
            QuantkitError: it holds NaN or infinite values.
        """

    def merge(self, other: Self) -> Self:
        """What one observer would hold that saw the values of both, this one's first."""

    def range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """fp32 scalars (minimum, maximum) for one scale under this spec."""

    def state(self) -> dict[str, Tensor]:
        """All that was observed, for storage; without the options."""

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], **options: Any) -> Self:
        """The observer that had this state and these options."""


class MinMax:
    """The smallest and the largest value. The base of the other observers."""

    #: What recipes call it.
    NAME: ClassVar[str] = "minmax"

    #: Option → default.
    OPTIONS: ClassVar[dict[str, float]] = {}

    def __init__(self, **options: Any) -> None:
        self.options = _checked_options(self.NAME, self.OPTIONS, options)
        self.low, self.high = math.inf, -math.inf

    def update(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        values = x.detach().reshape(-1)
        low, high = (float(v) for v in torch.aminmax(values))  # NaN propagates
        if not (math.isfinite(low) and math.isfinite(high)):
            nans, infinite = int(values.isnan().sum()), int(values.isinf().sum())
            raise QuantkitError(
                f"activations {tuple(x.shape)} hold {nans} NaN and {infinite} infinite values",
                remedy="run the model in bfloat16 or float32, and check the checkpoint",
            )
        self._add(values, low, high)
        self.low, self.high = min(self.low, low), max(self.high, high)

    def merge(self, other: Self) -> Self:
        if type(self) is not type(other) or self.options != other.options:
            raise QuantkitError(f"cannot merge {self!r} with {other!r}: they differ in kind")
        merged = self.from_state(self.state(), **self.options)
        merged._join(other)
        merged.low, merged.high = min(self.low, other.low), max(self.high, other.high)
        return merged

    def range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        if self.low > self.high:
            raise QuantkitError(
                "no values were observed", remedy="did every calibration batch reach this layer?"
            )
        low, high = (self.low, self.high) if self.low == self.high == 0 else self._range(spec)
        return torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)

    def state(self) -> dict[str, Tensor]:
        return {
            "low": torch.tensor(self.low, dtype=torch.float64),
            "high": torch.tensor(self.high, dtype=torch.float64),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], **options: Any) -> Self:
        observer = cls(**options)
        observer.low, observer.high = float(state["low"]), float(state["high"])
        return observer

    def __repr__(self) -> str:
        return f"{self.NAME}({', '.join(f'{k}={v}' for k, v in self.options.items())})"

    def _add(self, values: Tensor, low: float, high: float) -> None:
        """Add flat finite values with these extrema; ``self.low`` and ``high`` follow."""

    def _join(self, other: Self) -> None:
        """Add what a later observer holds; ``self.low`` and ``high`` follow."""

    def _range(self, spec: QuantSpec) -> tuple[float, float]:
        return self.low, self.high


class MovingAverage(MinMax):
    """Exponential moving average of each batch's extrema, so that one odd batch counts little.

    A batch is one `update`. With the decay d, batch i of n weighs d^(n−1−i), and the weights
    are normalized to one (the bias correction of Adam, Kingma and Ba 2015, §3), so that a
    short run is a plain mean and not the first batch.

    The state is Σ d^(n−1−i)·(low_i, high_i) with n; merging multiplies the earlier sums by
    d^(later n), which is associative, with the empty observer as identity. It is not
    commutative: the later batches are the ones of the argument.
    """

    NAME = "moving_average"
    OPTIONS: ClassVar[dict[str, float]] = {"decay": 0.99}

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not 0 <= self.options["decay"] < 1:
            raise UsageError(f"moving_average: decay {self.options['decay']} is not in [0, 1)")
        self.batches, self.low_sum, self.high_sum = 0, 0.0, 0.0

    def state(self) -> dict[str, Tensor]:
        return super().state() | {
            "batches": torch.tensor(self.batches),
            "low_sum": torch.tensor(self.low_sum, dtype=torch.float64),
            "high_sum": torch.tensor(self.high_sum, dtype=torch.float64),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], **options: Any) -> Self:
        observer = super().from_state(state, **options)
        observer.batches = int(state["batches"])
        observer.low_sum, observer.high_sum = float(state["low_sum"]), float(state["high_sum"])
        return observer

    def _add(self, values: Tensor, low: float, high: float) -> None:
        self._append(1, low, high)

    def _join(self, other: Self) -> None:
        self._append(other.batches, other.low_sum, other.high_sum)

    def _append(self, batches: int, low_sum: float, high_sum: float) -> None:
        fade = self.options["decay"] ** batches
        self.low_sum = self.low_sum * fade + low_sum
        self.high_sum = self.high_sum * fade + high_sum
        self.batches += batches

    def _range(self, spec: QuantSpec) -> tuple[float, float]:
        decay = self.options["decay"]
        weight = (1 - decay**self.batches) / (1 - decay)
        return self.low_sum / weight, self.high_sum / weight


def _checked_options(
    name: str, defaults: Mapping[str, float], given: Mapping[str, Any]
) -> dict[str, float]:
    for key, value in given.items():
        if key not in defaults:
            known = ", ".join(defaults) or "none"
            raise UsageError(f"{name}: unknown option {key!r}", remedy=f"known: {known}")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UsageError(f"{name}: {key} {value!r} is not a number")
    return {**defaults, **{key: float(value) for key, value in given.items()}}
