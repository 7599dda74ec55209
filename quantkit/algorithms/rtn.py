"""Round to nearest: no calibration, the floor every other solver must beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from quantkit import numerics
from quantkit.algorithms.clip import mse_scales
from quantkit.numerics import QTensor
from quantkit.schemes import QuantSpec

if TYPE_CHECKING:
    from quantkit.algorithms import Stats

#: clip: ``none`` keeps min-max scales; ``mse`` narrows them (`clip.mse_scales`).
OPTIONS: dict[str, Any] = {"clip": "none"}


def solve(weight: Tensor, stats: Stats, spec: QuantSpec, options: Mapping[str, Any]) -> QTensor:
    """Round ``weight [N, K]`` to the nearest representable values."""
    if options["clip"] == "none":
        return numerics.quantize_weight(weight, spec)
    scale, zero, global_scale = mse_scales(weight, spec)
    return numerics.quantize(weight, scale, zero, spec, global_scale)
