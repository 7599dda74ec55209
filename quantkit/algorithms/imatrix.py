"""Round to nearest under scales that are searched by what the inputs weigh.

llama.cpp's importance matrix (``llama-imatrix``, ggml-org/llama.cpp, ``tools/imatrix``) is the
diagonal of the Hessian: a column's squared rounding error counts as often as its input is large.
AWQ's clip search (arXiv 2306.00978, §5.1 and the authors' ``auto_clip``) measures each group's
own share of the output instead, (ŵ_g − w_g) H_gg (ŵ_g − w_g)ᵀ, which also sees how the inputs of
a group move together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from quantkit import numerics
from quantkit.algorithms.clip import mse_scales, output_scales
from quantkit.errors import QuantkitError
from quantkit.numerics import QTensor
from quantkit.schemes import QuantSpec

if TYPE_CHECKING:
    from quantkit.algorithms import Stats

#: error: ``diagonal`` weighs columns one by one (imatrix); ``blocks`` measures each group's
#:     output error (AWQ's clip search), which costs about as much as GPTQ.
#: fisher: exponent of each token's Fisher weight in the Hessian, 0 to 1 (`quantkit.fisher`).
OPTIONS: dict[str, Any] = {"error": "diagonal", "fisher": 0.0}


def solve(weight: Tensor, stats: Stats, spec: QuantSpec, options: Mapping[str, Any]) -> QTensor:
    """Quantize ``weight [N, K]``; never worse than round to nearest on its error.

    Args:
        weight: ``[N, K]``, the model's dtype, which is the dtype of the scales.
        stats: its ``hessian`` fp32 ``[K, K]``.
        spec: any weight spec.
        options: see `OPTIONS`.

    Raises:
        QuantkitError: no Hessian.
    """
    if stats.hessian is None or stats.tokens == 0:
        raise QuantkitError("imatrix without calibration tokens", remedy="give --data or use rtn")
    if options["error"] == "blocks":
        scale, zero, global_scale = output_scales(weight, spec, stats.hessian)
    else:
        scale, zero, global_scale = mse_scales(weight, spec, stats.hessian.diagonal())
    return numerics.quantize(weight, scale, zero, spec, global_scale)
