"""The KL that quantizing one layer really costs, measured at the model's output.

What `quantkit.curvature` predicts for every layer and scheme in one pass, measured for a few of
them: half a forward pass each, because the blocks in front of a layer do not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quantkit import model as models
from quantkit import numerics
from quantkit.errors import QuantkitError
from quantkit.paused import Spine
from quantkit.progress import Progress, silent


def measure_ablations(
    source: models.SourceModel,
    ids: Tensor,
    deltas: Mapping[tuple[str, str], Tensor],
    *,
    progress: Progress = silent,
) -> tuple[dict[tuple[str, str], float], float]:
    """KL(model ‖ model with W + ΔW), nats a token, for each ΔW alone and for all at once.

    Computed in fp32: a layer of 8 bits costs less than the rounding of a bf16 forward pass. The
    model is converted for good, which doubles its memory where it was bf16.

    Args:
        source: its model is fp32 afterwards.
        ids: token ids int64 ``[windows, T]``.
        deltas: (layer, scheme) → ΔW fp32 ``[N, K]``, each layer at most once.
        progress: one step a window and ΔW.

    Returns:
        the KL by (layer, scheme), and that of all together.

    Raises:
        QuantkitError: NaN or infinite logits.
    """
    source.model.float()
    spine = Spine(source.model)
    linears = models.linear_layers(source.model)
    alone = dict.fromkeys(deltas, 0.0)
    together = 0.0
    done, total = 0, len(ids) * (len(deltas) + 1)
    with torch.no_grad():
        for window in ids.split(1):
            states = list(_states(spine, window))
            base = _log_softmax(spine, window, _last(spine, states[-1], len(states) - 1))

            def divergence(
                names: Iterable[tuple[str, str]],
                window: Tensor = window,
                states: Sequence[Tensor] = states,
                base: Tensor = base,
            ) -> float:
                moved = {name: (linears[name], deltas[name, s]) for name, s in names}
                first = min(_block(spine, name) for name in moved)
                with _added(moved.values()):
                    out = _log_softmax(spine, window, _last(spine, states[first], first))
                return float((base.exp() * (base - out)).sum(-1).mean())

            for key in deltas:
                alone[key] += divergence([key]) / len(ids)
                done += 1
                progress(done, total, "check")
            together += divergence(deltas) / len(ids)
            done += 1
            progress(done, total, "check")
    return alone, together


def _states(spine: Spine, ids: Tensor) -> Iterator[Tensor]:
    """Hidden states in front of each block."""
    [x] = spine.embed([ids])
    for index in range(len(spine.blocks)):
        yield x
        x = spine.calls(index, [x])[0]()


def _last(spine: Spine, x: Tensor, first: int) -> Tensor:
    """Hidden states behind the last block, from those in front of block ``first``."""
    for index in range(first, len(spine.blocks)):
        x = spine.calls(index, [x])[0]()
    return x


def _log_softmax(spine: Spine, ids: Tensor, hidden: Tensor) -> Tensor:
    logits = spine.logits(ids, hidden)
    if not numerics.is_finite(logits):
        raise QuantkitError(
            "the model's logits hold NaN or infinite values", remedy="check the checkpoint"
        )
    return logits[0].log_softmax(-1)


def _block(spine: Spine, name: str) -> int:
    return int(name.removeprefix(f"{spine.prefix}.").split(".", 1)[0])


@contextmanager
def _added(moved: Iterable[tuple[nn.Linear, Tensor]]) -> Iterator[None]:
    """While active, these layers compute with W + ΔW."""
    originals = []
    try:
        for module, delta in moved:
            originals.append((module, module.weight))
            module.weight = nn.Parameter(module.weight + delta, requires_grad=False)
        yield
    finally:
        for module, weight in originals:
            module.weight = weight
