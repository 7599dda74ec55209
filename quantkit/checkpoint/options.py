"""What GPTQ's, AWQ's and AutoRound's configs say of each layer: bits, group, zero points."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantkit.checkpoint.config import named_scheme
from quantkit.checkpoint.fields import as_flag, as_integer
from quantkit.errors import QuantkitError, UsageError
from quantkit.schemes import Granularity, QuantSpec, Scheme

#: Widths that these formats pack.
BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class LayerOptions:
    """How one layer is stored.

    Attributes:
        bits: of a code.
        group_size: inputs that share a scale; −1 for all of them.
        symmetric: every zero point is 2^(bits−1).
    """

    bits: int
    group_size: int
    symmetric: bool

    def changed(self, given: Mapping[str, Any]) -> LayerOptions:
        """With a layer's own values, spelled as in config.json.

        Raises:
            UsageError: bits or a group size that is no integer, or sym that is not true or false.
        """
        symmetric = as_flag(given.get("sym"), "sym")
        return replace(
            self,
            bits=as_integer(given.get("bits") or self.bits, "bits"),
            group_size=as_integer(given.get("group_size") or self.group_size, "group_size"),
            symmetric=self.symmetric if symmetric is None else symmetric,
        )

    def scheme(self) -> Scheme:
        """The scheme. Raises UsageError for a width that the formats do not pack."""
        if self.bits not in BITS:
            raise UsageError(f"bits {self.bits}: the format packs {', '.join(map(str, BITS))} bits")
        grouped = self.group_size > 0
        spec = QuantSpec(
            self.bits,
            granularity=Granularity.GROUP if grouped else Granularity.CHANNEL,
            group_size=self.group_size if grouped else None,
            symmetric=self.symmetric,
        )
        return named_scheme(spec, None)


@dataclass(frozen=True)
class Options:
    """Options of every layer.

    Attributes:
        usual: of layers that have none of their own.
        rules: (pattern, values): the first pattern found in a layer's name gives it values of its
            own; None leaves the layer out.
    """

    usual: LayerOptions
    rules: Sequence[tuple[re.Pattern[str], Mapping[str, Any] | None]] = ()

    def schemes(self, linears: Sequence[str], tensors: Collection[str]) -> dict[str, Scheme]:
        """The scheme of each layer that has a ``qweight``.

        Args:
            linears: the names of the model's linear layers.
            tensors: the names of the checkpoint's tensors.

        Raises:
            UsageError: bits that the format does not pack.
            QuantkitError: a layer that the config leaves out has one.
        """
        packed = [name for name in linears if f"{name}.qweight" in tensors]
        return {name: self._of(name).scheme() for name in packed}

    def _of(self, name: str) -> LayerOptions:
        for pattern, given in self.rules:
            if pattern.search(name):
                if given is None:
                    raise QuantkitError(
                        f"{name}: has a qweight where the config leaves it out "
                        f"({pattern.pattern!r})"
                    )
                return self.usual.changed(given)
        return self.usual


def read_usual(raw: Mapping[str, Any], *, default_symmetric: bool = True) -> LayerOptions:
    """What holds for every layer. Raises UsageError for a key that is missing or no integer."""
    for key in ("bits", "group_size"):
        if raw.get(key) is None:
            raise UsageError(f"quantization_config: has no {key!r}")
    bits, group = (as_integer(raw[key], key) for key in ("bits", "group_size"))
    return LayerOptions(bits, group, default_symmetric).changed(raw)


def compile_rule(pattern: str) -> re.Pattern[str]:
    """A pattern from a config. Raises UsageError for one that is no regular expression."""
    try:
        return re.compile(pattern)
    except re.error as e:
        raise UsageError(f"quantization_config: {pattern!r} is no regular expression ({e})") from e
