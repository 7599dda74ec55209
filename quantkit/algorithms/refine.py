"""Refinement of a rounded weight: codes by coordinate descent, scales by least squares, in turn.

GPTQ decides each code once, with the codes behind it still unrounded, and never looks back; its
scales are chosen before any code is. Both leave room below: with E = W − Ŵ and the Hessian H of the
inputs, tr(E H Eᵀ) falls by a tenth when every code is gone through again with all others in place
(Behdin et al., "QuantEase", arXiv 2309.01885, §3.2) and every row's scales are those of least error
for its codes (Kim et al., "GuidedQuant", arXiv 2505.07004, §4, alternates the two in the same way).

With a Fisher matrix G of the layer's outputs, the error is tr(G E H Eᵀ): outputs are no longer
independent, and an error in one is worth making up for in another. That Kronecker product is what
Tseng et al. ("Model-Preserving Adaptive Rounding", arXiv 2505.22988, §3) round against; they feed
errors back along both factors, where coordinate descent needs no factorization and cannot do worse
than what it starts from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.algorithms.clip import backend_for, code_kind, columns_of_a_scale
from quantkit.schemes import Granularity, QuantSpec, ScaleFormat

#: Share of the mean diagonal that is added to a Fisher matrix of outputs: it is an estimate from
#: one draw a token, and the codes of one layer must not lean on what another draw would not show.
OUTPUT_DAMP = 0.3

#: Passes over all codes between two fits of the scales.
SWEEPS = 4

#: Normal equations that are in memory at once: groups² floats a row, 64 MB in all.
NORMAL_FLOATS = 1 << 24


def refine(
    target: Tensor,
    codes: Tensor,
    steps: Tensor,
    zeros: Tensor | None,
    spec: QuantSpec,
    hessian: Tensor,
    rounds: int,
    *,
    dtype: torch.dtype,
    outputs: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Lower tr(G E H Eᵀ), round after round.

    Args:
        target: fp32 ``[N, K]``.
        codes: fp32 ``[N, K]``, values of the codes; changed in place.
        steps: scales as they are multiplied with, fp32 ``[N, groups]``.
        zeros: like ``steps``, in units of the code, or None.
        spec: of the weight.
        hessian: fp32 ``[K, K]``, damped.
        rounds: descents; between two of them scales are fitted, if each row has its own in the
            model's dtype.
        dtype: of the scales.
        outputs: G as its diagonal blocks, fp32 ``[n, n]`` each, N rows in all; empty for the
            identity.

    Returns:
        codes and steps.
    """
    blocks = damped_outputs(outputs)
    for turn in range(rounds):
        if turn and has_own_scales(spec):
            steps = fit_scales(target, codes, steps, zeros, spec, hessian, dtype)
        _descend(target, codes, steps, zeros, spec, hessian, blocks)
    return codes, steps


def has_own_scales(spec: QuantSpec) -> bool:
    """Whether every row of a weight has scales of its own, in the model's dtype."""
    by_row = spec.granularity in (Granularity.GROUP, Granularity.CHANNEL)
    return by_row and spec.scale is ScaleFormat.MODEL


def fit_scales(
    target: Tensor,
    codes: Tensor,
    steps: Tensor,
    zeros: Tensor | None,
    spec: QuantSpec,
    hessian: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The scales of least (w − ŵ) H (w − ŵ)ᵀ for each row's codes, rounded to ``dtype``.

    With q_g the codes of group g and zeros elsewhere, ŵ = Σ s_g q_g and the s solve A s = b, A_gh =
    q_g H q_hᵀ, b_g = q_g H wᵀ. A row whose error would rise all the same, by rounding, and a scale
    that would change its sign or vanish, stay as they are.

    Args:
        as of `refine`.

    Returns:
        fp32 ``[N, groups]``.
    """
    width = columns_of_a_scale(target.shape, spec)
    count = max(1, NORMAL_FLOATS // steps.shape[1] ** 2)
    fitted = []
    for start in range(0, len(codes), count):
        rows = slice(start, start + count)
        own = None if zeros is None else zeros[rows]
        fitted.append(_fit_rows(target[rows], codes[rows], steps[rows], own, width, hessian, dtype))
    return torch.cat(fitted)


def _fit_rows(
    target: Tensor,
    codes: Tensor,
    steps: Tensor,
    zeros: Tensor | None,
    width: int,
    hessian: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    groups = steps.shape[1]
    offsets = codes if zeros is None else codes - _spread(zeros, width, codes)
    pull = target @ hessian
    normal = torch.empty(len(codes), groups, groups, device=codes.device, dtype=torch.float32)
    right = torch.empty(len(codes), groups, device=codes.device, dtype=torch.float32)
    for g, part in enumerate(offsets.split(width, dim=1)):
        span = slice(g * width, g * width + part.shape[1])
        normal[:, g] = _sums((part @ hessian[span]) * offsets, width)
        right[:, g] = (part * pull[:, span]).sum(1)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    # A group of zeros has no scale to fit.
    floor = 1e-6 * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
    diagonal.add_(floor)
    solved, failed = torch.linalg.solve_ex(normal, right)
    fitted = solved.to(dtype).float()
    usable = (fitted * steps > 0) & fitted.isfinite() & (failed == 0)[:, None]
    fitted = torch.where(usable, fitted, steps)

    def errors(s: Tensor) -> Tensor:
        error = target - offsets * _spread(s, width, codes)
        return ((error @ hessian) * error).sum(1, keepdim=True)

    return torch.where(errors(fitted) < errors(steps), fitted, steps)


def _descend(
    target: Tensor,
    codes: Tensor,
    steps: Tensor,
    zeros: Tensor | None,
    spec: QuantSpec,
    hessian: Tensor,
    outputs: Sequence[Tensor],
) -> None:
    width = columns_of_a_scale(target.shape, spec)
    offsets = codes if zeros is None else codes - _spread(zeros, width, codes)
    moment = (target - offsets * _spread(steps, width, codes)) @ hessian
    # One code after another is work for a CPU, wherever the model is.
    found, moment, steps = codes.cpu(), moment.cpu(), steps.cpu()
    zeros = None if zeros is None else zeros.cpu()
    group = torch.arange(codes.shape[1]) // width
    start = 0
    blocks: Sequence[Tensor | None] = outputs or (None,)
    for block in blocks:
        stop = len(found) if block is None else start + len(block)
        backend_for(found).descend_codes(
            found[start:stop],
            moment[start:stop],
            hessian.cpu(),
            block,
            steps[start:stop],
            None if zeros is None else zeros[start:stop],
            group,
            code_kind(spec),
            spec.qmin,
            spec.qmax,
            SWEEPS,
        )
        start = stop
    if found is not codes:
        codes.copy_(found)


def damped_outputs(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Diagonal blocks of G with `OUTPUT_DAMP`, fp32 on the CPU."""
    damped = []
    for block in outputs:
        own = block.float().cpu().clone()
        own.diagonal().add_(OUTPUT_DAMP * own.diagonal().mean())
        damped.append(own)
    return damped


def _spread(table: Tensor, width: int, like: Tensor) -> Tensor:
    """A value for each column ``[N, K]`` from one for each group ``[N, groups]``."""
    return table.repeat_interleave(width, 1)[:, : like.shape[1]]


def _sums(values: Tensor, width: int) -> Tensor:
    """Sums over groups of columns ``[N, groups]``."""
    return torch.stack([part.sum(1) for part in values.split(width, dim=1)], 1)
