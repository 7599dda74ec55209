"""GPTQ: second-order rounding with error feedback.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", arXiv 2210.17323, algorithm 1. Columns are rounded one
after another; each column's rounding error is spread over the columns not yet rounded, by
the rows of the Cholesky factor U of the inverse Hessian (H⁻¹ = UᵀU).

Scales come from the weight and are fixed before any column is rounded ("static groups"), so
that act-order costs nothing at inference: the stored order of columns never changes. With
``refine`` codes and scales are gone over again once all are there (`quantkit.algorithms.refine`).

With ``feedback`` the layer also makes up for what its quantized predecessors did to its input.
For inputs x where the unquantized model has x̃, Li et al. ("GPTAQ: Efficient Finetuning-Free
Quantization for Asymmetric Calibration", arXiv 2504.02692, §3) minimise ‖Ŵx − Wx̃‖² instead of
‖Ŵx − Wx‖². That is GPTQ's own problem around another weight,

    W* = W + W C H⁻¹,   C = E[(x̃ − x) xᵀ],

which is where Zhang et al. ("Qronos", arXiv 2505.11695, §3) start, too. GPTAQ spreads each
column's part of C only over columns not yet rounded; W* is the exact minimum before rounding and
needs no second column loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit import numerics
from quantkit.algorithms.clip import backend_for, code_kind, columns_of_a_scale, mse_scales
from quantkit.algorithms.refine import has_own_scales, refine
from quantkit.errors import QuantkitError
from quantkit.numerics import QTensor
from quantkit.schemes import DType, Granularity, QuantSpec, ScaleFormat

if TYPE_CHECKING:
    from quantkit.algorithms import Stats

#: damp: share of the mean diagonal that is added to the Hessian's diagonal.
#: actorder: ``static`` rounds columns with the largest diagonal first; ``none`` in order.
#: clip: ``mse`` narrows scales by column-weighted rounding error; ``none`` keeps min-max.
#: feedback: share of the predecessors' error that is made up for, 0 to 1; above 0 calibration
#:     runs the unquantized model, too.
#: fisher: exponent of each token's Fisher weight in the Hessian, 0 to 1 (`quantkit.fisher`);
#:     above 0 calibration goes back through the unquantized model first.
#: refine: rounds of coordinate descent on the codes, with scales fitted between them
#:     (`quantkit.algorithms.refine`); 0 leaves what the column loop made.
#: outputs: ``coupled`` also makes up for an error of one output in the others, as the Fisher
#:     matrix of the outputs says; with ``fisher`` and ``refine`` only.
OPTIONS: dict[str, Any] = {
    "damp": 0.01,
    "actorder": "static",
    "clip": "mse",
    "feedback": 0.0,
    "fisher": 0.0,
    "refine": 3,
    "outputs": "independent",
}


def solve(weight: Tensor, stats: Stats, spec: QuantSpec, options: Mapping[str, Any]) -> QTensor:
    """Quantize ``weight [N, K]`` against the Hessian of its inputs.

    Rows are independent unless outputs are coupled, so layers that share an input may be stacked.

    Args:
        weight: ``[N, K]``, the model's dtype, which is the dtype of the scales.
        stats: its ``hessian`` fp32 ``[K, K]``, ``drift`` for feedback, ``outputs`` if coupled.
        spec: any weight spec.
        options: see `OPTIONS`.

    Raises:
        QuantkitError: no Hessian, feedback without drift, or a Hessian that is not positive
            definite after damping.
    """
    if stats.hessian is None or stats.tokens == 0:
        raise QuantkitError("GPTQ without calibration tokens", remedy="give --data or use rtn")
    diagonal = stats.hessian.diagonal()
    order = (
        torch.argsort(diagonal, descending=True, stable=True)
        if options["actorder"] == "static"
        else torch.arange(weight.shape[1], device=weight.device)
    )
    ordered = stats.hessian.index_select(0, order).index_select(1, order)
    upper = inverse_factor(ordered, float(options["damp"]))
    target = weight.float()
    if options["feedback"]:
        target = _corrected(target, stats.drift, upper, order, float(options["feedback"]))
        weight = target.to(weight.dtype)
    scale, zero, global_scale = _scales(weight, spec, diagonal, str(options["clip"]))
    steps, zeros, group = _tables(scale, zero, global_scale, spec, weight.shape, order)
    rounded = backend_for(weight).gptq_round(
        target.index_select(1, order),
        upper,
        steps,
        zeros,
        group,
        code_kind(spec),
        spec.qmin,
        spec.qmax,
    )
    restored = rounded.index_select(1, torch.argsort(order))
    if options["refine"]:
        natural = torch.arange(weight.shape[1], device=weight.device)
        steps, zeros, _ = _tables(scale, zero, global_scale, spec, weight.shape, natural)
        restored, steps = refine(
            target,
            restored.contiguous(),
            steps.contiguous(),
            zeros,
            spec,
            _damped(stats.hessian, float(options["damp"])),
            int(options["refine"]),
            dtype=weight.dtype,
            outputs=stats.outputs,
        )
        if has_own_scales(spec):
            scale = steps.to(scale.dtype)
    return _to_codes(restored, scale, zero, global_scale, spec)


def _corrected(
    weight: Tensor, drift: Tensor | None, upper: Tensor, order: Tensor, share: float
) -> Tensor:
    """W + share · W C H⁻¹, fp32 ``[N, K]``, with the damped H⁻¹ = UᵀU of the ordered columns.

    Damping pulls W* towards W, as it does the rounded weight.
    """
    if drift is None:
        raise QuantkitError(
            "GPTQ with feedback, and the unquantized model's inputs were not observed",
            remedy="set `feedback: 0`",
        )
    pushed = (weight @ drift).index_select(1, order)
    change = (pushed @ upper.t() @ upper).index_select(1, torch.argsort(order))
    return weight + share * change


def _scales(
    weight: Tensor, spec: QuantSpec, diagonal: Tensor, clip: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if clip == "mse":
        return mse_scales(weight, spec, importance=diagonal)
    global_scale = numerics.global_scale_for(weight) if spec.scale is ScaleFormat.E4M3 else None
    scale, zero = numerics.compute_scales(*numerics.value_range(weight, spec), spec, global_scale)
    return scale, zero, global_scale


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Upper triangular U with H⁻¹ = UᵀU of the damped Hessian, fp32 ``[K, K]``.

    A column that calibration never excited (zero diagonal) has only the damping, or 1 without it:
    it is rounded to nearest and shares no error, but keeps its value for traffic that does excite
    it.

    Raises:
        QuantkitError: the damped Hessian is not positive definite.
    """
    damped = _damped(hessian, damp)
    # With J the reversal of rows and columns, J H J = M Mᵀ gives H = R Rᵀ for the upper
    # triangular R = J M J, so U = R⁻¹: one factorization and one triangular inverse, where
    # the usual chol(inverse(chol)) pays for three and loses more digits.
    lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(info) == 0:
        eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
        upper = inverse.flip(0, 1).contiguous()
    if int(info) != 0 or not numerics.is_finite(upper):
        raise QuantkitError(
            f"GPTQ: the Hessian [{hessian.shape[0]}] is not positive definite with damp {damp}",
            remedy=f"raise `damp` (try {max(damp * 10, 0.01):g}) or calibrate on more samples",
        )
    return upper


