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

from collections.abc import Mapping
from typing import Any

from quantkit.errors import UsageError
from quantkit.observers.channels import ChannelMagnitudes
from quantkit.observers.extrema import MinMax, MovingAverage, Observer
from quantkit.observers.hessian import HessianAccumulator
from quantkit.observers.histogram import MSE, Entropy, Percentile

__all__ = [
    "MSE",
    "OBSERVERS",
    "OBSERVER_OPTIONS",
    "ChannelMagnitudes",
    "Entropy",
    "HessianAccumulator",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
    "make_observer",
]

#: To add an observer, write a class and add its row.
OBSERVERS: dict[str, type[MinMax]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "mse": MSE,
    "entropy": Entropy,
}

#: Name → the options that it takes; what `recipe.load_recipe` checks against.
OBSERVER_OPTIONS: dict[str, frozenset[str]] = {
    name: frozenset(cls.OPTIONS) for name, cls in OBSERVERS.items()
}


def make_observer(name: str, options: Mapping[str, Any] | None = None) -> MinMax:
    """A fresh observer by name.

    Raises:
        UsageError: unknown name or option, or a value out of range.
    """
    if name not in OBSERVERS:
        raise UsageError(f"unknown observer {name!r}", remedy=f"known: {', '.join(OBSERVERS)}")
    return OBSERVERS[name](**(options or {}))
