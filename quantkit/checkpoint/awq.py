"""AWQ's format, as AutoAWQ writes its GEMM layout: ``quant_method: awq``.

A linear layer ``[N, K]`` with 4-bit codes in groups of g inputs is

- ``qweight`` int32 ``[K, N/8]``: unsigned codes, packed along N;
- ``qzeros`` int32 ``[K/g, N/8]``: unsigned zero points, packed alike;
- ``scales`` fp16 ``[K/g, N]``;

and stands for ``scales · (code − zero)``. Of eight outputs that share a word, the nibbles hold
0, 2, 4, 6, 1, 3, 5, 7 from the lowest up, which suits the CUDA kernel's conversion of pairs.
Source: AutoAWQ, ``awq/modules/linear/gemm.py`` (WQLinear_GEMM.from_linear).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.fields import as_flag
from quantkit.checkpoint.gptq import check_symmetric, check_words
from quantkit.checkpoint.layer import LayerTensors, StoredLayer
from quantkit.checkpoint.options import Options, read_usual
from quantkit.errors import UsageError
from quantkit.numerics import QTensor
from quantkit.schemes import QuantSpec, Scheme

#: The output, of eight, that each nibble of a word holds.
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class AwqReader:
    """Reads one checkpoint.

    Attributes:
        name: of the format, for people.
        options: of its layers.
    """

    name: str
    options: Options

    def schemes(self, linears: Sequence[str], tensors: Collection[str]) -> dict[str, Scheme]:
        """Each quantized layer's scheme, by the layer's name."""
        found = self.options.schemes(linears, tensors)
        for name, scheme in found.items():
            if scheme.weight.bits != 4:
                raise UsageError(
                    f"{name}: bits {scheme.weight.bits}, and AWQ's gemm layout packs 4"
                )
        return found

    def layer(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str
    ) -> StoredLayer:
        """A layer from its tensors, the bias aside.

        Raises:
            QuantkitError: a tensor is missing, unknown, or not what the config says.
        """
        spec, parts = scheme.weight, LayerTensors(name, tensors)
        n, k = shape
        groups = spec.scale_shape(shape)[-1]
        check_words(n, spec.bits, name)
        codes = _unpack(parts.take("qweight", (k, n // 8), torch.int32))
        zero = _unpack(parts.take("qzeros", (groups, n // 8), torch.int32))
        scale = parts.take_scales("scales", (groups, n)).t().contiguous()
        parts.check_all_read()
        if spec.symmetric:
            check_symmetric(zero, name, "zero_point: false")
            return StoredLayer(QTensor(codes, scale, None, spec))
        return StoredLayer(QTensor(codes, scale, zero, spec))

    def cache_spec(self) -> QuantSpec | None:
        """None: the format holds no scales of keys and values."""
        return None

    def hadamards(self) -> Mapping[str, int]:
        """None: the format holds no rotations."""
        return {}


def open_awq(raw: Mapping[str, Any]) -> AwqReader:
    """A reader for config.json's ``quantization_config``.

    Raises:
        UsageError: a variant of the format that quantkit does not read.
    """
    version = str(raw.get("version") or "gemm").lower()
    if version != "gemm":
        raise UsageError(
            f"version {version!r}: quantkit reads AWQ's gemm layout",
            remedy="save the model with version gemm",
        )
    symmetric = as_flag(raw.get("zero_point"), "zero_point") is False
    return AwqReader("AWQ gemm", Options(read_usual(raw, default_symmetric=symmetric)))


def _unpack(words: Tensor) -> Tensor:
    """int32 ``[R, N/8]`` → int8 ``[N, R]``: the unsigned codes less 8."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    nibbles = (words.unsqueeze(-1) >> shifts) & 15
    codes = torch.empty_like(nibbles)
    codes[..., list(NIBBLES)] = nibbles
    return (codes.flatten(1) - 8).to(torch.int8).t().contiguous()
