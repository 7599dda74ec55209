"""Observers that choose a range by the distribution of the values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from quantkit import numerics
from quantkit.errors import UsageError
from quantkit.observers.extrema import MinMax
from quantkit.schemes import QuantSpec

#: log2 of the bins on each side of zero: 32 of them to a step of int8 over the full range,
#: and still 4 where the best range is an eighth of it.
SIDE_BITS = 12
_SIDE = 1 << SIDE_BITS

#: Smallest histogram range is 2**-100: below it the factor that turns values into bin numbers
#: leaves fp32.
_MIN_EXPONENT = -100

#: Values binned at a time: temporaries stay in the cache and below 16 MB.
_CHUNK = 1 << 20


class Histogram(MinMax):
    """Base of the observers that need the distribution.

    Counts over [−2^e, 2^e) in 2·2^SIDE_BITS equal bins, with the smallest e that holds all
    values. A range that must grow doubles, and each pair of neighbouring bins becomes one.
    As bin widths are powers of two, that gives the same counts as binning everything at the
    final width: the histogram depends on the values alone, neither on their order nor on the
    batches, which is what makes merging exact.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.exponent = _MIN_EXPONENT
        self.counts = torch.zeros(2 * _SIDE, dtype=torch.int64)

    @property
    def width(self) -> float:
        """Of a bin, in units of the values."""
        return math.ldexp(1.0, self.exponent - SIDE_BITS)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {
            "counts": self.counts.clone(),
            "exponent": torch.tensor(self.exponent),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], **options: Any) -> Self:
        observer = super().from_state(state, **options)
        observer.counts, observer.exponent = state["counts"].clone(), int(state["exponent"])
        return observer

    def _add(self, values: Tensor, low: float, high: float) -> None:
        absmax = max(-low, high)
        if absmax > 0:  # zeros fit any range; frexp would give them 2^0
            self._grow(math.frexp(absmax)[1])  # |value| < 2^exponent
        # Past 2^SIDE_BITS the factor is below one: tiny negative values would underflow to
        # zero in fp32, and fall on the other side of it.
        wide = values.dtype == torch.float64 or self.exponent > SIDE_BITS
        for chunk in values.split(_CHUNK):
            bins = torch.floor(chunk.to(torch.float64 if wide else torch.float32) / self.width)
            index = bins.to(torch.int32) + _SIDE
            self.counts += torch.bincount(index, minlength=2 * _SIDE).cpu()

    def _join(self, other: Self) -> None:
        self._grow(other.exponent)
        self.counts += _coarsened(other.counts, self.exponent - other.exponent)

    def _grow(self, exponent: int) -> None:
        if exponent > self.exponent:
            self.counts = _coarsened(self.counts, exponent - self.exponent)
            self.exponent = exponent

    def _magnitudes(self) -> Tensor:
        """Counts of |value|: bin i holds [i·width, (i + 1)·width)."""
        return self.counts[_SIDE:] + self.counts[:_SIDE].flip(0)

    def _within(self, threshold: float) -> tuple[float, float]:
        """The observed range, extended to hold zero, cut to ±threshold."""
        return max(min(self.low, 0.0), -threshold), min(max(self.high, 0.0), threshold)


def _coarsened(counts: Tensor, doublings: int) -> Tensor:
    """Counts over a range that is 2^doublings times as wide, with as many bins."""
    if doublings == 0:
        return counts
    signed = torch.arange(-_SIDE, _SIDE) >> min(doublings, 62)  # floors, so negatives reach −1
    return torch.zeros_like(counts).index_add_(0, signed + _SIDE, counts)


class Percentile(Histogram):
    """The range that holds p percent of the values, to a bin's width, never less.

    A symmetric spec drops the largest magnitudes; an asymmetric one drops half of the share
    in each tail.
    """

    NAME = "percentile"
    OPTIONS: ClassVar[dict[str, float]] = {"p": 99.99}

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not 50 < self.options["p"] <= 100:
            raise UsageError(f"percentile: p {self.options['p']} is not in (50, 100]")

    def _range(self, spec: QuantSpec) -> tuple[float, float]:
        share = (100.0 - self.options["p"]) / 100.0
        if spec.symmetric:
            return self._within(_bins_that_hold(self._magnitudes(), share) * self.width)
        from_below = _bins_that_hold(self.counts, share / 2) - _SIDE
        from_above = _SIDE - _bins_that_hold(self.counts.flip(0), share / 2)
        return max(self.low, from_above * self.width), min(self.high, from_below * self.width)


