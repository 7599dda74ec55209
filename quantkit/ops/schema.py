"""The native operators' signatures, defined once and implemented per device.

The schemas are defined here and not in C++ so that the package imports, traces and explains itself
where nothing is built. ``libquantkit_cpu.so`` and ``libquantkit_cuda.so`` only add implementations;
``fake.py`` adds the shapes that ``torch.compile`` needs.

Only ``syrk_accumulate`` mutates an argument, and none has a gradient.
"""

from __future__ import annotations

import torch

# Codes of operator arguments; the numbers are those of csrc/include/quantkit/quantkit.h.
KIND_INT8 = 1
KIND_FP8 = 2
KINDS = {"int8": KIND_INT8, "fp8": KIND_FP8}
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
CODE_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}

SCHEMAS = {
    "pack_w4": "(Tensor codes) -> Tensor",
    "pack_w8": "(Tensor codes) -> Tensor",
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
    "dequantize_w4": (
        "(Tensor packed, Tensor scale, Tensor? zero, Tensor lut, int n, int k, int group_size,"
        " int out_dtype) -> Tensor"
    ),
    "dequantize_w8": (
        "(Tensor packed, Tensor scale, Tensor? zero, int n, int k, int kind, int group_size,"
        " int out_dtype) -> Tensor"
    ),
    "quantize_int8_per_token": "(Tensor x) -> (Tensor, Tensor)",
    "quantize_int8_static": "(Tensor x, Tensor scale) -> Tensor",
    "quantize_fp8_per_token": "(Tensor x) -> (Tensor, Tensor)",
    "quantize_fp8_per_block": "(Tensor x, int block) -> (Tensor, Tensor)",
    "quantize_fp8_static": "(Tensor x, Tensor scale) -> Tensor",
    "gptq_round": (
        "(Tensor weight, Tensor upper, Tensor scale, Tensor? zero, Tensor group, int kind,"
        " float qmin, float qmax) -> Tensor"
    ),
    "rounding_errors": (
        "(Tensor weight, Tensor scales, Tensor? zeros, Tensor? importance, int group_size,"
        " int kind, float qmin, float qmax) -> Tensor"
    ),
    "syrk_accumulate": "(Tensor(a!) acc, Tensor x) -> ()",
}

_library = torch.library.Library("quantkit", "FRAGMENT")
for _name, _signature in SCHEMAS.items():
    _library.define(_name + _signature)


def kind_code(kind: int | str) -> int:
    """``"int8"`` or ``"fp8"``, or the number of one of them, to the number."""
    code = KINDS.get(kind, -1) if isinstance(kind, str) else kind
    if code not in KINDS.values():
        raise ValueError(f"kind {kind!r} is unknown; use 'int8' or 'fp8'")
    return code


def dtype_code(dtype: torch.dtype) -> int:
    """An output dtype to its code."""
    if dtype not in DTYPE_CODES:
        names = ", ".join(str(known) for known in DTYPE_CODES)
        raise ValueError(f"output dtype {dtype} is not supported; use one of {names}")
    return DTYPE_CODES[dtype]
