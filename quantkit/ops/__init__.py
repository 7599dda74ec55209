"""Native quantized linear layers and activation quantizers; needs nothing but torch.

::

    packed = ops.pack_w4(codes)                        # once, when a layer is loaded
    scale = ops.pack_scale(scale)
    (packed,) = ops.consolidate([packed])              # once a model: all weights in huge pages
    y = ops.w4_linear(x, packed, scale, None, lut, None, n, group_size=64)

The functions of this module are the native kernels. ``get_backend("reference")`` has the same
functions in plain torch: the oracle of the tests, and what ``--kernels reference`` runs. A native
kernel that is not built raises ``KernelMissingError``; nothing falls back silently.

Files: ``schema`` signatures, ``native`` functions, ``reference`` oracle, ``fake`` shapes for
torch.compile, ``library`` loading, ``memory`` huge pages, ``status`` what is built and in use.
``solvers``, ``reference_solvers`` and ``fake_solvers`` are the same for the operators of
calibration; ``parts``, ``reference_parts`` and ``fake_parts`` for those between the linear layers
of a decoder; ``gpu``, ``gpu_attention``, their references, ``reference_fp4`` and ``fake_gpu`` for
those that only a GPU has. ``decoder`` runs a whole model in one call, on pages of ``page_store``;
``argmax`` takes its likeliest token.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from quantkit.errors import UsageError
from quantkit.ops import fake as _fake  # noqa: F401  registers the fake implementations
from quantkit.ops import fake_gpu as _fake_gpu  # noqa: F401
from quantkit.ops import fake_parts as _fake_parts  # noqa: F401
from quantkit.ops import fake_solvers as _fake_solvers  # noqa: F401
from quantkit.ops import (
    gpu,
    gpu_attention,
    native,
    parts,
    reference,
    reference_fp4,
    reference_gpu,
    reference_gpu_attention,
    reference_parts,
    reference_solvers,
    solvers,
)
from quantkit.ops.gpu import (
    add_rms_norm_quantize,
    fp4a16_linear,
    gated_activation_quantize,
    gated_hadamard_mma_quantize,
    hadamard_mma,
    hadamard_mma_quantize,
    w8a8_mma_linear,
    w8a16_linear,
)
from quantkit.ops.gpu_attention import (
    new_kv_rows,
    paged_decode_attention,
    rope_store_kv_rows,
)
from quantkit.ops.memory import consolidate
from quantkit.ops.native import (
    dequantize_w4,
    dequantize_w8,
    float_linear,
    int8_linear,
    pack_float,
    pack_w4,
    pack_w8,
    quantize_fp8_per_block,
    quantize_fp8_per_token,
    quantize_fp8_static,
    quantize_int8_per_group,
    quantize_int8_per_token,
    quantize_int8_static,
    w4_linear,
    w4a16_linear,
    w8_linear,
    w8a8_linear,
)
from quantkit.ops.parts import (
    add_rms_norm,
    embed,
    gated_activation,
    hadamard,
    new_kv_pages,
    paged_attention,
    rope_store_kv,
)
from quantkit.ops.reference import (
    new_w4a16_counters,
    pack_w4a16,
    pack_w4a16_table,
    unpack_float,
    unpack_w4,
    unpack_w4a16,
    unpack_w8,
)
from quantkit.ops.reference_fp4 import (
    pack_fp4_mma,
    pack_fp4_scales,
    unpack_fp4_mma,
    unpack_fp4_scales,
)
from quantkit.ops.reference_gpu import (
    pack_hadamard,
    pack_w8_mma,
    unpack_hadamard,
    unpack_w8_mma,
)
from quantkit.ops.reference_gpu_attention import read_kv_rows
from quantkit.ops.reference_parts import read_kv_pages
from quantkit.ops.schema import KIND_FP8, KIND_INT8, PAGE_TOKENS, SCHEMAS
from quantkit.ops.solvers import (
    CODE_E2M1,
    CODE_E4M3,
    CODE_INT,
    descend_codes,
    gptq_round,
    rounding_errors,
    syrk_accumulate,
)
from quantkit.ops.status import (
    available_isas,
    get_isa,
    get_num_threads,
    get_thread_pool,
    kernel_status,
    set_isa,
    set_num_threads,
    set_thread_pool,
)

__all__ = [
    "CODE_E2M1",
    "CODE_E4M3",
    "CODE_INT",
    "KIND_FP8",
    "KIND_INT8",
    "PAGE_TOKENS",
    "Backend",
    "add_rms_norm",
    "add_rms_norm_quantize",
    "available_isas",
    "consolidate",
    "dequantize_w4",
    "dequantize_w8",
    "descend_codes",
    "embed",
    "float_linear",
    "fp4a16_linear",
    "gated_activation",
    "gated_activation_quantize",
    "gated_hadamard_mma_quantize",
    "get_backend",
    "get_isa",
    "get_num_threads",
    "get_thread_pool",
    "gptq_round",
    "hadamard",
    "hadamard_mma",
    "hadamard_mma_quantize",
    "int8_linear",
    "kernel_status",
    "new_kv_pages",
    "new_kv_rows",
    "new_w4a16_counters",
    "pack_float",
    "pack_fp4_mma",
    "pack_fp4_scales",
    "pack_hadamard",
    "pack_scale",
    "pack_w4",
    "pack_w4a16",
    "pack_w4a16_table",
    "pack_w8",
    "pack_w8_mma",
    "paged_attention",
    "paged_decode_attention",
    "quantize_fp8_per_block",
    "quantize_fp8_per_token",
    "quantize_fp8_static",
    "quantize_int8_per_group",
    "quantize_int8_per_token",
    "quantize_int8_static",
    "read_kv_pages",
    "read_kv_rows",
    "rope_store_kv",
    "rope_store_kv_rows",
    "rounding_errors",
    "set_isa",
    "set_num_threads",
    "set_thread_pool",
    "syrk_accumulate",
    "unpack_float",
    "unpack_fp4_mma",
    "unpack_fp4_scales",
    "unpack_hadamard",
    "unpack_w4",
    "unpack_w4a16",
    "unpack_w8",
    "unpack_w8_mma",
    "w4_linear",
    "w4a16_linear",
    "w8_linear",
    "w8a8_linear",
    "w8a8_mma_linear",
    "w8a16_linear",
]


def pack_scale(table: Tensor) -> Tensor:
    """A [N, groups] table of scales or zeros in the order that the CPU kernels read fastest.

    Values, shape and dtype float32 are those of the argument; only the strides differ ([N] is the
    dense dimension, so 16 rows of one group are one vector load). The kernels accept any strides.
    """
    return table.float().t().contiguous().t()


@dataclass(frozen=True)
class Backend:
    """The operators of one implementation, by name: ``backend.w4_linear(...)``."""

    name: str
    modules: tuple[ModuleType, ...]

    def __getattr__(self, operator: str) -> Any:
        if operator not in SCHEMAS:
            raise AttributeError(f"{operator!r} is not an operator; one of {', '.join(SCHEMAS)}")
        module = next(m for m in self.modules if hasattr(m, operator))
        return getattr(module, operator)


_BACKENDS = {
    "native": Backend("native", (native, solvers, parts, gpu, gpu_attention)),
    "reference": Backend(
        "reference",
        (
            reference,
            reference_solvers,
            reference_parts,
            reference_gpu,
            reference_fp4,
            reference_gpu_attention,
        ),
    ),
}


def get_backend(name: str) -> Backend:
    """The "native" kernels or their plain-torch "reference", with the same functions."""
    if name not in _BACKENDS:
        known = ", ".join(_BACKENDS)
        raise UsageError(f"kernels {name!r} is unknown", remedy=f"use one of {known}")
    return _BACKENDS[name]
