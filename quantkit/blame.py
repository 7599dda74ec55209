"""Which layers a quantized model's damage comes from: put back one at a time, and measured.

Each block, then each layer of the worst blocks, is replaced by the original's, and the KL from the
original measured again on the same text. Nothing is estimated: what a layer is blamed for is what
restoring it alone recovers, and the chosen ones are measured together, because recoveries
overlap. Blocks in front of the one that is restored are not run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantkit import model as models
from quantkit import numerics
from quantkit.errors import QuantkitError, UsageError
from quantkit.layers import QuantLinear
from quantkit.paused import Spine
from quantkit.progress import Progress, silent

if TYPE_CHECKING:
    from quantkit.models.runtime import Runtime

#: Sequences that go through a block together.
BATCH = 8

#: Positions whose logits are in memory at once, twice over in fp32: 8 · vocabulary bytes each.
POSITIONS = 128

#: Blocks whose layers are measured one by one.
BLOCKS = 3


@dataclass(frozen=True)
class Restored:
    """What putting some of the original's layers back does.

    Attributes:
        name: of a layer, or of a block.
        layers: quantized layers that are put back.
        kl: KL(original ‖ model with them put back), nats a token.
        extra_bytes: by how much the checkpoint would grow.
    """

    name: str
    layers: tuple[str, ...]
    kl: float
    extra_bytes: int


@dataclass(frozen=True)
class Blame:
    """Where the damage comes from.

    Attributes:
        kl: KL(original ‖ quantized), nats a token.
        tokens: that it is a mean over.
        blocks: each block put back alone, in the model's order.
        layers: each layer of the worst blocks put back alone, the best first; empty where layers
            cannot be put back one at a time.
        chosen: the best one, the best two together, …
        whole_blocks: why only whole blocks can be put back, or None.
    """

    kl: float
    tokens: int
    blocks: tuple[Restored, ...]
    layers: tuple[Restored, ...]
    chosen: tuple[Restored, ...]
    whole_blocks: str | None


def find_blame(
    candidate: Runtime,
    original: Runtime,
    sequences: Sequence[Sequence[int]],
    *,
    count: int = 5,
    progress: Progress = silent,
) -> Blame:
    """Put the original's layers back one at a time, and measure what each recovers.

    Args:
        candidate: the quantized model in transformers' modules (no native decoder); as it was
            afterwards.
        original: the model it was made from, likewise.
        sequences: token ids that the KL is measured on, at every position of each.
        count: how many layers (or blocks) to choose.
        progress: one step a restoration.

    Raises:
        UsageError: no text, or an original whose blocks cannot stand in for the candidate's.
        QuantkitError: NaN or infinite logits.
    """
    if not sequences:
        raise UsageError("no text to measure on", remedy="give --text FILE")
    reason = _not_exchangeable(candidate.model, original.model)
    if reason is None and candidate.manifest.get("rotation"):
        reason = "the layers of a block are rotated together"
    trial = _Trial(candidate, original, sequences)
    spine = trial.spine
    blocks = [f"{spine.prefix}.{i}" for i in range(len(spine.blocks))]
    total = len(blocks) + count + BLOCKS * len(trial.layers_of(blocks[0])) * (reason is None)
    done = 0

    def measured(name: str, names: Sequence[str]) -> Restored:
        nonlocal done
        found = trial.restore(names)
        done += 1
        progress(min(done, total), total, "restore")
        return Restored(name, *found)

    alone = tuple(measured(block, [block]) for block in blocks)
    worst = sorted(alone, key=lambda r: r.kl)
    layers: tuple[Restored, ...] = ()
    if reason is None:
        names = [name for block in worst[:BLOCKS] for name in trial.layers_of(block.name)]
        layers = tuple(sorted((measured(n, [n]) for n in names), key=lambda r: r.kl))
    ranked = [r.name for r in (layers or worst)][:count]
    chosen = tuple(
        measured(ranked[i], ranked[: i + 1]) if i else (layers or worst)[0]
        for i in range(len(ranked))
    )
    return Blame(trial.kl, trial.tokens, alone, layers, chosen, reason)


class _Trial:
    """A quantized model with its hidden states in front of every block, and the original's end."""

    def __init__(
        self, candidate: Runtime, original: Runtime, sequences: Sequence[Sequence[int]]
    ) -> None:
        self.model, self.original = candidate.model, original.model
        source = Spine(self.original)
        self.spine = Spine(self.model)
        # Padding on the right: no position sees what is behind it.
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
        real = torch.zeros(len(sequences), longest, dtype=torch.bool)
        for i, sequence in enumerate(sequences):
            ids[i, : len(sequence)] = torch.tensor(list(sequence))
            real[i, : len(sequence)] = True
        self.batches, self.real = list(ids.split(BATCH)), list(real.split(BATCH))
        self.tokens = int(real.sum())
        with torch.no_grad():
            hidden = source.embed(self.batches)
            for index in range(len(source.blocks)):
                hidden = [call() for call in source.calls(index, hidden)]
            self.ends = list(source.head_inputs(self.batches, hidden))
            self.states = [self.spine.embed(self.batches)]
            for index in range(len(self.spine.blocks)):
                self.states.append([call() for call in self.spine.calls(index, self.states[-1])])
            self.kl = self._divergence(self.states[-1])

    def layers_of(self, block: str) -> list[str]:
        """Quantized layers of a block."""
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, QuantLinear) and name.startswith(f"{block}.")
        ]

    def restore(self, names: Sequence[str]) -> tuple[tuple[str, ...], float, int]:
        """(layers put back, KL with them, bytes that takes) for names of layers or blocks."""
        layers = [
            name
            for wanted in names
            for name in ([wanted] if self._is_layer(wanted) else self.layers_of(wanted))
        ]
        extra = sum(self._extra_bytes(name) for name in layers)
        first = min(int(n.removeprefix(f"{self.spine.prefix}.").split(".")[0]) for n in names)
        with torch.no_grad(), self._replaced(names):
            hidden = self.states[first]
            for index in range(first, len(self.spine.blocks)):
                hidden = [call() for call in self.spine.calls(index, hidden)]
            return tuple(layers), self._divergence(hidden), extra

    def _is_layer(self, name: str) -> bool:
        return isinstance(self.model.get_submodule(name), QuantLinear)

    def _extra_bytes(self, name: str) -> int:
        module = self.model.get_submodule(name)
        assert isinstance(module, QuantLinear)
        shape = (module.out_features, module.in_features)
        bits = torch.finfo(self.original.dtype).bits
        stored = module.spec.stored_bits(shape, torch.finfo(self.model.dtype).bits)
        return round((shape[0] * shape[1] * bits - stored) / 8)

    @contextmanager
    def _replaced(self, names: Sequence[str]) -> Iterator[None]:
        saved: list[tuple[str, nn.Module]] = []
        try:
            for name in names:
                saved.append((name, self.model.get_submodule(name)))
                models.set_submodule(self.model, name, self.original.get_submodule(name))
            yield
        finally:
            for name, module in saved:
                models.set_submodule(self.model, name, module)

    def _divergence(self, hidden: Sequence[Tensor]) -> float:
        """Mean KL over real positions of hidden states behind the last block."""
        head, base_head = self.model.get_output_embeddings(), self.original.get_output_embeddings()
        total = 0.0
        ends = self.spine.head_inputs(self.batches, hidden)
        for end, base, real in zip(ends, self.ends, self.real, strict=True):
            rows, base_rows = end[real], base[real]
            for start in range(0, len(rows), POSITIONS):
                span = slice(start, start + POSITIONS)
                log_q = head(rows[span]).float().log_softmax(-1)
                log_p = base_head(base_rows[span]).float().log_softmax(-1)
                if not numerics.is_finite(log_q) or not numerics.is_finite(log_p):
                    raise QuantkitError(
                        "logits hold NaN or infinite values", remedy="check the checkpoint"
                    )
                total += float((log_p.exp() * (log_p - log_q)).sum().double())
        return total / self.tokens


def _not_exchangeable(candidate: nn.Module, original: nn.Module) -> str | None:
    """Why only whole blocks can be put back, None if single layers can.

    A scaling, a rotation or tuned norms move part of a layer into its neighbours: the original's
    layer then does not fit between them.

    Raises:
        UsageError: not even blocks fit, because the stream between them is another.
    """
    prefix, _ = models.find_blocks(candidate)
    theirs = dict(original.named_parameters())
    inside = outside = None
    for name, parameter in candidate.named_parameters():
        other = theirs.get(name)
        if other is None or (other.shape == parameter.shape and torch.equal(other, parameter)):
            continue
        if other.shape != parameter.shape:
            raise UsageError(
                f"{name}: {list(parameter.shape)} in the checkpoint, {list(other.shape)} in the "
                "original",
                remedy="give --reference the model that the checkpoint was made from",
            )
        if name.startswith(f"{prefix}."):
            inside = inside or name
        else:
            outside = outside or name
    if outside is not None:
        raise UsageError(
            f"{outside}: differs from the original's, so that the original's blocks do not fit",
            remedy="blame is found for checkpoints that are not rotated",
        )
    if inside is None:
        return None
    return f"{inside} was changed along with the layers beside it"
