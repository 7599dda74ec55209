"""Mean-squared-error clipping: narrower scales that round better where they saturate."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit import numerics
from quantkit.schemes import QuantSpec, ScaleFormat

#: Shares of the min-max range that are tried. Below one half saturation always costs more
#: than finer steps gain, for any bell-shaped group.
SHARES = tuple(1.0 - 0.025 * i for i in range(21))


def mse_scales(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scales that minimise the squared error of rounding each group to nearest.

    A grid search over `SHARES` of the min-max range, each group by itself; the min-max
    scale is among the candidates, so the result is never worse.

    Args:
        weight: ``[N, K]``.
        spec: any weight spec.
        importance: fp32 ``[K]`` non-negative weights of the columns' squared errors (the
            Hessian's diagonal), or None for equal ones.

    Returns:
        (scale, zero, global_scale) as `numerics.quantize` takes them.
    """
    low, high = numerics.value_range(weight, spec)
    global_scale = numerics.global_scale_for(weight) if spec.scale is ScaleFormat.E4M3 else None
    best, zero = numerics.compute_scales(low, high, spec, global_scale)
    reference = weight.float()
    least: Tensor | None = None
    for share in SHARES:
        scale, candidate_zero = numerics.compute_scales(
            low * share, high * share, spec, global_scale
        )
        q = numerics.quantize(weight, scale, candidate_zero, spec, global_scale)
        error = (numerics.dequantize(q, torch.float32) - reference).square()
        if importance is not None:
            error = error * importance
        error = numerics.to_groups(error, spec).sum(-1)
        if least is None:
            least = error
            continue
        better = (error < least).reshape(scale.shape)
        least = torch.minimum(error, least)
        best = torch.where(better, scale, best)
        if zero is not None and candidate_zero is not None:
            zero = torch.where(better, candidate_zero, zero)
    return best, zero, global_scale
