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
=====================  =====================================================================
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit import packing
from quantkit.checkpoint.config import format_name
from quantkit.errors import QuantkitError
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
) -> tuple[QTensor, Tensor | None]:
    """The inverse of `to_disk`: (weight, input scale).

    Args:
        tensors: by local name; ``bias`` and unknown names are ignored.
        scheme: how the layer is stored.
        shape: ``(out_features, in_features)`` of the layer.
        name: of the layer, for messages.

    Raises:
        QuantkitError: a tensor is missing, or has another shape or dtype than the layer's format.
    """
    spec = scheme.weight

    def take(key: str, dtype: torch.dtype | None = None) -> Tensor:
        if key in tensors and dtype not in (None, tensors[key].dtype):
            raise QuantkitError(
                f"{name}.{key}: stored as {str(tensors[key].dtype).removeprefix('torch.')}, and "
                f"{format_name(scheme)} means {str(dtype).removeprefix('torch.')}",
                remedy="config.json describes other tensors: export the checkpoint again",
            )
        if key not in tensors:
            raise QuantkitError(
                f"{name}.{key}: missing from the checkpoint",
                remedy="the file is incomplete; `quantkit verify` names all that is missing",
            )
        return tensors[key]

    scale, zero, global_scale = take("weight_scale"), None, None
    try:
        if format_name(scheme) == "pack-quantized":
            codes = packing.unpack_int(take("weight_packed", torch.int32), spec.bits, shape)
            if not spec.symmetric:
                rows = (shape[0], spec.scale_shape(shape)[-1])
                zero = packing.unpack_int(take("weight_zero_point"), spec.bits, rows, dim=0)
        elif spec.scale is not ScaleFormat.MODEL:
            codes = packing.unpack_fp4(take("weight_packed", torch.uint8))
            if spec.scale is ScaleFormat.E4M3:
                global_scale = take("weight_global_scale")
        else:
            stored = torch.int8 if spec.dtype is DType.INT else torch.float8_e4m3fn
            codes = take("weight", stored)
            zero = None if spec.symmetric else take("weight_zero_point")
    except (RuntimeError, IndexError) as e:
        raise QuantkitError(
            f"{name}: stored with another shape than {list(shape)} ({str(e).splitlines()[0]})"
        ) from e
    if spec.granularity is not Granularity.TENSOR:
        scale = scale.reshape(spec.scale_shape(shape))
    if tuple(codes.shape) != shape:
        raise QuantkitError(f"{name}: codes {list(codes.shape)} where the layer is {list(shape)}")
    input_scale = take("input_scale") if scheme.needs_static_input else None
    return QTensor(codes, scale, zero, spec, global_scale), input_scale
