"""The native operators' signatures, defined once and implemented per device.

The schemas are defined here and not in C++ so that the package imports, traces and explains itself
where nothing is built. ``libquantkit_cpu.so`` and ``libquantkit_cuda.so`` only add implementations;
``fake.py`` adds the shapes that ``torch.compile`` needs.

Arguments that an operator writes are declared ``Tensor(a!)``; no operator has a gradient.
"""

from __future__ import annotations

import torch

# Codes of operator arguments; the numbers are those of csrc/include/quantkit/quantkit.h.
KIND_INT8 = 1
KIND_FP8 = 2
KINDS = {"int8": KIND_INT8, "fp8": KIND_FP8}
FP4_KINDS = {"nvfp4": 0, "mxfp4": 1, "nf4": 2}
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
CODE_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
GATES = {"silu": 0, "gelu_tanh": 1}
KV_DTYPES = {"float32": 0, "bfloat16": 1, "int8": 2, "fp8": 3}
KV_BYTES = {0: 4, 1: 2, 2: 1, 3: 1}  # of one value
PAGE_TOKENS = 64

SCHEMAS = {
    "pack_w4": "(Tensor codes) -> Tensor",
    "pack_w8": "(Tensor codes) -> Tensor",
    "pack_float": "(Tensor values) -> Tensor",
    "w4_linear": (
        "(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor lut, Tensor? bias,"
        " int n, int group_size) -> Tensor"
    ),
    "w8_linear": (
        "(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias,"
        " int kind, int group_size) -> Tensor"
    ),
    "w8a8_linear": (
        "(Tensor xq, Tensor x_scale, Tensor wq, Tensor w_scale, Tensor? bias, int out_dtype)"
        " -> Tensor"
    ),
    "int8_linear": (
        "(Tensor xq, Tensor x_scale, Tensor packed, Tensor scale, Tensor? zero, Tensor? lut,"
        " Tensor? bias, int n, int group_size, int out_dtype, int x_group_size) -> Tensor"
    ),
    "float_linear": "(Tensor x, Tensor packed, Tensor? bias, int n) -> Tensor",
    "w4a16_linear": (
        "(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, Tensor(a!) counters,"
        " int n, int group_size) -> Tensor"
    ),
    "w8a16_linear": (
        "(Tensor x, Tensor packed, Tensor scale, Tensor? bias, Tensor(a!) counters, int n,"
        " int kind, int group_size) -> Tensor"
    ),
    "w8a8_mma_linear": (
        "(Tensor xq, Tensor x_scale, Tensor packed, Tensor scale, Tensor? bias,"
        " Tensor(a!) counters, int n, int group_size, int out_dtype) -> Tensor"
    ),
    "fp4a16_linear": (
        "(Tensor x, Tensor packed, Tensor scale, Tensor? global_scale, Tensor? bias,"
        " Tensor(a!) counters, int n, int kind, int group_size) -> Tensor"
    ),
    "dequantize_w4": (
        "(Tensor packed, Tensor scale, Tensor? zero, Tensor lut, int n, int k, int group_size,"
        " int out_dtype) -> Tensor"
    ),
    "dequantize_w8": (
        "(Tensor packed, Tensor scale, Tensor? zero, int n, int k, int kind, int group_size,"
        " int out_dtype) -> Tensor"
    ),
    "quantize_int8_per_token": "(Tensor x) -> (Tensor, Tensor)",
    "quantize_int8_per_group": "(Tensor x, int group) -> (Tensor, Tensor)",
    "quantize_int8_static": "(Tensor x, Tensor scale) -> Tensor",
    "quantize_fp8_per_token": "(Tensor x) -> (Tensor, Tensor)",
    "quantize_fp8_per_block": "(Tensor x, int block) -> (Tensor, Tensor)",
    "quantize_fp8_static": "(Tensor x, Tensor scale) -> Tensor",
    "add_rms_norm": (
        "(Tensor(a!) residual, Tensor? branch, Tensor weight, float epsilon, int out_dtype)"
        " -> Tensor"
    ),
    "add_rms_norm_quantize": (
        "(Tensor(a!) residual, Tensor? branch, Tensor weight, float epsilon, int dtype, int kind,"
        " int group) -> (Tensor, Tensor)"
    ),
    "gated_activation": "(Tensor gate_up, int kind) -> Tensor",
    "gated_activation_quantize": (
        "(Tensor gate_up, int gate, int kind, int group) -> (Tensor, Tensor)"
    ),
    "hadamard": "(Tensor x, Tensor factor, int order) -> Tensor",
    "hadamard_mma": "(Tensor x, Tensor signs, int base, int order) -> Tensor",
    "hadamard_mma_quantize": (
        "(Tensor x, Tensor signs, int base, int order, int kind, int group) -> (Tensor, Tensor)"
    ),
    "gated_hadamard_mma_quantize": (
        "(Tensor gate_up, Tensor signs, int base, int order, int gate, int kind, int group)"
        " -> (Tensor, Tensor)"
    ),
    "embed": "(Tensor tokens, Tensor table, float scale) -> Tensor",
    "rope_store_kv": (
        "(Tensor qkv, Tensor? q_norm, Tensor? k_norm, Tensor cos, Tensor sin, Tensor starts,"
        " Tensor past, Tensor pages, Tensor(a!) kv, Tensor(b!)? kv_scale, int kv_dtype,"
        " float epsilon) -> Tensor"
    ),
    "paged_attention": (
        "(Tensor q, Tensor starts, Tensor past, Tensor pages, Tensor kv, Tensor? kv_scale,"
        " int kv_dtype, float scale, float softcap, int window) -> Tensor"
    ),
    "rope_store_kv_rows": (
        "(Tensor qkv, Tensor? q_norm, Tensor? k_norm, Tensor cos, Tensor sin, Tensor starts,"
        " Tensor past, Tensor pages, Tensor(a!) kv, Tensor(b!)? kv_scale, Tensor? kv_fixed,"
        " int kv_dtype, float epsilon) -> Tensor"
    ),
    "paged_decode_attention": (
        "(Tensor q, Tensor lengths, Tensor pages, Tensor kv, Tensor? kv_scale, int kv_dtype,"
        " float scale, float softcap, int window) -> Tensor"
    ),
    "gptq_round": (
        "(Tensor weight, Tensor upper, Tensor scale, Tensor? zero, Tensor group, int kind,"
        " float qmin, float qmax) -> Tensor"
    ),
    "descend_codes": (
        "(Tensor(a!) codes, Tensor(b!) moment, Tensor hessian, Tensor? output, Tensor scale,"
        " Tensor? zero, Tensor group, int kind, float qmin, float qmax, int sweeps) -> ()"
    ),
    "rounding_errors": (
        "(Tensor weight, Tensor scales, Tensor? zeros, Tensor? importance, int group_size,"
        " int kind, float qmin, float qmax) -> Tensor"
    ),
    "syrk_accumulate": "(Tensor(a!) acc, Tensor x) -> ()",
}

