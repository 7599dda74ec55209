"""Shapes and dtypes of the calibration operators, for ``torch.compile`` and meta tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.ops import schema as _schema  # noqa: F401  defines the operators


@torch.library.register_fake("quantkit::gptq_round")
def _gptq_round(
    weight: Tensor,
    upper: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group: Tensor,
    kind: int,
    qmin: float,
    qmax: float,
) -> Tensor:
    return weight.new_empty(weight.shape)


@torch.library.register_fake("quantkit::rounding_errors")
def _rounding_errors(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    importance: Tensor | None,
    group_size: int,
    kind: int,
    qmin: float,
    qmax: float,
) -> Tensor:
    return scales.new_empty(scales.shape)


@torch.library.register_fake("quantkit::syrk_accumulate")
def _syrk_accumulate(acc: Tensor, x: Tensor) -> None:
    return None


@torch.library.register_fake("quantkit::descend_codes")
def _descend_codes(
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
    return None
