"""Streaming statistics of activations: ranges for static scales, channel magnitudes, Hessians.

Every observer is a monoid: observing two halves and merging gives what observing the whole
gives, so statistics can be cut into batches, resumed, or gathered from several places.

========================  ==============================================================
``minmax``                exact
``moving_average``        exact on the sequence of batches; order matters, grouping not
``percentile``            exact: histogram counts add
``mse``, ``entropy``      exact: histogram counts add
`HessianAccumulator`      up to the rounding of fp32 sums
`ChannelMagnitudes`       maxima exact, means up to the rounding of fp32 sums
========================  ==============================================================
"""

from __future__ import annotations

from quantkit.observers.candidates import (
    AUTO,
    OBSERVER_OPTIONS,
    OBSERVERS,
    Candidates,
    make_observer,
)
from quantkit.observers.channels import ChannelMagnitudes
from quantkit.observers.extrema import MinMax, MovingAverage, Observer
from quantkit.observers.hessian import HessianAccumulator
from quantkit.observers.histogram import MSE, Entropy, Percentile

__all__ = [
    "AUTO",
    "MSE",
    "OBSERVERS",
    "OBSERVER_OPTIONS",
    "Candidates",
    "ChannelMagnitudes",
    "Entropy",
    "HessianAccumulator",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
    "make_observer",
]