# Operators that only the CUDA library has.
CUDA_ONLY = frozenset(
    {
        "w4a16_linear",
        "w8a16_linear",
        "w8a8_mma_linear",
        "fp4a16_linear",
        "add_rms_norm_quantize",
        "gated_activation_quantize",
        "hadamard_mma",
        "hadamard_mma_quantize",
        "gated_hadamard_mma_quantize",
        "rope_store_kv_rows",
        "paged_decode_attention",
    }
)

_library = torch.library.Library("quantkit", "FRAGMENT")
for _name, _signature in SCHEMAS.items():
    _library.define(_name + _signature)


def _code(known: dict[str, int], what: str, value: int | str) -> int:
    code = known.get(value, -1) if isinstance(value, str) else value
    if code not in known.values():
        *first, last = (repr(name) for name in known)
        raise ValueError(f"{what} {value!r} is unknown; use {', '.join(first)} or {last}")
    return code


def kind_code(kind: int | str) -> int:
    """``"int8"`` or ``"fp8"``, or the number of one of them, to the number."""
    return _code(KINDS, "kind", kind)


def fp4_code(kind: int | str) -> int:
    """``"nvfp4"``, ``"mxfp4"`` or ``"nf4"`` to its number."""
    return _code(FP4_KINDS, "kind", kind)


def gate_code(kind: int | str) -> int:
    """``"silu"`` or ``"gelu_tanh"`` to its number."""
    return _code(GATES, "gate", kind)


def kv_code(dtype: int | str) -> int:
    """What pages hold, ``"float32"``, ``"bfloat16"``, ``"int8"`` or ``"fp8"``, to its number."""
    return _code(KV_DTYPES, "kv_dtype", dtype)


def dtype_code(dtype: torch.dtype) -> int:
    """An output dtype to its code."""
    if dtype not in DTYPE_CODES:
        names = ", ".join(str(known) for known in DTYPE_CODES)
        raise ValueError(f"output dtype {dtype} is not supported; use one of {names}")
    return DTYPE_CODES[dtype]


def x_group_size(x_scale: torch.Tensor, group_size: int, k: int) -> int:
    """The activation group that ``x_scale`` [..., G] of a row of ``k`` columns suggests."""
    grouped = x_scale.dim() > 0 and x_scale.shape[-1] > 1 and 0 < group_size < k
    return group_size if grouped and x_scale.shape[-1] == -(-k // group_size) else -1
