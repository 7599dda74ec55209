"""The calibration operators in plain torch: the oracle of the native kernels, same signatures.

They run on any device, in the dtype of their fp32 or fp64 arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.ops.solvers import CODE_E4M3, CODE_INT

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)

#: Columns between two lazy updates of the columns that follow, in `gptq_round`.
_LAZY = 128


#: A change of a code in `descend_codes` must lower its distance from the best value to this share.
_GAIN = 0.9999


def round_codes(x: Tensor, kind: int, qmin: float, qmax: float) -> Tensor:
    """The nearest code of each value, ties to the even code; same shape and dtype."""
    x = x.clamp(qmin, qmax)
    if kind == CODE_INT:
        return torch.round(x)
    if kind == CODE_E4M3:
        return x.to(torch.float8_e4m3fn).to(x.dtype)
    magnitude = x.abs()
    index = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
    for i, midpoint in enumerate(_E2M1_MIDPOINTS):
        index += (magnitude > midpoint) if i % 2 == 0 else (magnitude >= midpoint)
    values = torch.tensor(_E2M1, dtype=x.dtype, device=x.device)[index]
    return torch.where(x.isnan(), x, torch.copysign(values, x))


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
    """Algorithm 1 of arXiv 2210.17323 as it is written, a column of all rows at a time.

    The work is on transposed tensors: a column of the weight is then contiguous.
    """
    columns = weight.shape[1]
    w = weight.t().contiguous()
    s = scale.t()[group.long()]
    z = None if zero is None else zero.t()[group.long()]
    codes = torch.empty_like(w)
    for start in range(0, columns, _LAZY):
        stop = min(start + _LAZY, columns)
        errors = torch.empty_like(w[start:stop])
        factor = upper[start:stop, start:stop]
        for i in range(stop - start):
            j = start + i
            scaled = w[j] / s[j]
            if z is not None:
                scaled += z[j]
            code = round_codes(scaled, kind, qmin, qmax)
            codes[j] = code
            value = (code - z[j]) * s[j] if z is not None else code * s[j]
            error = (w[j] - value) / factor[i, i]
            errors[i] = error
            if i + 1 < stop - start:
                w[j + 1 : stop].addr_(factor[i, i + 1 :], error, alpha=-1.0)
        if stop < columns:
            w[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1.0)
    return codes.t().contiguous()


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
    """One code of one row at a time where outputs are coupled; else of all rows at once, which are
    independent: the order of a row's columns is the same."""
    rows, columns = codes.shape
    s = scale.to(codes.dtype)[:, group.long()]
    diagonal = None if output is None else output.diagonal()

    def best(i: int | slice, j: int, push: Tensor, curvature: Tensor) -> Tensor:
        z = 0 if zero is None else zero[i, group[j].long()].to(codes.dtype)
        value = codes[i, j] - z
        target = value + push / (curvature * s[i, j])
        code = round_codes(target + z, kind, qmin, qmax)
        better = (target - (code - z)).abs() < _GAIN * (target - value).abs()
        return torch.where(better, code, codes[i, j])

    for _ in range(sweeps):
        here = 0
        for j in range(columns):
            if not hessian[j, j] > 0:
                continue
            if output is None:
                code = best(slice(None), j, moment[:, j], hessian[j, j])
                change = (code - codes[:, j]) * s[:, j]
                here += int((code != codes[:, j]).sum())
                codes[:, j] = code
                moment.addr_(change, hessian[j], alpha=-1.0)
                continue
            assert diagonal is not None
            for i in range(rows):
                if not diagonal[i] > 0:
                    continue
                code = best(i, j, output[i] @ moment[:, j], diagonal[i] * hessian[j, j])
                if code != codes[i, j]:
                    moment[i] -= (code - codes[i, j]) * s[i, j] * hessian[j]
                    codes[i, j] = code
                    here += 1
        if here == 0:
            break


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
    """Each candidate as a pass over the whole weight."""
    n, k = weight.shape
    groups = scales.shape[2]
    wide = weight.to(scales.dtype)
    group = torch.arange(k, device=weight.device) // group_size
    errors = torch.zeros_like(scales)
    for i, scale in enumerate(scales):
        s = scale[:, group]
        z = None if zeros is None else zeros[i][:, group]
        code = round_codes(wide / s if z is None else wide / s + z, kind, qmin, qmax)
        error = ((code if z is None else code - z) * s - wide).square()
        if importance is not None:
            error = error * importance
        errors[i] = errors.new_zeros(n, groups).index_add_(1, group, error)
    return errors


def syrk_accumulate(acc: Tensor, x: Tensor) -> None:
    """The whole product, of which the lower triangle is added."""
    wide = x.float() if x.dtype != acc.dtype else x
    acc.add_((wide.t() @ wide).tril())