def _bins_that_hold(counts: Tensor, dropped_share: float) -> int:
    """How many bins from the start hold all but this share of the counts."""
    total = int(counts.sum())
    needed = total - math.floor(total * dropped_share)
    return int(torch.searchsorted(counts.cumsum(0), needed)) + 1


class MSE(Histogram):
    """The range whose quantization error, squared and averaged, is smallest.

    Candidates are absmax·2^(−j/16) down to absmax/256, then 16 steps around the best one.
    Each is judged by quantizing the bin centres with the arithmetic of `numerics`, so that
    integer grids, E4M3 rounding and saturation all count as they are.
    """

    NAME = "mse"

    def _range(self, spec: QuantSpec) -> tuple[float, float]:
        absmax = max(-self.low, self.high)
        octaves = torch.arange(0, 129, dtype=torch.float64) / 16
        best = octaves[self._errors(absmax * torch.exp2(-octaves), spec).argmin()]
        finer = (best + torch.arange(-8, 9, dtype=torch.float64) / 128).clamp(min=0)
        best = finer[self._errors(absmax * torch.exp2(-finer), spec).argmin()]
        return self._within(absmax * 2.0 ** -float(best))

    def _errors(self, thresholds: Tensor, spec: QuantSpec) -> Tensor:
        """Mean squared error of each threshold; ``[C]`` → ``[C]``, fp64."""
        filled = self.counts.nonzero().squeeze(1)
        centres = ((filled - _SIDE).double() + 0.5) * self.width
        weights = self.counts[filled].double() / self.counts.sum()
        low = (-thresholds).clamp(min=min(self.low, 0.0)).float().unsqueeze(1)
        high = thresholds.clamp(max=max(self.high, 0.0)).float().unsqueeze(1)
        scale, zero = numerics.compute_scales(low, high, spec)
        offset = torch.zeros_like(scale) if zero is None else zero.float()
        codes = numerics.round_to_codes(centres.float() / scale + offset, spec)
        return ((codes - offset) * scale - centres).double().square() @ weights


class Entropy(Histogram):
    """The threshold at which the quantized distribution says most about the original.

    Migacz, "8-bit inference with TensorRT" (GTC 2017): for each threshold, P is the histogram
    with what lies beyond it moved into the last bin, and Q spreads what falls on each code
    evenly over that code's filled bins; the smallest KL(P‖Q) wins. There the codes are 128
    equal runs of bins; here a bin's code is what `numerics` rounds its centre to, which is
    the same for int8 and extends to E4M3.
    """

    NAME = "entropy"

    #: Thresholds tried, evenly spaced.
    CANDIDATES = 256

    #: Probability of a bin that Q leaves empty and P does not: the last one, at times.
    FLOOR = 1e-7

    def _range(self, spec: QuantSpec) -> tuple[float, float]:
        if not spec.symmetric:
            raise UsageError(
                f"entropy: {spec.label()} is asymmetric, and the method needs a symmetric range",
                remedy="use mse or percentile",
            )
        counts = self._magnitudes().double()
        filled = int(counts.nonzero()[-1]) + 1
        levels = 2 ** (spec.bits - 1)
        tried = (
            torch.linspace(min(levels, filled), filled, self.CANDIDATES, dtype=torch.float32)
            .round()
            .int()
        )
        best = min(tried.unique().tolist(), key=lambda bins: self._divergence(counts, bins, spec))
        return self._within(best * self.width)

    def _divergence(self, counts: Tensor, bins: int, spec: QuantSpec) -> float:
        """KL(P‖Q) in nats of the range of this many bins."""
        inside = counts[:bins]
        p = inside.clone()
        p[-1] += counts[bins:].sum()
        threshold = torch.tensor(bins * self.width, dtype=torch.float32)
        scale, _ = numerics.compute_scales(-threshold, threshold, spec)
        centres = (torch.arange(bins, dtype=torch.float32) + 0.5) * self.width
        codes = numerics.round_to_codes(centres / scale, spec)
        _, run = torch.unique_consecutive(codes, return_inverse=True)
        mass = torch.zeros(bins, dtype=torch.float64).index_add_(0, run, inside)
        filled = torch.zeros(bins, dtype=torch.float64).index_add_(0, run, (inside > 0).double())
        q = torch.where(inside > 0, mass[run] / filled[run].clamp(min=1), 0.0)
        p, q = p / p.sum(), (q / q.sum().clamp(min=1)).clamp(min=self.FLOOR)
        return float(torch.where(p > 0, p * (p.clamp(min=1e-300) / q).log(), 0.0).sum())
