"""GPTQ's format, as AutoGPTQ and GPTQModel write it: ``quant_method: gptq``.

A linear layer ``[N, K]`` with b-bit codes in groups of g inputs is

- ``qweight`` int32 ``[K·b/32, N]``: unsigned codes, packed along K, the first in the lowest bits;
- ``qzeros`` int32 ``[K/g, N·b/32]``: unsigned zero points, packed along N;
- ``scales`` fp16 ``[K/g, N]``;
- ``g_idx`` int32 ``[K]``: the group of each input, where it is stored;

and stands for ``scales[g_idx[k], n] · (code[k, n] − zero[g_idx[k], n])``. Version 1
(``checkpoint_format: gptq``, the default) stores zero points less one, version 2 (``gptq_v2``)
as they are. Source: AutoGPTQ, ``auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py``; GPTQModel,
``gptqmodel/utils/model.py`` (convert_gptq_v1_to_v2_format).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit import packing
from quantkit.checkpoint.fields import as_flag, as_object
from quantkit.checkpoint.layer import LayerTensors, StoredLayer, column_order
from quantkit.checkpoint.options import Options, compile_rule, read_usual
from quantkit.errors import QuantkitError, UsageError
from quantkit.numerics import QTensor
from quantkit.schemes import QuantSpec, Scheme

#: ``checkpoint_format`` → what a stored zero point lacks.
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True)
class GptqReader:
    """Reads one checkpoint.

    Attributes:
        name: of the format, for people.
        zero_offset: what a stored zero point lacks.
        options: of its layers.
        scattered: columns of a group may lie anywhere, so that each layer must say where.
    """

    name: str
    zero_offset: int
    options: Options
    scattered: bool = False

    def schemes(self, linears: Sequence[str], tensors: Collection[str]) -> dict[str, Scheme]:
        """Each quantized layer's scheme, by the layer's name."""
        return self.options.schemes(linears, tensors)

    def layer(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str
    ) -> StoredLayer:
        """A layer from its tensors, the bias aside.

        Raises:
            QuantkitError: a tensor is missing, unknown, or not what the config says.
            UsageError: zero points or groups that quantkit cannot hold.
        """
        spec, parts = scheme.weight, LayerTensors(name, tensors)
        (n, k), bits = shape, spec.bits
        groups = spec.scale_shape(shape)[-1]
        for size in shape:
            check_words(size, bits, name)
        words = parts.take("qweight", (k * bits // 32, n), torch.int32)
        zero_words = parts.take("qzeros", (groups, n * bits // 32), torch.int32)
        scale = parts.take_scales("scales", (groups, n)).t().contiguous()
        codes = packing.unpack_int(words.t(), bits, (n, k))
        zero = packing.unpack_int(zero_words, bits, (groups, n)).t().contiguous()
        columns, order = parts.find("g_idx"), None
        if columns is not None and columns.numel():
            order = column_order(parts.take("g_idx", (k,)), groups, name)
        elif self.scattered and groups > 1:
            raise QuantkitError(
                f"{name}.g_idx: missing, where desc_act puts columns of a group anywhere",
                remedy="the file is incomplete, or desc_act is not what it was quantized with",
            )
        parts.check_all_read()
        if order is not None:
            codes = codes[:, order].contiguous()
        return StoredLayer(QTensor(codes, scale, self._zero(zero, spec, name), spec), order=order)

    def cache_spec(self) -> QuantSpec | None:
        """None: the format holds no scales of keys and values."""
        return None

    def hadamards(self) -> Mapping[str, int]:
        """None: the format holds no rotations."""
        return {}

    def _zero(self, stored: Tensor, spec: QuantSpec, name: str) -> Tensor | None:
        """Signed zero points, or None for a symmetric layer, where all must be in the middle."""
        if self.zero_offset and bool((stored == int(spec.qmax)).any()):
            raise UsageError(
                f"{name}.qzeros: a stored zero point of {2**spec.bits - 1}, which version 1 of "
                f"the format means as 0 or as {2**spec.bits}, depending on who wrote it",
                remedy="save the model in version 2 (checkpoint_format: gptq_v2)",
            )
        zero = stored + self.zero_offset
        if not spec.symmetric:
            return zero
        check_symmetric(zero, name, "sym: true")
        return None


def check_words(size: int, bits: int, name: str) -> None:
    """Raise UsageError for a row or column of codes that ends within a word."""
    if size * bits % 32:
        raise UsageError(
            f"{name}: {size} codes of {bits} bits do not fill words of 32 bits, which is how the "
            "format stores them",
            remedy="the config does not belong to this model",
        )


def check_symmetric(zero: Tensor, name: str, claim: str) -> None:
    """Raise QuantkitError for signed zero points other than 0 where the config says symmetric."""
    if zero.count_nonzero():
        raise QuantkitError(
            f"{name}.qzeros: {int(zero.count_nonzero())} of {zero.numel()} zero points are not "
            f"in the middle, where the config says {claim}",
            remedy="the config, or its version of the format, does not belong to these tensors",
        )


def open_gptq(raw: Mapping[str, Any]) -> GptqReader:
    """A reader for config.json's ``quantization_config``.

    Raises:
        UsageError: a variant of the format that quantkit does not read.
    """
    fmt = raw.get("checkpoint_format") or "gptq"
    if raw.get("is_marlin_format"):
        fmt = "marlin"
    if not isinstance(fmt, str) or fmt not in ZERO_OFFSETS:
        raise UsageError(
            f"checkpoint_format {fmt!r}: not one that quantkit reads",
            remedy=f"save the model as {' or '.join(ZERO_OFFSETS)}",
        )
    if raw.get("pack_dtype") not in (None, "int32"):
        raise UsageError(
            f"pack_dtype {raw['pack_dtype']!r}: quantkit reads words of int32",
            remedy="save the model with pack_dtype int32",
        )
    dynamic = as_object(raw.get("dynamic") or {}, "dynamic")
    rules = [_rule(key, as_object(given, f"dynamic {key!r}")) for key, given in dynamic.items()]
    flags = {key: as_flag(raw.get(key), key) for key in ("desc_act", "static_groups")}
    return GptqReader(
        f"GPTQ version {2 - ZERO_OFFSETS[fmt]}",
        ZERO_OFFSETS[fmt],
        Options(read_usual(raw), rules),
        scattered=bool(flags["desc_act"] and not flags["static_groups"]),
    )


def _rule(key: str, given: Mapping[str, Any]) -> tuple[re.Pattern[str], Mapping[str, Any] | None]:
    """GPTQModel's ``dynamic``: ``+:regex`` or ``regex`` sets values, ``-:regex`` leaves out; it
    matches from the start of a layer's name."""
    pattern = compile_rule(rf"\A(?:{re.sub(r'^[+-]:', '', key)})")
    return pattern, None if key.startswith("-:") else given
