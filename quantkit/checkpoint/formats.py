"""The checkpoint formats that quantkit reads: one reader each.

A reader says which layers are quantized and how, and makes a layer from its tensors. Nothing is
dequantized: what no scheme can hold is an error. See docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from quantkit.checkpoint.auto_round import open_auto_round
from quantkit.checkpoint.awq import open_awq
from quantkit.checkpoint.config import read_cache_spec, read_config, read_hadamards
from quantkit.checkpoint.fields import as_object
from quantkit.checkpoint.gptq import open_gptq
from quantkit.checkpoint.layer import StoredLayer
from quantkit.checkpoint.tensors import from_disk
from quantkit.errors import QuantkitError, UsageError
from quantkit.schemes import QuantSpec, Scheme


class Reader(Protocol):
    """Reads one checkpoint; ``name`` is the format's, for people."""

    @property
    def name(self) -> str: ...

    def schemes(self, linears: Sequence[str], tensors: Collection[str]) -> dict[str, Scheme]:
        """Each quantized layer's scheme, among the model's linear layers and stored tensors."""

    def layer(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str
    ) -> StoredLayer:
        """A layer ``shape = (N, K)`` from its tensors by local name, the bias aside."""

    def cache_spec(self) -> QuantSpec | None:
        """How keys and values are quantized, or None."""

    def hadamards(self) -> Mapping[str, int]:
        """The order of the Hadamard matrix that multiplies a layer's input, for those with one."""


@dataclass(frozen=True)
class CompressedTensorsReader:
    """Reads compressed-tensors: llm-compressor's checkpoints and quantkit's own."""

    raw: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"compressed-tensors {self.raw.get('format', '')}".rstrip()

    def schemes(self, linears: Sequence[str], tensors: Collection[str]) -> dict[str, Scheme]:
        """By the config's targets. Raises QuantkitError for tensors of another format than the
        config says."""
        return read_config(self.raw, linears, tensors)

    def layer(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str
    ) -> StoredLayer:
        """See `quantkit.checkpoint.tensors.from_disk`. Raises QuantkitError for a Hadamard matrix
        whose order does not divide the layer's inputs."""
        order = self._hadamards.get(name, 0)
        if order and shape[1] % order:
            raise QuantkitError(
                f"{name}: a Hadamard matrix of order {order} for {shape[1]} inputs",
                remedy="the config is of another checkpoint, or was edited; copy it again",
            )
        return replace(from_disk(tensors, scheme, shape, name), hadamard=order)

    def cache_spec(self) -> QuantSpec | None:
        """See `quantkit.checkpoint.config.read_cache_spec`."""
        return read_cache_spec(self.raw)

    def hadamards(self) -> Mapping[str, int]:
        """See `quantkit.checkpoint.config.read_hadamards`."""
        return self._hadamards

    @cached_property
    def _hadamards(self) -> Mapping[str, int]:
        return read_hadamards(self.raw)


def open_compressed_tensors(raw: Mapping[str, Any]) -> CompressedTensorsReader:
    """A reader for config.json's ``quantization_config``, or the one that it holds: transformers
    takes it one level below, too (``CompressedTensorsConfig.from_dict``)."""
    inner = raw.get("quantization_config")
    if inner is None:
        return CompressedTensorsReader(raw)
    beside = {key: value for key, value in raw.items() if key != "quantization_config"}
    return CompressedTensorsReader(beside | as_object(inner, "quantization_config"))


#: ``quant_method`` → what makes a reader of config.json's ``quantization_config``. To add a format,
#: add a file and a row.
READERS: dict[str, Callable[[Mapping[str, Any]], Reader]] = {
    "compressed-tensors": open_compressed_tensors,
    "gptq": open_gptq,
    "awq": open_awq,
    "auto-round": open_auto_round,
    "intel/auto-round": open_auto_round,
}


def open_format(raw: Mapping[str, Any]) -> Reader:
    """The reader for config.json's ``quantization_config``.

    Raises:
        UsageError: a method that has no reader, or a variant that its reader does not know.
    """
    method = raw.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        raise UsageError(
            f"quant_method {method!r}: quantkit reads {', '.join(READERS)} checkpoints",
            remedy="export the model to one of them, or start from the original",
        )
    return READERS[method](raw)
