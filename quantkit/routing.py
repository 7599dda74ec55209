"""How many calibration tokens each expert saw, and whether that is enough to quantize it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from quantkit import model as models
from quantkit.errors import QuantkitError


class ExpertTokens:
    """Calibration tokens by expert.

    Args:
        model: with linearized experts, or none.
        least: tokens that every expert must see.
        all_tokens: every expert reads every token while it is observed.

    Attributes:
        mode, traced_mode: what experts read (`quantkit.model.experts.MODES`) while they are
            observed, and while their layers are traced for common inputs.
    """

    def __init__(self, model: nn.Module, least: int, *, all_tokens: bool = False) -> None:
        self.least = least
        self.mode = "all" if all_tokens else "routed"
        self.traced_mode = "all" if all_tokens else "apart"
        self.counts = {name: [0] * e.count for name, e in models.find_experts(model).items()}

    def add(self, layer: str, tokens: int) -> None:
        """Note what a layer saw, if it is an expert's."""
        found = self._expert_of(layer)
        if found is not None:
            experts, number = found
            self.counts[experts][number] = max(self.counts[experts][number], tokens)

    def check(self, layers: Iterable[str]) -> None:
        """Refuse a block some of whose experts saw too few tokens.

        Args:
            layers: the names of the block's planned layers.

        Raises:
            QuantkitError: with the counts of each layer calibrated so far, expert by expert.
        """
        if self.mode == "all":
            return
        planned = {found for layer in layers if (found := self._expert_of(layer)) is not None}
        short = [(e, i) for e, i in sorted(planned) if self.counts[e][i] < self.least]
        if not short:
            return
        done = [
            name
            for name, counts in self.counts.items()
            if any(counts) or any(name == experts for experts, _ in short)
        ]
        width = max(len(name) for name in done)
        table = "\n".join(
            f"  {name:{width}}  {' '.join(str(n) for n in self.counts[name])}" for name in done
        )
        experts, number = short[0]
        raise QuantkitError(
            f"{experts}.{number}: {self.counts[experts][number]} calibration tokens reached this "
            f"expert ({len(short)} experts of this block saw fewer than {self.least}); tokens by "
            f"layer, expert 0 first:\n{table}\n",
            remedy="raise calibrate.samples, lower calibrate.min_expert_tokens, or set "
            "`all_experts: true` there",
        )

    def _expert_of(self, layer: str) -> tuple[str, int] | None:
        parts = layer.rsplit(".", 2)
        if len(parts) == 3 and parts[0] in self.counts:
            return parts[0], int(parts[1])
        return None
