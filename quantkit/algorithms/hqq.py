"""HQQ: zero points for weights whose errors are heavy-tailed, without any calibration.

Badri, Shaji: "Half-Quadratic Quantization of Large Machine Learning Models", Mobius Labs, 2023
(https://mobiusml.github.io/hqq_blog/). Minimizes Σ |w − ŵ|^p with p < 1 over a group's zero
point by half-quadratic splitting: an auxiliary error e takes the outliers,

    e ← shrink(w − ŵ, β),   z ← mean(code − (w − e) / s),   β ← κ β.

HQQ's own format stores real zero points; compressed-tensors stores integers, under which the
min-max scale leaves z nowhere to go. So the iteration runs at several shares of that scale, z is
rounded whenever its error is measured, and each group keeps the best it met, min-max's own
among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit import numerics
from quantkit.algorithms.clip import SHARES
from quantkit.errors import QuantkitError
from quantkit.numerics import QTensor
from quantkit.schemes import QuantSpec

if TYPE_CHECKING:
    from quantkit.algorithms import Stats

#: p: norm of the error, below 1. beta, kappa: the penalty and its growth a step, relative to
#: weights in units of their scale. steps: at each share of the scale.
OPTIONS: dict[str, Any] = {"p": 0.7, "beta": 10.0, "kappa": 1.01, "steps": 5}


def solve(weight: Tensor, stats: Stats, spec: QuantSpec, options: Mapping[str, Any]) -> QTensor:
    """Quantize ``weight [N, K]`` under an asymmetric integer spec.

    Args:
        weight: ``[N, K]``, the model's dtype, which is the dtype of the scales.
        stats: not used.
        spec: with zero points.
        options: see `OPTIONS`.

    Raises:
        QuantkitError: the spec has no zero points.
    """
    if spec.symmetric:
        raise QuantkitError(
            f"hqq moves zero points, and {spec.label()} has none",
            remedy="use an asymmetric scheme such as w4a16-asym-g64",
        )
    low, high = numerics.value_range(weight, spec)
    groups = numerics.to_groups(weight.float(), spec)
    p = float(options["p"])
    best_scale, best_zero = numerics.compute_scales(low, high, spec)
    assert best_zero is not None
    least = torch.full_like(best_scale, torch.inf, dtype=torch.float32)
    for share in SHARES[::2]:
        scale, zero = numerics.compute_scales(low * share, high * share, spec)
        assert zero is not None
        size = scale.float()
        steps = groups / size.unsqueeze(-1)
        z, beta = zero.float(), float(options["beta"])
        for _ in range(int(options["steps"])):
            rounded = torch.clamp(torch.round(z), spec.qmin, spec.qmax)
            error = (steps - _restore(steps, rounded, spec)).abs().pow(p).sum(-1) * size.pow(p)
            better = error < least
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, rounded.to(best_zero.dtype), best_zero)
            least = torch.minimum(error, least)
            restored = _restore(steps, z, spec)
            outliers = shrink(steps - restored, beta, p)
            z = z + (restored - steps + outliers).mean(-1)
            beta *= float(options["kappa"])
    return numerics.quantize(weight, best_scale, best_zero, spec)


def shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """The generalized soft threshold: sign(x) · max(|x| − |x|^(p − 1) / β, 0)."""
    size = x.abs()
    # |x|^(p − 1) is infinite at 0, where the threshold takes everything.
    return torch.sign(x) * torch.relu(size - size.clamp(min=1e-12).pow(p - 1) / beta)


def _restore(steps: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """ŵ of each group in units of its scale."""
    zero = zero.unsqueeze(-1)
    return torch.clamp(torch.round(steps + zero), spec.qmin, spec.qmax) - zero
