"""Distillation of scales and norms against the original model's predictions.

Solvers minimise errors of single layers. What they leave, some of it shared by many layers, can be
taken back by training few numbers on the whole model's error. Hinton, Vinyals, Dean: "Distilling
the Knowledge in a Neural Network" (arXiv 1503.02531) gives the loss, the divergence from the
original's prediction at every token; Chen et al., "EfficientQAT" (arXiv 2407.11062, §3.3) train
nothing but the scales end to end; Li et al., "Norm Tweaking" (arXiv 2309.02784) the norms; Liu et
al., "LLM-QAT" (arXiv 2305.17888) all weights, straight through their rounding.

Codes stay as they were rounded, unless `weight_lr` is asked for. At 3 bits and up a code's own
gradient is too noisy to round by: a few ten thousand tokens do not tell its sign
(benchmarks/LOG.md), while a scale's sums over its group's. At 2 bits some hundred thousand do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit import numerics
from quantkit.numerics import QTensor
from quantkit.schemes import DType

#: steps: of Adam, with a warm-up of 5 and a cosine down to a twentieth.
#: windows: calibration windows a step.
#: scale_lr, norm_lr: learning rates, relative to a scale's and to a norm's size.
#: weight_lr: of weights, in steps of the code; 0 leaves codes as they are.
#: answers: weight in the loss of predicting a token of an answer; any other token has 1.
#: seed: of the order of windows.
OPTIONS: dict[str, Any] = {
    "steps": 40,
    "windows": 2,
    "scale_lr": 0.002,
    "norm_lr": 0.001,
    "weight_lr": 0.0,
    "answers": 1.0,
    "seed": 0,
}

#: Adam's decay rates: with tens of steps, second moments must follow within tens.
BETAS = (0.9, 0.99)

_WARM_UP = 5
_LEAST_RATE = 0.05

#: Tokens whose predictions are compared at once: 4 · vocabulary bytes each, several times.
PREDICTED_TOKENS = 128


def learning_rate(step: int, steps: int) -> float:
    """Share of the full learning rate at a step: warm-up, then a cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / _WARM_UP) * (_LEAST_RATE + (1 - _LEAST_RATE) * cosine)


def levels(q: QTensor) -> Tensor:
    """Code minus zero point, ``[N, K]``: what a scale is multiplied by. int8, int16 or fp8."""
    if q.zero is None or q.spec.dtype is DType.FLOAT:
        return q.codes
    groups = numerics.to_groups(q.codes.short(), q.spec)
    zero = q.zero.short().reshape(*groups.shape[:-1], 1)
    return numerics.from_groups(groups - zero, q.spec, q.codes.shape)


class ScaledLinear(torch.autograd.Function):
    """``y = x Ŵᵀ + b`` with Ŵ = scale · levels, differentiable in x and scale.

    The gradient of a scale is that of Ŵ, summed over what the scale multiplies. It passes the
    rounding of scales to the model's dtype unchanged (straight through).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, weight: Tensor, q: QTensor, bias: Tensor | None
    ) -> Tensor:
        """x ``[..., K]`` and weight ``[N, K]`` in the model's dtype, scale fp32."""
        ctx.save_for_backward(x, weight)
        ctx.q, ctx.scale_shape = q, scale.shape
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        rows = dy.reshape(-1, dy.shape[-1])
        dw = rows.t() @ x.reshape(-1, x.shape[-1])
        shares = numerics.to_groups(dw * levels(ctx.q).to(dw), ctx.q.spec)
        return dx, shares.sum(-1, dtype=torch.float32).reshape(ctx.scale_shape), None, None, None


def divergence(
    hidden: Tensor,
    target: Tensor,
    student: Callable[[Tensor], Tensor],
    teacher: Callable[[Tensor], Tensor],
    weight: float = 0.0,
    weights: Tensor | None = None,
) -> float:
    """Σ w · KL(teacher ‖ student) over tokens, nats; with a weight, its gradient goes back, too.

    Predictions of a few tokens are in memory at a time.

    Args:
        hidden: what the student's head sees, ``[..., H]``; with its graph if it goes back.
        target: what the teacher's head sees, the same shape.
        student, teacher: hidden states ``[tokens, H]`` → logits ``[tokens, V]``.
        weight: of the sum in the loss that is differentiated; 0 computes it only.
        weights: each token's own, fp32 ``[...]``; all 1 by default.
    """
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1, target.shape[-1])
    gradient = torch.empty_like(rows) if weight else None
    total = 0.0
    for start in range(0, len(rows), PREDICTED_TOKENS):
        span = slice(start, start + PREDICTED_TOKENS)
        part = rows[span].detach().requires_grad_(gradient is not None)
        with torch.no_grad():
            wanted = teacher(targets[span]).float().log_softmax(-1)
        with torch.set_grad_enabled(gradient is not None):
            found = student(part).float().log_softmax(-1)
            each = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
            kl = (each if weights is None else each * weights.reshape(-1)[span].to(each)).sum()
        total += float(kl.detach())
        if gradient is not None:
            (gradient[span],) = torch.autograd.grad(kl * weight, part)
    if gradient is not None:
        rows.backward(gradient)
    return total