def _damped(hessian: Tensor, damp: float) -> Tensor:
    """H with ``damp`` times its mean diagonal on the diagonal, and 1 where that leaves a zero."""
    damped = hessian.clone()
    damped.diagonal().add_(damp * hessian.diagonal().mean())
    damped.diagonal()[damped.diagonal() == 0] = 1.0
    return damped


def _tables(
    scale: Tensor,
    zero: Tensor | None,
    global_scale: Tensor | None,
    spec: QuantSpec,
    shape: torch.Size,
    order: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Scale and zero fp32 ``[N, G]``, and which of the G each ordered column uses, ``[K]``."""
    effective = (scale if global_scale is None else scale / global_scale).float()

    def spread(values: Tensor) -> Tensor:
        if spec.granularity is Granularity.TENSOR:
            return values.reshape(1, 1).expand(shape[0], 1)
        if spec.granularity is Granularity.BLOCK:
            assert spec.block is not None
            return values.repeat_interleave(spec.block[0], 0)[: shape[0]]
        return values

    return (
        spread(effective),
        None if zero is None else spread(zero.float()),
        order // columns_of_a_scale(shape, spec),
    )


def _to_codes(
    values: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    global_scale: Tensor | None,
    spec: QuantSpec,
) -> QTensor:
    """A QTensor from code values that are representable already."""
    unit = QuantSpec(spec.bits, spec.dtype) if spec.scale is ScaleFormat.MODEL else spec
    if spec.dtype is DType.INT:
        codes = values.to(torch.int8)
    elif spec.bits == 8:
        codes = values.to(torch.float8_e4m3fn)
    else:
        ones = torch.ones(spec.scale_shape((values.shape[0], values.shape[1])), dtype=torch.float32)
        codes = numerics.quantize(values, ones.to(values), None, unit).codes
    return QTensor(codes.contiguous(), numerics.store_scale(scale, spec), zero, spec, global_scale)
