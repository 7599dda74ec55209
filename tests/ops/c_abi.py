"""The C ABI by ctypes: what operators cannot express, such as outputs with gaps between rows."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from quantkit.ops.library import CPU

I32, I64, POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
W4, I8, F8, B16, F32W = range(5)
OK, INVALID_ARGUMENT, UNSUPPORTED = 0, 1, 2


class WeightOnlyArgs(ctypes.Structure):
    _fields_ = (
        ("x", POINTER),
        ("ldx", I64),
        ("x_dtype", I32),
        ("format", I32),
        ("m", I64),
        ("n", I64),
        ("k", I64),
        ("group_size", I64),
        ("packed", POINTER),
        ("lut", POINTER),
        ("scale", POINTER),
        ("scale_dtype", I32),
        ("scale_stride_n", I64),
        ("scale_stride_g", I64),
        ("zero", POINTER),
        ("zero_stride_n", I64),
        ("zero_stride_g", I64),
        ("bias", POINTER),
        ("bias_dtype", I32),
        ("y", POINTER),
        ("ldy", I64),
    )


class W4A16Args(ctypes.Structure):
    _fields_ = (
        ("x", POINTER),
        ("ldx", I64),
        ("dtype", I32),
        ("m", I64),
        ("n", I64),
        ("k", I64),
        ("group_size", I64),
        ("groups", I64),
        ("packed", POINTER),
        ("scale", POINTER),
        ("zero", POINTER),
        ("bias", POINTER),
        ("y", POINTER),
        ("ldy", I64),
        ("partials", POINTER),
        ("counters", POINTER),
        ("multiprocessors", I32),
        ("overlap", I32),
    )


class W8A16Args(ctypes.Structure):
    _fields_ = (
        ("x", POINTER),
        ("ldx", I64),
        ("dtype", I32),
        ("format", I32),
        ("m", I64),
        ("n", I64),
        ("k", I64),
        ("group_size", I64),
        ("groups", I64),
        ("packed", POINTER),
        ("scale", POINTER),
        ("bias", POINTER),
        ("y", POINTER),
        ("ldy", I64),
        ("partials", POINTER),
        ("counters", POINTER),
        ("multiprocessors", I32),
        ("overlap", I32),
    )


class W8A8Args(ctypes.Structure):
    _fields_ = (
        ("x", POINTER),
        ("ldx", I64),
        ("format", I32),
        ("m", I64),
        ("n", I64),
        ("k", I64),
        ("group_size", I64),
        ("groups", I64),
        ("packed", POINTER),
        ("x_scale", POINTER),
        ("x_scale_dtype", I32),
        ("x_scale_stride", I64),
        ("scale", POINTER),
        ("bias", POINTER),
        ("bias_dtype", I32),
        ("y_dtype", I32),
        ("y", POINTER),
        ("ldy", I64),
        ("partials", POINTER),
        ("counters", POINTER),
        ("multiprocessors", I32),
        ("overlap", I32),
    )


class FP4A16Args(ctypes.Structure):
    _fields_ = (
        ("x", POINTER),
        ("ldx", I64),
        ("dtype", I32),
        ("format", I32),
        ("m", I64),
        ("n", I64),
        ("k", I64),
        ("group_size", I64),
        ("groups", I64),
        ("packed", POINTER),
        ("scale", POINTER),
        ("global_scale", POINTER),
        ("bias", POINTER),
        ("y", POINTER),
        ("ldy", I64),
        ("partials", POINTER),
        ("counters", POINTER),
        ("multiprocessors", I32),
        ("overlap", I32),
    )


class QuantizeArgs(ctypes.Structure):
    _fields_ = (
        ("x", POINTER),
        ("ldx", I64),
        ("x_dtype", I32),
        ("format", I32),
        ("m", I64),
        ("k", I64),
        ("group_size", I64),
        ("arith_dtype", I32),
        ("scale_given", I32),
        ("scale", POINTER),
        ("q", POINTER),
    )


class AddRmsNormArgs(ctypes.Structure):
    _fields_ = (
        ("m", I64),
        ("n", I64),
        ("residual", POINTER),
        ("ld_residual", I64),
        ("branch", POINTER),
        ("ld_branch", I64),
        ("branch_dtype", I32),
        ("weight", POINTER),
        ("epsilon", ctypes.c_float),
        ("y_dtype", I32),
        ("y", POINTER),
        ("ldy", I64),
    )


class RopeStoreArgs(ctypes.Structure):
    _fields_ = (
        ("sequences", I64),
        ("tokens", I64),
        ("starts", POINTER),
        ("past", POINTER),
        ("pages", POINTER),
        ("page_stride", I64),
        ("kv_dtype", I32),
        ("data", POINTER),
        ("scale", POINTER),
        ("fixed", POINTER),
        ("heads", I64),
        ("kv_heads", I64),
        ("head_dim", I64),
        ("rotary_dim", I64),
        ("qkv", POINTER),
        ("ld_qkv", I64),
        ("q_norm", POINTER),
        ("k_norm", POINTER),
        ("norm_epsilon", ctypes.c_float),
        ("cos", POINTER),
        ("sin", POINTER),
        ("q", POINTER),
        ("ldq", I64),
    )


class PagedDecodeArgs(ctypes.Structure):
    _fields_ = (
        ("sequences", I64),
        ("lengths", POINTER),
        ("pages", POINTER),
        ("page_stride", I64),
        ("kv_dtype", I32),
        ("data", POINTER),
        ("scale", POINTER),
        ("heads", I64),
        ("kv_heads", I64),
        ("head_dim", I64),
        ("score_scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("window", I64),
        ("q", POINTER),
        ("ldq", I64),
        ("y", POINTER),
        ("ldy", I64),
        ("partials", POINTER),
        ("overlap", I32),
    )


class GateArgs(ctypes.Structure):
    _fields_ = (
        ("kind", I32),
        ("m", I64),
        ("n", I64),
        ("x", POINTER),
        ("ldx", I64),
        ("dtype", I32),
        ("y", POINTER),
        ("ldy", I64),
    )


class HadamardArgs(ctypes.Structure):
    _fields_ = (
        ("order", I64),
        ("base", I64),
        ("signs", POINTER),
        ("gated", I32),
        ("gate", I32),
        ("m", I64),
        ("n", I64),
        ("x", POINTER),
        ("ldx", I64),
        ("dtype", I32),
        ("y", POINTER),
        ("ldy", I64),
    )


class Int8LinearArgs(ctypes.Structure):
    _fields_ = (
        ("xq", POINTER),
        ("ldx", I64),
        ("format", I32),
        ("m", I64),
        ("n", I64),
        ("k", I64),
        ("group_size", I64),
        ("x_group_size", I64),
        ("packed", POINTER),
        ("lut", POINTER),
        ("x_scale", POINTER),
        ("x_scale_stride", I64),
        ("scale", POINTER),
        ("scale_dtype", I32),
        ("scale_stride_n", I64),
        ("scale_stride_g", I64),
        ("zero", POINTER),
        ("zero_stride_n", I64),
        ("zero_stride_g", I64),
        ("bias", POINTER),
        ("bias_dtype", I32),
        ("y_dtype", I32),
        ("y", POINTER),
        ("ldy", I64),
    )


def weight_only_args(
    x: Tensor,
    format: int,
    packed: Tensor,
    lut: Tensor | None,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    y: Tensor,
    bias: Tensor | None = None,
) -> WeightOnlyArgs:
    """The arguments for y [m, n], which may be a view with a row stride."""
    (m, n), k = y.shape, x.shape[1]
    return WeightOnlyArgs(
        x=x.data_ptr(),
        ldx=x.stride(0),
        x_dtype=DTYPES[x.dtype],
        format=format,
        m=m,
        n=n,
        k=k,
        group_size=group_size if group_size > 0 else k,
        packed=packed.data_ptr(),
        lut=None if lut is None else lut.data_ptr(),
        scale=scale.data_ptr(),
        scale_dtype=DTYPES[scale.dtype],
        scale_stride_n=scale.stride(0),
        scale_stride_g=scale.stride(1),
        zero=None if zero is None else zero.data_ptr(),
        zero_stride_n=0 if zero is None else zero.stride(0),
        zero_stride_g=0 if zero is None else zero.stride(1),
        bias=None if bias is None else bias.data_ptr(),
        bias_dtype=0 if bias is None else DTYPES[bias.dtype],
        y=y.data_ptr(),
        ldy=y.stride(0),
    )


def weight_only(
    x: Tensor,
    format: int,
    packed: Tensor,
    lut: Tensor | None,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    y: Tensor,
) -> int:
    """qk_weight_only_linear into y."""
    args = weight_only_args(x, format, packed, lut, scale, zero, group_size, y)
    return CPU.require().qk_weight_only_linear(ctypes.byref(args))


def int8_linear(
    xq: Tensor,
    x_scale: Tensor,
    format: int,
    packed: Tensor,
    lut: Tensor | None,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    x_group_size: int,
    y: Tensor,
) -> int:
    """qk_int8_linear into y [m, n], which may be a view with a row stride."""
    (m, n), k = y.shape, xq.shape[1]
    args = Int8LinearArgs(
        xq=xq.data_ptr(),
        ldx=xq.stride(0),
        format=format,
        m=m,
        n=n,
        k=k,
        group_size=group_size if group_size > 0 else k,
        x_group_size=x_group_size if x_group_size > 0 else k,
        packed=packed.data_ptr(),
        lut=None if lut is None else lut.data_ptr(),
        x_scale=x_scale.data_ptr(),
        x_scale_stride=x_scale.stride(0),
        scale=scale.data_ptr(),
        scale_dtype=DTYPES[scale.dtype],
        scale_stride_n=scale.stride(0),
        scale_stride_g=scale.stride(1),
        zero=None if zero is None else zero.data_ptr(),
        zero_stride_n=0 if zero is None else zero.stride(0),
        zero_stride_g=0 if zero is None else zero.stride(1),
        y_dtype=DTYPES[y.dtype],
        y=y.data_ptr(),
        ldy=y.stride(0),
    )
    return CPU.require().qk_int8_linear(ctypes.byref(args))
