"""How much memory a run takes at its peak, told before it calibrates.

Resident memory, which is what the system counts: what the process holds, and the pages of files
that it has mapped and not let go. Phases follow one another, so the peak is the largest of them.
What was there before calibration, libraries and data included, is measured; the rest is counted
from the plan. Terms follow the code that they name: a term without a name there is wrong.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit import memory
from quantkit import model as models
from quantkit.algorithms import SOLVERS
from quantkit.batches import BATCH_TOKENS, PROBE_WINDOWS
from quantkit.checkpoint.shards import SHARD_BYTES
from quantkit.importance import pass_bytes
from quantkit.plan import Plan, PlannedLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Peak:
    """Resident bytes by phase.

    Attributes:
        phases: name → bytes, in order; ``prepare`` is measured.
    """

    phases: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """Of the largest phase."""
        return max(self.phases.values())

    @property
    def phase(self) -> str:
        """The largest one."""
        return max(self.phases, key=self.phases.__getitem__)

    def to_json(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "phases": dict(self.phases)}


def peak_memory(plan: Plan, model: PreTrainedModel, *, data: bool, spilled: bool) -> Peak:
    """What a run on the CPU takes from here on, to about a tenth.

    Call it when everything is prepared: what the process holds then is the floor of all phases.

    Args:
        plan: of the run.
        model: loaded, none of its weights read.
        data: the run has calibration text.
        spilled: hidden states lie on disk between blocks.
    """
    memory.trim_heap()
    base = resident()
    element = torch.finfo(model.dtype).bits // 8
    vocabulary, hidden = models.embedding_shape(model)
    states = plan.spilled_bytes if spilled else plan.activation_bytes
    if not plan.needs_data:  # what runs then measures errors, or is a line of random tokens
        states = states * min(PROBE_WINDOWS, plan.samples) // plan.samples if data else 0
    embedding = element * vocabulary * hidden if data else 0  # text reads nearly all of its pages
    fixed = base + (plan.source_bytes if plan.needs_fisher else embedding)
    phases = {"prepare": peak_resident()}
    if plan.needs_fisher:
        logits = 4 * element * plan.seq_len * vocabulary
        phases["fisher"] = fixed + pass_bytes(plan) + logits + _graph_bytes(plan, element, hidden)
        # Every token's weight in every layer, and the squares on disk that it is made of.
        asking = sum(layer.needs_gradients for layer in plan.layers)
        fixed += 2 * 4 * asking * plan.samples * plan.seq_len
    inside = max((_solver_bytes(group, element) for group in _groups(plan)), default=0)
    weights = plan.block_bytes * (2 if plan.needs_reference else 1)
    passing = _pass_bytes(plan, element, hidden) if data else 0
    phases["blocks"] = fixed + weights + states + inside + passing
    head = list(plan.in_block(None).values())
    if head:
        phases["head"] = fixed + element * head[0].weights + _solver_bytes(head, element)
    largest = max(layer.weights for layer in plan.layers)
    table = element * vocabulary * hidden
    # A file, the pages of the embedding that goes into it, and a layer's codes as `packing` widens
    # them.
    phases["export"] = base + min(plan.size_bytes, SHARD_BYTES) + table + 8 * largest
    # Packed for the kernels; the file's pages, mapped once by the kernels' loader and once by the
    # reference's; a kept head packed beside them, and twice more while it is; one layer read again.
    phases["reload"] = base + 3 * plan.size_bytes + (0 if head else 3 * table) + 8 * largest
    return Peak(phases)


def _groups(plan: Plan) -> Iterator[list[PlannedLayer]]:
    """Layers of a block that may be solved together: of one parent and width."""
    found: dict[tuple[str, int], list[PlannedLayer]] = {}
    for layer in plan.layers:
        if layer.block is not None:
            parent = layer.name.rpartition(".")[0]
            found.setdefault((parent, layer.shape[1]), []).append(layer)
    yield from found.values()


def _solver_bytes(layers: list[PlannedLayer], element: int) -> int:
    """What `quantkit.quantize.quantize_group` holds at once, the collector's sums included."""
    columns = layers[0].shape[1]
    weights = sum(layer.weights for layer in layers)
    stacked = element * weights if len(layers) > 1 else 0
    # `measured`: the original and the restored weight in fp32, and their difference.
    compared = 12 * max(layer.weights for layer in layers)
    if any(layer.scheme.needs_static_input for layer in layers):
        # `input_range`: the weights in fp32, one by one and stacked, and their Gram matrix.
        compared = max(compared, 8 * weights + 4 * columns**2)
    if not any(SOLVERS[layer.solver].needs_hessian for layer in layers):
        return stacked + compared
    square = 4 * columns**2
    if not any(layer.solver == "gptq" for layer in layers):
        return stacked + 3 * square + compared  # the sum in fp64, and H
    # Beside those, in `gptq.inverse_factor`, H in order, damped and reversed, its factor, the
    # identity, the inverse and that reversed.
    factored = 10 * square
    # Behind it H in order, damped and its factor; the weight, ordered, rounded and in order again,
    # and what `refine` changes, all in fp32.
    rounded = 6 * square + 7 * 4 * weights
    return stacked + max(factored, rounded)


def _pass_bytes(plan: Plan, element: int, hidden: int) -> int:
    """A batch's temporaries inside a block: two inputs of the widest layer beside the one that is
    kept, and a norm in fp32."""
    tokens = min(plan.samples * plan.seq_len, max(BATCH_TOKENS, plan.seq_len))
    width = max(layer.shape[1] for layer in plan.layers)
    quantized = any(layer.scheme.input is not None for layer in plan.layers)
    return tokens * ((5 if quantized else 2) * element * width + 3 * 4 * hidden)


def _graph_bytes(plan: Plan, element: int, hidden: int) -> int:
    """What autograd keeps of one window: inputs and outputs of every layer, and norms in fp32."""
    kept = sum(element * sum(layer.shape) for layer in plan.layers)
    return plan.seq_len * (kept + plan.blocks * 4 * 4 * hidden)


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return peak_resident()
    return int(pages.read_text().split()[1]) * resource.getpagesize()


def peak_resident() -> int:
    """The most bytes of this process that were ever in memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
