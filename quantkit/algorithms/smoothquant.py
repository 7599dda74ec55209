"""SmoothQuant: outliers of activations move into the weights, which have room for them.

Xiao, Lin, Seznec, Wu, Demouth, Han: "SmoothQuant: Accurate and Efficient Post-Training
Quantization for Large Language Models", arXiv 2211.10438, §4, equation 4:

    s_j = max |X_j|^α / max |W_j|^(1 − α)

over the calibration tokens and over the rows of every layer that reads X. At α = 0.5 the
scaled input and the scaled weights have the same largest value in every channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.algorithms.scaling import Scaling, best_or_unscaled

#: alpha: share of the difficulty that moves into the weights, 0 to 1; ``auto`` takes the one
#:     with the least measured output error of the quantized layers, or leaves a pair unscaled.
#: pairs: ``norms`` scales what a norm makes, as the paper does; ``all`` what v_proj and up_proj
#:     make, too.
#: cost: what ``auto`` takes for an error: ``output`` of the layers, all tokens alike; ``fisher``,
#:     what it costs the model's prediction, by one pass back through the original.
OPTIONS: dict[str, Any] = {"alpha": 0.5, "pairs": "norms", "cost": "output"}

#: What ``alpha: auto`` tries.
ALPHAS = tuple(i / 10 for i in range(11))

#: Smallest magnitude and smallest scale, as in the authors' code.
FLOOR = 1e-5


def scales(scaling: Scaling, options: Mapping[str, Any]) -> Tensor:
    """What to divide each channel of the input by.

    Args:
        scaling: the input and what reads it.
        options: see `OPTIONS`.

    Returns:
        fp32 ``[P]``, positive.
    """
    alpha = options["alpha"]
    if alpha != "auto":
        return smoothing(scaling, float(alpha))
    return best_or_unscaled(scaling, [smoothing(scaling, a) for a in ALPHAS])


def smoothing(scaling: Scaling, alpha: float) -> Tensor:
    """Equation 4; 1 for a channel that calibration never excited."""
    inputs = scaling.by_channel(scaling.maxima)
    columns = torch.stack([c.weight.abs().amax(0).float() for c in scaling.consumers]).amax(0)
    weights = scaling.by_channel(columns)
    found = inputs.clamp(min=FLOOR).pow(alpha) / weights.clamp(min=FLOOR).pow(1 - alpha)
    return torch.where(inputs > 0, found.clamp(min=FLOOR), torch.ones_like(found))
