"""Several observers over one stream, for choosing the range that serves a layer best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

from torch import Tensor

from quantkit.errors import QuantkitError, UsageError
from quantkit.observers.extrema import MinMax, MovingAverage
from quantkit.observers.histogram import MSE, Entropy, Histogram, Percentile
from quantkit.schemes import QuantSpec

#: To add an observer, write a class and add its row.
OBSERVERS: dict[str, type[MinMax]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "mse": MSE,
    "entropy": Entropy,
}

#: What a recipe calls the choice among several observers.
AUTO = "auto"

#: What ``auto`` tries by default.
DEFAULT_CANDIDATES: tuple[Any, ...] = (
    "minmax",
    "moving_average",
    {"percentile": {"p": 99.9999}},
    {"percentile": {"p": 99.999}},
    {"percentile": {"p": 99.99}},
    {"percentile": {"p": 99.9}},
    {"percentile": {"p": 99.5}},
    "mse",
    "entropy",
)

#: Name → the options that it takes; what `recipe.load_recipe` checks against.
OBSERVER_OPTIONS: dict[str, frozenset[str]] = {
    **{name: frozenset(cls.OPTIONS) for name, cls in OBSERVERS.items()},
    AUTO: frozenset({"candidates"}),
}


def make_observer(name: str, options: Mapping[str, Any] | None = None) -> MinMax:
    """A fresh observer by name.

    Raises:
        UsageError: unknown name or option, or a value out of range.
    """
    if name not in OBSERVERS:
        raise UsageError(f"unknown observer {name!r}", remedy=f"known: {', '.join(OBSERVERS)}")
    return OBSERVERS[name](**(options or {}))


class Candidates:
    """Observers that see the same values. Those that keep the same statistics share them.

    Args:
        observers: fresh ones, no two alike.

    Raises:
        UsageError: none, or two alike.
    """

    def __init__(self, observers: Sequence[MinMax]) -> None:
        self.observers = {repr(observer): observer for observer in observers}
        if not observers or len(self.observers) < len(observers):
            raise UsageError(
                f"observer candidates {[repr(o) for o in observers]}: one or more are needed, "
                "no two alike"
            )
        histogram = any(isinstance(o, Histogram) for o in observers)
        self._kept: dict[str, MinMax] = {}
        self._keeper: dict[str, str] = {}
        for label, observer in self.observers.items():
            # Extrema are part of a histogram's state.
            shares = isinstance(observer, Histogram) or (histogram and type(observer) is MinMax)
            keeper = Histogram() if shares else observer
            self._keeper[label] = "histogram" if shares else label
            self._kept.setdefault(self._keeper[label], keeper)

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any] | None = None) -> Candidates:
        """The observers that a recipe's ``observer`` stands for: one, or those of ``auto``.

        Raises:
            UsageError: unknown name or option, or a value out of range.
        """
        options = dict(options or {})
        if name != AUTO:
            return cls([make_observer(name, options)])
        given = options.pop("candidates", DEFAULT_CANDIDATES)
        if options:
            raise UsageError(f"{AUTO}: unknown option {min(options)!r}", remedy="known: candidates")
        if not isinstance(given, list | tuple):
            raise UsageError(f"{AUTO}: candidates {given!r} is not a list of observers")
        return cls([_candidate(each) for each in given])

    def update(self, x: Tensor) -> None:
        """Add the values of a tensor of any shape.

        Raises:
            QuantkitError: it holds NaN or infinite values.
        """
        for keeper in self._kept.values():
            keeper.update(x)

    def merge(self, other: Candidates) -> Candidates:
        """What one would hold that saw the values of both, this one's first.

        Raises:
            QuantkitError: they hold other observers.
        """
        if list(self.observers) != list(other.observers):
            raise QuantkitError(
                f"cannot merge observers {list(self.observers)} with {list(other.observers)}"
            )
        merged = copy(self)
        merged._kept = {key: o.merge(other._kept[key]) for key, o in self._kept.items()}
        return merged

    def ranges(self, spec: QuantSpec) -> dict[str, tuple[Tensor, Tensor]]:
        """fp32 scalars (minimum, maximum) by the observer's label, such as
        ``percentile(p=99.9)``, in the order given.

        Raises:
            QuantkitError: nothing was observed.
            UsageError: an observer does not go with the spec.
        """
        states = {key: keeper.state() for key, keeper in self._kept.items()}
        return {
            label: type(o).from_state(states[self._keeper[label]], **o.options).range(spec)
            for label, o in self.observers.items()
        }


def _candidate(given: Any) -> MinMax:
    """``name`` or ``{name: {option: value}}``."""
    if isinstance(given, str):
        return make_observer(given)
    if isinstance(given, Mapping) and len(given) == 1:
        name, options = next(iter(given.items()))
        if options is None or isinstance(options, Mapping):
            return make_observer(name, options)
    raise UsageError(
        f"{AUTO}: candidate {given!r} is neither a name nor one name with its options",
        remedy="write minmax or {percentile: {p: 99.9}}",
    )
