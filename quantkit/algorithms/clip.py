"""Mean-squared-error clipping: narrower scales that round better where they saturate."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit import numerics
from quantkit.ops import CODE_E2M1, CODE_E4M3, CODE_INT, Backend, get_backend
from quantkit.schemes import DType, Granularity, QuantSpec, ScaleFormat

#: Shares of the min-max range that are tried. Below one half saturation always costs more
#: than finer steps gain, for any bell-shaped group of three bits or more.
SHARES = tuple(1.0 - 0.025 * i for i in range(21))

#: The same of two bits. Their best step for a bell is about its standard deviation, wherever its
#: ends are: 0.56 of the min-max step for 128 normal weights, half of that where some are far out.
SHARES_OF_2_BITS = tuple(1.0 - 0.025 * i for i in range(31))

#: Bits up to which the zero points beside min-max's are tried, too. Which of four or eight values
#: lies at zero decides how far codes reach to either side; of 16, saturation hardly notices.
SHIFTED_BITS = 3

#: Candidate scales that are held at a time: some 16 MB a table.
_CANDIDATES = 1 << 22


def mse_scales(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scales that minimise the squared error of rounding each group to nearest.

    A grid search over `shares` of the min-max range, under each of `shifts` of the zero point,
    each group by itself; the min-max scale is among the candidates, so the result is never worse.
    Candidates are scales in the weight's dtype. Their errors are computed in fp32 where each row
    has its own scales.

    Args:
        weight: ``[N, K]``.
        spec: any weight spec.
        importance: fp32 ``[K]`` non-negative weights of the columns' squared errors (the
            Hessian's diagonal), or None for equal ones.

    Returns:
        (scale, zero, global_scale) as `numerics.quantize` takes them.

    Raises:
        QuantkitError: the weight holds NaN or infinity.
    """
    if spec.granularity not in (Granularity.CHANNEL, Granularity.GROUP):
        return dense_search(weight, spec, importance)
    global_scale = numerics.global_scale_for(weight) if spec.scale is ScaleFormat.E4M3 else None
    if importance is not None:
        importance = importance.float().contiguous()
    groups = spec.scale_shape((weight.shape[0], weight.shape[1]))[1]
    each = len(shares(spec)) * max(2, len(shifts(spec)))
    rows = max(_CANDIDATES // (each * groups), 1)
    found = [_search(part, spec, importance, global_scale) for part in weight.split(rows)]
    # A value that is not finite makes its group's error so, and those are fewer to look at.
    if not all(finite for _, _, finite in found):
        numerics.check_finite(weight, f"weight {tuple(weight.shape)}")
    scale = torch.cat([scale for scale, _, _ in found])
    zeros = [zero for _, zero, _ in found if zero is not None]
    return scale, torch.cat(zeros) if zeros else None, global_scale


def _search(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None, global_scale: Tensor | None
) -> tuple[Tensor, Tensor | None, bool]:
    """The best scale and zero of every group of these rows, and whether all errors are finite."""
    low, high = numerics.value_range(weight, spec)
    scales, zeros = numerics.compute_scales(
        torch.stack([low * share for share in shares(spec)]),
        torch.stack([high * share for share in shares(spec)]),
        spec,
        global_scale,
    )
    if has_one_code_more(spec):
        scales = torch.cat([scales, -scales])
    if zeros is not None:
        scales = torch.cat([scales] * len(shifts(spec)))
        zeros = torch.cat([shifted(zeros, by, spec) for by in shifts(spec)])
    errors = backend_for(weight).rounding_errors(
        weight if weight.dtype in (torch.bfloat16, torch.float16) else weight.float(),
        (scales if global_scale is None else scales / global_scale).float(),
        None if zeros is None else zeros.float(),
        importance,
        spec.group_size or weight.shape[1],
        code_kind(spec),
        spec.qmin,
        spec.qmax,
    )
    best = errors.argmin(0, keepdim=True)  # the first of equals: the widest, and positive
    zero = None if zeros is None else zeros.gather(0, best)[0]
    return scales.gather(0, best)[0], zero, bool(errors[0].isfinite().all())


def has_one_code_more(spec: QuantSpec) -> bool:
    """Whether codes reach further on the negative side: a negative scale then turns the longer side
    to where the group's largest weight is, as llama.cpp's Q4_0 does. Formats without a sign in
    their scales, and few-bit codes only: of 256 codes one more is nothing."""
    integers = spec.dtype is DType.INT and spec.symmetric and spec.scale is ScaleFormat.MODEL
    return integers and spec.bits < 8 and -spec.qmin > spec.qmax


def shares(spec: QuantSpec) -> tuple[float, ...]:
    """Shares of the min-max range that are tried, the whole of it first."""
    return SHARES_OF_2_BITS if spec.dtype is DType.INT and spec.bits == 2 else SHARES


def shifts(spec: QuantSpec) -> tuple[int, ...]:
    """What is added to the zero point of the min-max range, nothing first."""
    return (0, -1, 1) if not spec.symmetric and spec.bits <= SHIFTED_BITS else (0,)


def shifted(zero: Tensor, by: int, spec: QuantSpec) -> Tensor:
    """Zero points moved by as many codes, as far as there are codes; the same dtype."""
    return (zero + by).clamp(int(spec.qmin), int(spec.qmax))


def backend_for(tensor: Tensor) -> Backend:
    """The calibration kernels are written for CPUs; elsewhere their torch form runs."""
    return get_backend("native" if tensor.device.type == "cpu" else "reference")


def code_kind(spec: QuantSpec) -> int:
    """What the operators of `quantkit.ops.solvers` call the codes of this spec."""
    if spec.dtype is DType.INT:
        return CODE_INT
    return CODE_E4M3 if spec.bits == 8 else CODE_E2M1


def output_scales(
    weight: Tensor, spec: QuantSpec, hessian: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scales that minimise each group's own share of the squared output error.

    The grid of `mse_scales`; a group's error is Σ δ H_gg δᵀ over the rows that share its scale,
    with H_gg its columns' block of the Hessian.

    Args:
        weight: ``[N, K]``.
        spec: any weight spec.
        hessian: fp32 ``[K, K]``.

    Returns:
        (scale, zero, global_scale) as `numerics.quantize` takes them.

    Raises:
        QuantkitError: the weight holds NaN or infinity.
    """
    blocks = _diagonal_blocks(hessian, columns_of_a_scale(weight.shape, spec))
    width = blocks.shape[-1]

    def errors(delta: Tensor) -> Tensor:
        rows = F.pad(delta, (0, len(blocks) * width - delta.shape[1])).unflatten(1, (-1, width))
        by_row = (torch.einsum("ngi,gij->ngj", rows, blocks) * rows).sum(-1)
        if spec.granularity is Granularity.TENSOR:
            return by_row.sum().reshape(1)
        if spec.granularity is Granularity.BLOCK:
            assert spec.block is not None
            padded = F.pad(by_row, (0, 0, 0, -len(by_row) % spec.block[0]))
            return padded.unflatten(0, (-1, spec.block[0])).sum(1)
        return by_row

    return _dense_search(weight, spec, errors)


def columns_of_a_scale(shape: Sequence[int], spec: QuantSpec) -> int:
    """Columns of a row of ``[N, K]`` that share a scale."""
    if spec.granularity is Granularity.GROUP:
        assert spec.group_size is not None
        return spec.group_size
    if spec.granularity is Granularity.BLOCK:
        assert spec.block is not None
        return spec.block[1]
    return shape[1]


def _diagonal_blocks(hessian: Tensor, width: int) -> Tensor:
    """``[G, width, width]``, the last one padded with zeros."""
    extra = -len(hessian) % width
    padded = F.pad(hessian, (0, extra, 0, extra))
    starts = range(0, len(padded), width)
    return torch.stack([padded[i : i + width, i : i + width] for i in starts])


def dense_search(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`mse_scales` for scales that rows share, and its plain form for any other."""

    def errors(delta: Tensor) -> Tensor:
        squares = delta.square() if importance is None else delta.square() * importance
        return numerics.to_groups(squares, spec).sum(-1)

    return _dense_search(weight, spec, errors)


def _dense_search(
    weight: Tensor, spec: QuantSpec, errors: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The best candidate for every scale under any error of Ŵ − W fp32 ``[N, K]``.

    Every candidate is quantized and dequantized as a whole, in the weight's dtype.
    """
    low, high = numerics.value_range(weight, spec)
    global_scale = numerics.global_scale_for(weight) if spec.scale is ScaleFormat.E4M3 else None
    best, zero = numerics.compute_scales(low, high, spec, global_scale)
    reference = weight.float()
    least: Tensor | None = None
    signs = (1, -1) if has_one_code_more(spec) else (1,)
    for sign, by, share in itertools.product(signs, shifts(spec), shares(spec)):
        scale, candidate_zero = numerics.compute_scales(
            low * share, high * share, spec, global_scale
        )
        scale = scale * sign
        if candidate_zero is not None:
            candidate_zero = shifted(candidate_zero, by, spec)
        q = numerics.quantize(weight, scale, candidate_zero, spec, global_scale)
        error = errors(numerics.dequantize(q, torch.float32) - reference)
        if least is None:
            least = error
            continue
        better = (error < least).reshape(scale.shape)
        least = torch.minimum(error, least)
        best = torch.where(better, scale, best)
        if zero is not None and candidate_zero is not None:
            zero = torch.where(better, candidate_zero, zero)
    return best, zero, global_scale
