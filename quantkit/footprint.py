"""How much memory the hidden states of calibration take, before any of them exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.batches import BATCH_TOKENS
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from quantkit.plan import Plan, PlannedLayer


@dataclass(frozen=True)
class Footprint:
    """Bytes of hidden states at their peak.

    Attributes:
        held: all windows in memory, their passes paused side by side.
        spilled: all windows on disk, one batch's pass at a time.
    """

    held: int
    spilled: int


def footprint(
    layers: Sequence[PlannedLayer],
    samples: int,
    seq_len: int,
    element: int,
    hidden: int,
    cached: int = 0,
) -> Footprint:
    """Estimate both.

    Args:
        layers: what is planned.
        samples, seq_len: calibration windows.
        element: bytes of a value.
        hidden: width of what is passed between blocks.
        cached: width of a block's keys, or of its values, where they get calibrated scales.
    """
    width = max(layer.shape[1] for layer in layers)
    tokens = samples * seq_len
    batch = min(tokens, max(BATCH_TOKENS, seq_len))
    # What a pass holds that is paused in front of the widest layer: the block's input, the sum
    # after attention, its norm, and the layer's input.
    row = element * (3 * hidden + width)
    held, spilled = tokens * row, batch * row
    drift = any(layer.needs_drift for layer in layers)
    if drift:
        held, spilled = 2 * held, 2 * spilled
    elif any(layer.reconstructed for layer in layers):
        held += tokens * element * hidden  # what each block is to give
    # A static scale is known behind the last batch only: until then all of its input is held, with
    # feedback the unquantized model's beside it. Keys, values and inputs take turns.
    static = [layer.shape[1] for layer in layers if layer.scheme.needs_static_input]
    kept = max(static, default=0) * (2 if drift else 1)
    spilled += tokens * element * max(kept, cached)
    return Footprint(held, min(held, spilled))


def spills(plan: Plan, limit: int | None) -> bool:
    """Whether hidden states go to disk to stay within a limit of bytes.

    Raises:
        UsageError: they would not stay within it there, either.
    """
    if limit is None or plan.activation_bytes <= limit:
        return False
    if plan.spilled_bytes > limit:
        raise UsageError(
            f"--activation-memory {limit / 1e9:g}: one batch of hidden states takes "
            f"{plan.spilled_bytes / 1e9:.3g} GB with all others on disk",
            remedy="raise it, or give a smaller --seq-len",
        )
    return True
