"""AWQ: columns that meet large activations are scaled up before rounding.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han: "AWQ: Activation-aware Weight
Quantization for LLM Compression and Acceleration", arXiv 2306.00978, §3.2, equations 4 and 5:

    s = s_X^α,   α* = argmin ‖Q(W · diag(s)) (diag(s)⁻¹ X) − W X‖²

with s_X the mean magnitude of each channel and a grid over α in [0, 1). α = 0 is round to
nearest, so the result is never worse on this objective. The paper's clip search is the option
``clip: output`` of the solver ``rtn``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quantkit.algorithms.scaling import Scaling, least_error

#: grid: how many exponents are tried.
#: pairs: ``all`` scales whatever a scaling folds into; ``norms`` only what a norm makes.
OPTIONS: dict[str, Any] = {"grid": 20, "pairs": "all"}

#: Smallest power before the scales are centred, as in the authors' code.
FLOOR = 1e-4


def scales(scaling: Scaling, options: Mapping[str, Any]) -> Tensor:
    """What to divide each channel of the input by.

    Args:
        scaling: the input and what reads it, with its Hessian.
        options: see `OPTIONS`.

    Returns:
        fp32 ``[P]``, positive.
    """
    grid = int(options["grid"])
    return least_error(scaling, [candidate(scaling, i / grid) for i in range(grid)])


def candidate(scaling: Scaling, alpha: float) -> Tensor:
    """s_X^α, centred so that the largest and the smallest scale multiply to 1."""
    powers = scaling.by_channel(scaling.means, "mean").pow(alpha).clamp(min=FLOOR)
    return powers / (powers.max() * powers.min()).sqrt()
