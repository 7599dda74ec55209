"""The calibration operators as Python functions: CPU kernels, as in :mod:`quantkit.ops.native`.

Every function raises ``KernelMissingError`` when the CPU library is not built and ``RuntimeError``
when an argument is wrong. Codes are clamped to ``qmin..qmax`` and rounded to the nearest, ties to
the even code; a NaN stays a NaN. All arithmetic is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.ops.library import require_cpu_kernel

# What a code is; the numbers are those of csrc/include/quantkit/solvers.h.
CODE_INT = 0
CODE_E4M3 = 1
CODE_E2M1 = 2

_ops = torch.ops.quantkit


def gptq_round(
    weight: Tensor,
    upper: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group: Tensor,
    kind: int,
    qmin: float,
    qmax: float,
) -> Tensor:
    """GPTQ's column loop (Frantar et al., arXiv 2210.17323, algorithm 1).

    For each column j in order: ``code = round(w[:, j] / s + z)``, ``e = (w[:, j] - (code - z)·s) /
    U[j, j]``, then ``w[:, i] -= e · U[j, i]`` for every i > j. Rows are independent, and the codes
    of a row have the same bits however many rows and threads there are.

    Args:
        weight: float32 [N, K], columns in the order they are rounded in.
        upper: float32 [K, K], U of H⁻¹ = UᵀU in that order; below its diagonal nothing is read.
        scale: float32 [N, G].
        zero: float32 [N, G], in units of the code, or None.
        group: int32 or int64 [K], the column of ``scale`` that each column of ``weight`` uses.
        kind: `CODE_INT`, `CODE_E4M3` or `CODE_E2M1`.
        qmin, qmax: the range of the codes.

    Returns:
        float32 [N, K]: code values before scaling, in the order of ``weight``.
    """
    require_cpu_kernel("gptq_round", weight)
    return _ops.gptq_round.default(weight, upper, scale, zero, group, kind, qmin, qmax)


def descend_codes(
    codes: Tensor,
    moment: Tensor,
    hessian: Tensor,
    output: Tensor | None,
    scale: Tensor,
    zero: Tensor | None,
    group: Tensor,
    kind: int,
    qmin: float,
    qmax: float,
    sweeps: int,
) -> None:
    """Coordinate descent on codes: ``tr(G E H Eᵀ)`` of E = W − Ŵ falls with every code changed.

    Each code in turn becomes the one that is best while all others stay: ``round(code + (G E H)[i,
    j] / (G[i, i] H[j, j] s))``. Without G, rows are independent and each is gone through by itself;
    with it, columns are gone through in order, and the rows of each in order.

    Args:
        codes: float32 [N, K], the values of the codes; in place.
        moment: float32 [N, K], ``E H``; in place.
        hessian: float32 [K, K], H, symmetric.
        output: float32 [N, N], G, symmetric; None for the identity.
        scale: float32 [N, groups].
        zero: float32 [N, groups], in units of the code, or None.
        group: int32 or int64 [K], the column of ``scale`` that each column uses.
        kind, qmin, qmax: as in `gptq_round`.
        sweeps: times over all codes at most; fewer if nothing changes any more.
    """
    require_cpu_kernel("descend_codes", codes)
    _ops.descend_codes.default(
        codes, moment, hessian, output, scale, zero, group, kind, qmin, qmax, sweeps
    )


def rounding_errors(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    importance: Tensor | None,
    group_size: int,
    kind: int,
    qmin: float,
    qmax: float,
) -> Tensor:
    """Squared error of rounding each group of a weight under each candidate scale.

    Args:
        weight: float32, float16 or bfloat16 [N, K].
        scales: float32 [S, N, G], S candidates; G = ceil(K / group_size).
        zeros: float32 [S, N, G], in units of the code, or None.
        importance: float32 [K], a weight for each column's squared error, or None for ones.
        group_size: columns that share a scale; any positive number, the last group may be short.
        kind, qmin, qmax: as in `gptq_round`.

    Returns:
        float32 [S, N, G]: ``sum(importance · ((round(w/s + z) - z)·s - w)²)`` over each group.
    """
    require_cpu_kernel("rounding_errors", weight)
    return _ops.rounding_errors.default(
        weight, scales, zeros, importance, group_size, kind, qmin, qmax
    )


def syrk_accumulate(acc: Tensor, x: Tensor) -> None:
    """Add the lower triangle, diagonal included, of ``xᵀ·x`` to ``acc`` in place.

    Above the diagonal nothing is read or written. Sums over up to 256 tokens are fp32, in an order
    that does not depend on the number of threads; those of a float64 ``acc`` are then widened. On
    ``avx512bf16`` bf16 inputs are multiplied as they are: their products are exact in fp32, and
    subnormal inputs (below 1.2e-38) count as zero.

    Args:
        acc: float32 or float64 [K, K] with neighbouring columns.
        x: float32, float16 or bfloat16 [T, K], any strides.
    """
    require_cpu_kernel("syrk_accumulate", acc)
    _ops.syrk_accumulate.default(acc, x)
