"""Outlier suppression: only the channels that stand out are divided, and only down to the others.

Wei et al., "Outlier Suppression+: Accurate quantization of large language models by equivalent and
optimal shifting and scaling" (arXiv 2304.09145, §4.2):

    s_j = max(1, max |X_j| / t)

A threshold t in units of the median channel's largest value is a rule for every layer, but no one
t serves all layers: it is searched for each input. SmoothQuant shifts difficulty in every channel;
where a static scale is set by a few, this moves what those few need and leaves all others alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.algorithms.scaling import Scaling, best_or_unscaled

#: threshold: t, in units of the median over channels of max |X_j|; ``auto`` takes the best of
#:     `THRESHOLDS`, or leaves an input unscaled.
#: pairs, cost: see `quantkit.algorithms.smoothquant.OPTIONS`. A layer's own error is no guide for a
#:     static scale: its largest tokens are few, and what all others read.
OPTIONS: dict[str, Any] = {"threshold": "auto", "pairs": "all", "cost": "fisher"}

#: What ``threshold: auto`` tries.
THRESHOLDS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0)


def scales(scaling: Scaling, options: Mapping[str, Any]) -> Tensor:
    """What to divide each channel of the input by.

    Args:
        scaling: the input and what reads it.
        options: see `OPTIONS`.

    Returns:
        fp32 ``[P]``, at least 1.
    """
    threshold = options["threshold"]
    if threshold != "auto":
        return suppression(scaling, float(threshold))
    return best_or_unscaled(scaling, [suppression(scaling, t) for t in THRESHOLDS])


def suppression(scaling: Scaling, threshold: float) -> Tensor:
    """The rule at one threshold; 1 for a channel that calibration never excited."""
    maxima = scaling.by_channel(scaling.maxima)
    excited = maxima[maxima > 0]
    if not len(excited):
        return torch.ones_like(maxima)
    return (maxima / (threshold * excited.median())).clamp(min=1.0)
