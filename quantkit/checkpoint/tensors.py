"""A quantized layer ↔ its tensors on disk, in compressed-tensors' formats.

=====================  =====================================================================
format                 tensors of a linear layer ``[N, K]``
=====================  =====================================================================
pack-quantized         weight_packed int32 ``[N, ceil(K·b/32)]``, weight_scale, weight_shape
                       int64 ``[2]``; asymmetric: weight_zero_point int32
                       ``[ceil(N·b/32), K/g]``, packed along N
int-quantized          weight int8 ``[N, K]``, weight_scale; static: input_scale
float-quantized        weight float8_e4m3fn ``[N, K]``, weight_scale; static: input_scale
nvfp4-pack-quantized   weight_packed uint8 ``[N, K/2]``, weight_scale float8_e4m3fn,
                       weight_global_scale fp32 ``[1]``
mxfp4-pack-quantized   weight_packed uint8 ``[N, K/2]``, weight_scale uint8 (E8M0)
any, in groups         weight_g_idx int32 ``[K]`` where GPTQ scattered the groups' columns
=====================  =====================================================================
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit import packing
from quantkit.checkpoint.config import SCALE_DTYPES, format_name
from quantkit.checkpoint.layer import LayerTensors, StoredLayer, column_order
from quantkit.errors import QuantkitError, UsageError
from quantkit.numerics import QTensor
from quantkit.schemes import DType, Granularity, ScaleFormat, Scheme


def to_disk(q: QTensor, scheme: Scheme, input_scale: Tensor | None) -> dict[str, Tensor]:
    """The tensors of a layer by local name, such as ``weight_packed``."""
    fmt = format_name(scheme)
    tensors: dict[str, Tensor] = {"weight_scale": q.scale}
    if fmt == "pack-quantized":
        tensors["weight_packed"] = packing.pack_int(q.codes, q.spec.bits)
        tensors["weight_shape"] = torch.tensor(q.shape, dtype=torch.int64)
        if q.zero is not None:
            tensors["weight_zero_point"] = packing.pack_int(q.zero, q.spec.bits, dim=0)
    elif q.spec.scale is not ScaleFormat.MODEL:
        tensors["weight_packed"] = packing.pack_fp4(q.codes)
        if q.global_scale is not None:
            tensors["weight_global_scale"] = q.global_scale
    else:
        tensors["weight"] = q.codes
        if q.zero is not None:
            tensors["weight_zero_point"] = q.zero
    if input_scale is not None:
        tensors["input_scale"] = input_scale
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def from_disk(
    tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str
) -> StoredLayer:
    """The inverse of `to_disk`.

    A ``weight_g_idx`` (activation order, ``actorder: group``) makes columns move together.

    Args:
        tensors: by local name, without the bias.
        scheme: how the layer is stored.
        shape: ``(out_features, in_features)`` of the layer.
        name: of the layer, for messages.

    Raises:
        QuantkitError: a tensor is missing, unknown, has another shape than the layer, or numbers
            that it cannot have.
        UsageError: groups of columns that cannot be brought together, or of inputs that do not
            divide them.
    """
    spec, (n, k) = scheme.weight, shape
    inputs = scheme.input.group_size if scheme.input else None
    if inputs is not None and k % inputs:
        raise UsageError(
            f"{name}: scales of {inputs} inputs each, which do not divide {k}",
            remedy="the config does not belong to this model",
        )
    parts = LayerTensors(name, tensors)
    scale_shape = spec.scale_shape(shape)
    scale = parts.take_scales("weight_scale", scale_shape, SCALE_DTYPES[spec.scale])
    zero, global_scale = None, None
    if spec.scale is not ScaleFormat.MODEL:
        codes = packing.unpack_fp4(parts.take("weight_packed", (n, k // 2), torch.uint8))
        if spec.scale is ScaleFormat.E4M3:
            global_scale = parts.take_divisor("weight_global_scale")
    elif _is_packed(tensors, scheme):
        _check_shape(parts, shape)
        words = packing.packed_columns(k, spec.bits)
        packed = parts.take("weight_packed", (n, words), torch.int32)
        codes = packing.unpack_int(packed, spec.bits, shape)
        if not spec.symmetric:
            rows = (n, scale_shape[-1])
            words = packing.packed_columns(n, spec.bits)
            packed = parts.take("weight_zero_point", (words, rows[1]), torch.int32)
            zero = packing.unpack_int(packed, spec.bits, rows, dim=0)
    else:
        stored = torch.int8 if spec.dtype is DType.INT else torch.float8_e4m3fn
        codes = parts.take("weight", shape, stored)
        if spec.bits < 8:
            parts.check_codes("weight", codes, spec)
        if not spec.symmetric:
            zero = parts.take_zero_points("weight_zero_point", scale_shape, spec)
    input_scale = parts.take_divisor("input_scale") if scheme.needs_static_input else None
    order = None
    if parts.find("weight_g_idx") is not None and spec.granularity is Granularity.GROUP:
        order = column_order(parts.take("weight_g_idx", (k,)), scale_shape[-1], name)
    if order is not None:
        codes = codes[:, order].contiguous()
    _check_zero_points(parts, spec.symmetric)
    parts.check_all_read()
    return StoredLayer(QTensor(codes, scale, zero, spec, global_scale), input_scale, order)


def _is_packed(tensors: Mapping[str, Tensor], scheme: Scheme) -> bool:
    """Whether codes share words. Writers differ: some leave 4-bit codes one a byte, some pack 8-bit
    ones; where the files do not tell, the scheme does."""
    if ("weight" in tensors) == ("weight_packed" in tensors):
        return format_name(scheme) == "pack-quantized"
    return "weight_packed" in tensors


def _check_shape(parts: LayerTensors, shape: tuple[int, int]) -> None:
    """The words' own note of what they hold: k codes a row may fill the same words as k + 1."""
    found = parts.find("weight_shape")
    if found is not None and found.tolist() != list(shape):
        raise QuantkitError(
            f"{parts.name}.weight_shape: says {found.tolist()} where the layer has {list(shape)}",
            remedy="the config does not belong to these tensors",
        )


def _check_zero_points(parts: LayerTensors, symmetric: bool) -> None:
    """Writers of some versions store zero points of symmetric tensors, too: they must be 0."""
    for key in ("weight_zero_point", "input_zero_point") if symmetric else ("input_zero_point",):
        found = parts.find(key)
        if found is not None and found.float().count_nonzero():
            raise QuantkitError(
                f"{parts.name}.{key}: holds zero points other than 0, where the config says "
                "symmetric",
                remedy="the config does not belong to these tensors",
            )
