"""How much memory a run takes at its peak, told before it calibrates.

Resident memory, which is what the system counts: what the process holds, and the pages of files
that it has mapped and not let go. Phases follow one another, so the peak is the largest of them.
What was there before calibration, libraries and data included, is measured; the rest is counted
from the plan. Terms follow the code that they name: a term without a name there is wrong. What one
pass leaves for the way back (Fisher weights, trained blocks, distillation) is estimated from the
shapes of layers. Keys and values of the text and prompts that are scored are not counted.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit import memory
from quantkit import model as models
from quantkit.algorithms import RECONSTRUCTORS, RESCALERS, SOLVERS
from quantkit.algorithms.clip import columns_of_a_scale
from quantkit.algorithms.distill import PREDICTED_TOKENS
from quantkit.algorithms.refine import NORMAL_FLOATS
from quantkit.batches import BATCH_TOKENS, PROBE_WINDOWS
from quantkit.checkpoint.shards import SHARD_BYTES
from quantkit.fisher import output_parts
from quantkit.importance import pass_bytes
from quantkit.plan import Plan, PlannedLayer
from quantkit.rescale import COSTED_TOKENS, SAMPLE_TOKENS
from quantkit.steps import weighs_costs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What the first pass brings in: pages of torch's libraries (16 MB measured), and modules of Python
#: that nothing imported before.
FIRST_USE = 24 << 20

#: Of scoring: four fp32 arrays of `quantkit.evals.forward.CHUNK_ELEMENTS` at once.
LOGITS_BYTES = 4 * 4 << 23


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


def peak_memory(
    plan: Plan, model: PreTrainedModel, *, data: bool, spilled: bool, gated: bool = False
) -> Peak:
    """What a run on the CPU takes from here on, to about a tenth.

    Call it when everything is prepared: what the process holds then is the floor of all phases.

    Args:
        plan: of the run.
        model: loaded, none of its weights read.
        data: the run has calibration text.
        spilled: hidden states lie on disk between blocks.
        gated: the checkpoint is scored beside the original.
    """
    memory.trim_heap()
    count = _Count(
        plan,
        resident() + FIRST_USE,
        torch.finfo(model.dtype).bits // 8,
        *models.embedding_shape(model),
        encoders=models.family_of(model.config).stacks - 1,
        data=data,
        spilled=spilled,
    )
    phases: dict[str, Callable[[], int] | None] = {
        "prepare": peak_resident,
        "fisher": count.fisher if plan.needs_fisher else None,
        "rescale": count.rescale if plan.folds else None,
        "blocks": count.blocks,
        **{
            name: count.reconstruct if plan.reconstructed_by(name) is not None else None
            for name in RECONSTRUCTORS
        },
        "head": count.head if count.heads else None,
        "distill": count.distill if plan.distill is not None else None,
        "export": count.export,
        "reload": count.reload,
        "evals": count.evals if gated else None,
    }
    return Peak({name: phase() for name, phase in phases.items() if phase is not None})


@dataclass(frozen=True)
class _Count:
    """The bytes of each phase, from what all of them stand on.

    Attributes:
        plan: of the run.
        base: what the process held before, and `FIRST_USE`.
        element: bytes of a value in the model's dtype.
        vocabulary, hidden: shape of the embedding.
        encoders: lists of blocks whose output stays beside the hidden states.
        data, spilled: see `peak_memory`.
    """

    plan: Plan
    base: int
    element: int
    vocabulary: int
    hidden: int
    encoders: int
    data: bool
    spilled: bool

    @property
    def heads(self) -> list[PlannedLayer]:
        """The head, if it is quantized."""
        return list(self.plan.in_block(None).values())

    @property
    def table(self) -> int:
        """The embedding."""
        return self.element * self.vocabulary * self.hidden

    @property
    def copied(self) -> int:
        """A head that is untied is a copy of the embedding."""
        return self.table if self.plan.unties_head else 0

    @property
    def largest(self) -> int:
        """Weights of the largest layer."""
        return max(layer.weights for layer in self.plan.layers)

    @property
    def line(self) -> int:
        """One hidden state of every calibration token."""
        return self.plan.samples * self.plan.seq_len * self.element * self.hidden

    @property
    def text(self) -> int:
        """Pages of the embedding: text reads nearly all of them, copying them does, too."""
        return self.table if self.data or self.copied else 0

    @property
    def held(self) -> int:
        """From the first block to the end of calibration: ends of the model, weights of tokens,
        and for `quantkit.distill` the whole model and what the original's head saw."""
        asking = sum(layer.needs_gradients for layer in self.plan.layers)
        # In memory, and the squares on disk that they are made of.
        weights = 2 * 4 * asking * self.plan.samples * self.plan.seq_len
        model = self.text
        if self.plan.distill is not None:
            model = self.plan.source_bytes + self.line
        return self.base + self.copied + model + weights

    @property
    def block(self) -> int:
        """Weights of a block, and the unquantized ones beside them. A pass through the whole model
        has read all blocks; those of one that is not trained leave one by one."""
        beside = self.plan.block_bytes if self.plan.needs_reference else 0
        if self.plan.distill is not None:
            return beside
        if self.plan.needs_fisher:
            return beside + self.plan.source_bytes - self.text
        return beside + self.plan.block_bytes

    @property
    def passed_on(self) -> int:
        """Hidden states between two blocks: the quantized model's, the unquantized one's where it
        runs, too, and an encoder's."""
        streams = self.encoders + (2 if self.plan.needs_reference else 1)
        return 0 if self.spilled else self._of_windows(streams * self.line)

    def _of_windows(self, every: int) -> int:
        """Of all windows, those that run: without data a line of random tokens, and some windows
        where they only measure errors."""
        if self.plan.needs_data:
            return every
        windows = min(PROBE_WINDOWS, self.plan.samples) if self.data else 0
        return every * windows // self.plan.samples

    def _passing(self) -> int:
        return _pass_bytes(self.plan, self.element, self.hidden) if self.data else 0

    def fisher(self) -> int:
        """The whole model; sums of its gradients; a window's logits and graph."""
        plan = self.plan
        logits = 4 * self.element * plan.seq_len * self.vocabulary
        graph = _graph_bytes(plan.layers, plan.seq_len, self.element, self.hidden)
        return self.base + self.copied + plan.source_bytes + pass_bytes(plan) + logits + graph

    def rescale(self) -> int:
        """A pass through a block, its inputs' statistics, and one scaling's search."""
        passing = self._passing() + _batch_bytes(self.plan, self.element, self.hidden)
        seen = max(
            _rescale_bytes(self.plan, i, self.element, passing) for i in range(self.plan.blocks)
        )
        return self.held + self.block + self.passed_on + seen

    def blocks(self) -> int:
        """A block's passes, all paused, and beside the sums of one group of its layers the solver
        or, before it, the batch at work; and codes, until the block is on disk."""
        states = self.plan.spilled_bytes if self.spilled else self.plan.activation_bytes
        codes = max(sum(x.weights for x in layers) for layers in self._by_block())
        passing = self._passing()
        groups = _groups(self.plan.layers)
        inside = max((_group_bytes(x, self.element, passing) for x in groups), default=0)
        return self.held + self.block + self._of_windows(states) + codes + inside

    def _by_block(self) -> Iterator[list[PlannedLayer]]:
        for index in range(self.plan.blocks):
            yield list(self.plan.in_block(index).values())

    def reconstruct(self) -> int:
        """Inputs and targets of all windows; spilled ones are read in random order, and stay."""
        trained = _reconstruct_bytes(self.plan, self.element, self.hidden)
        return self.held + self.block + 2 * self.line + trained

    def head(self) -> int:
        """Hidden states of all windows, the head's weight if it was not read yet, its solver."""
        [head] = self.heads
        read = self.copied or self.plan.distill is not None
        weight = 0 if read else self.element * head.weights
        solved = _group_bytes([head], self.element, passing=0)
        return self.held + self.passed_on + weight + solved

    def distill(self) -> int:
        """Training, beside the original's head if another one took its place."""
        heads = sum(self.element * head.weights for head in self.heads)
        trained = _distill_bytes(self.plan, self.element, self.hidden, self.vocabulary)
        return self.held + self.passed_on + heads + trained

    def export(self) -> int:
        """A file; the ends of the model, or all of it; and codes as `quantkit.packing` widens
        them. Those that training has read leave as files fill."""
        model, codes = self.table, 0
        if self.plan.distill is not None:
            model, codes = self.plan.source_bytes, sum(x.weights for x in self.plan.layers)
        elif not self.copied:
            model += sum(self.element * head.weights for head in self.heads)
        filled = max(min(self.plan.size_bytes, SHARD_BYTES), codes)
        return self.base + self.copied + model + filled + 8 * self.largest

    def reload(self) -> int:
        """Layers as the kernels take them, and pages of those too small to be let go, mapped once
        by the kernels' loader and once by the reference's. A kept head as it was read and packed,
        and once more while it is packed; behind that one layer read again."""
        packed = sum(_packed_bytes(layer) for layer in self.plan.layers)
        small = [_codes_bytes(layer) for layer in self.plan.layers]
        pages = 2 * sum(size for size in small if size < memory.FORGOTTEN)
        again = 8 * self.largest
        kept = again if self.heads else max(3 * self.table, 2 * self.table + again)
        return self.base + packed + pages + kept

    def evals(self) -> int:
        """Both models in the native decoder, packed and as pages of their files, which stay as long
        as the model that is mapped from them; and logits of a few tokens."""
        candidate = 2 * self.plan.size_bytes + (0 if self.heads else self.table)
        return self.base + candidate + 2 * self.plan.source_bytes + LOGITS_BYTES


def _codes_bytes(layer: PlannedLayer) -> int:
    """Of a layer's codes on disk."""
    return layer.weights * layer.scheme.weight.bits // 8


def _packed_bytes(layer: PlannedLayer) -> int:
    """A layer in the kernels' layout: codes of 4 or 8 bits; scales, in fp32 and as the decoder
    takes them, and zero points in fp32."""
    weight = layer.scheme.weight
    scales = layer.weights // columns_of_a_scale(layer.shape, weight)
    return layer.weights // (2 if weight.bits <= 4 else 1) + scales * (
        8 if weight.symmetric else 12
    )


def _groups(layers: Sequence[PlannedLayer]) -> Iterator[list[PlannedLayer]]:
    """Layers of a block that may be solved together: of one parent and width."""
    found: dict[tuple[str, int], list[PlannedLayer]] = {}
    for layer in layers:
        if layer.block is not None:
            parent = layer.name.rpartition(".")[0]
            found.setdefault((parent, layer.shape[1]), []).append(layer)
    yield from found.values()


def _group_bytes(layers: list[PlannedLayer], element: int, passing: int) -> int:
    """What `quantkit.collector` sums of one input, and beside it the larger of what
    `quantkit.quantize.quantize_group` takes and what a pass does.

    Layers of one key share sums and are solved together; one with Fisher weights has its own.
    """
    alike: dict[tuple[object, str | None], list[PlannedLayer]] = {}
    for layer in layers:
        alike.setdefault((layer.scheme.input, layer.name if layer.fisher else None), []).append(
            layer
        )
    sums = 0  # in fp64
    for group in alike.values():
        hessian = any(SOLVERS[layer.solver].needs_hessian for layer in group)
        drift = any(layer.needs_drift for layer in group)
        sums += (hessian + drift) * 8 * layers[0].shape[1] ** 2
    solved = max(_solver_bytes(group, element) for group in alike.values())
    return sums + max(passing, solved)


def _solver_bytes(layers: list[PlannedLayer], element: int) -> int:
    """What `quantkit.quantize.quantize_group` holds at once, beside the collector's sums."""
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
    # H and, with feedback, the drift: the sums' means in fp32.
    stacked += 2 * square if any(layer.needs_drift for layer in layers) else square
    if not any(layer.solver == "gptq" for layer in layers):
        return stacked + compared
    # In `gptq.inverse_factor`, H in order, damped, its factor, the identity, the inverse and that
    # reversed.
    factored = 6 * square
    # Behind it H in order, its factor, and what the weight takes.
    rounded = 2 * square + max(_rounding_bytes(layer, weights) for layer in layers)
    return stacked + max(factored, rounded, compared)


def _rounding_bytes(layer: PlannedLayer, weights: int) -> int:
    """What `gptq.solve` holds of this layer and those stacked with it, behind the factor of H.

    In fp32 the weight, the same in order, and rounded. `refine` damps H once more, keeps the
    rounded weight in order again, and `_fit_rows` the weight's product with H, and an error, its
    product with H and the square of that. Beside those are the normal equations of every row.
    """
    if not layer.options.get("refine"):
        return 3 * 4 * weights
    columns = layer.shape[1]
    groups = -(-columns // columns_of_a_scale(layer.shape, layer.scheme.weight))
    normal = 4 * min(weights // columns * groups**2, NORMAL_FLOATS)
    # Codes less their zero points are a copy.
    copies = 7 if layer.scheme.weight.symmetric else 8
    outputs = [len(part) for part in output_parts(layer.shape[0])] if layer.coupled else []
    # As they are on disk, and damped in fp32.
    coupled = (2 + 4) * sum(width**2 for width in outputs)
    return 4 * columns**2 + copies * 4 * weights + normal + coupled


def _batch_bytes(plan: Plan, element: int, hidden: int) -> int:
    """What a batch keeps on its way through a block, as `quantkit.footprint` counts it: in paused
    passes it is part of all windows'."""
    tokens = min(plan.samples * plan.seq_len, max(BATCH_TOKENS, plan.seq_len))
    return tokens * element * (3 * hidden + max(layer.shape[1] for layer in plan.layers))


def _pass_bytes(plan: Plan, element: int, hidden: int) -> int:
    """A batch's temporaries inside a block: two inputs of the widest layer beside the one that is
    kept, and a norm in fp32."""
    tokens = min(plan.samples * plan.seq_len, max(BATCH_TOKENS, plan.seq_len))
    width = max(layer.shape[1] for layer in plan.layers)
    quantized = any(layer.scheme.input is not None for layer in plan.layers)
    return tokens * ((5 if quantized else 2) * element * width + 3 * 4 * hidden)


def _graph_bytes(layers: Sequence[PlannedLayer], tokens: int, element: int, hidden: int) -> int:
    """What autograd keeps of a pass: every layer's output, the input of each group, and that of
    two norms in fp32; and gradients on the way back through an MLP, four of its width.

    Between what is kept a norm's temporaries in fp32 are freed, and their room stays resident. That
    it is four of them was measured (six blocks of SmolLM2-135M) and does not follow from the code;
    an aligned buffer not fitting into a freed one of its size on glibc's heap would explain it.
    """
    outputs = sum(layer.shape[0] for layer in layers)
    inputs = [group[0].shape[1] for group in _groups(layers)]
    blocks = len({layer.block for layer in layers if layer.block is not None})
    back = 4 * max(inputs, default=0)
    return tokens * (element * (outputs + sum(inputs) + back) + blocks * (2 + 4) * 4 * hidden)


def _rescale_bytes(plan: Plan, block: int, element: int, passing: int) -> int:
    """What `quantkit.rescale.choose_scales` holds of a block: the sums of all inputs in fp64 and
    samples of their tokens; and what a pass takes or, behind all of them, one search does: H twice
    in fp32, its consumers' scaled weights, and of the largest six copies in fp32 on the way to its
    error."""
    shapes = {layer.name: layer for layer in plan.layers}
    seen = most = 0
    for fold in plan.folds_in(block):
        consumers = [shapes[name] for name in fold.consumers if name in shapes]
        columns = consumers[0].shape[1]
        needed = any(RESCALERS[step.name].needs_hessian for step in fold.steps)
        sampled = COSTED_TOKENS if weighs_costs(fold.steps) else SAMPLE_TOKENS
        seen += min(sampled, plan.samples * plan.seq_len) * element * columns
        seen += 8 * columns**2 if needed else 0
        scaled = element * sum(x.weights for x in consumers) + 6 * 4 * max(
            x.weights for x in consumers
        )
        most = max(most, scaled + (2 * 4 * columns**2 if needed else 0))
    return seen + max(passing, most)


def _reconstruct_bytes(plan: Plan, element: int, hidden: int) -> int:
    """What `quantkit.reconstruct` holds of the block that takes most, beside its weights."""
    assert plan.reconstruction is not None
    options = plan.reconstruction.options
    together = min(options["windows"], plan.samples) * plan.seq_len
    # Signround: weights and offsets in fp32. Codes that move: they, their gradients and Adam's.
    numbers = 8 if plan.reconstructed_by("signround") else 16 if options["weight_lr"] else 0
    most = 0
    for layers in (list(plan.in_block(index).values()) for index in range(plan.blocks)):
        trained = [layer.weights for layer in layers if layer.reconstructed]
        # Beside them weights as they are multiplied with, and their gradients; the codes of the
        # start, the best step and this one. A step's descent of one layer: seven times fp32, and
        # as much again left free where that lies on the heap, as in `_distill_bytes`.
        largest = 4 * max(trained, default=0)
        descent = (7 if largest >= memory.MAPPED_AT_LAST else 14) * largest
        training = (numbers + 2 * element + 3) * sum(trained) + descent
        # A step's windows and targets, and outputs and errors of them in fp32.
        windows = together * hidden * (2 * element + 4 * 4)
        most = max(most, training + windows + _graph_bytes(layers, together, element, hidden))
    return most


def _distill_bytes(plan: Plan, element: int, hidden: int, vocabulary: int) -> int:
    """What `quantkit.distill` holds beside the model and the targets."""
    trained = [layer for layer in plan.layers if layer.distilled]
    largest = max(layer.weights for layer in trained)
    # A scale, its change, both gradients and Adam's moments, in fp32; codes as they are mapped.
    scales = sum(math.prod(x.scheme.weight.scale_shape(x.shape)) for x in trained)
    numbers = 6 * 4 * scales + sum(layer.weights for layer in plan.layers)
    # Codes that move: they, Adam's moments and gradients in fp32, weights' own gradients, codes
    # as they are stored, and the originals that they begin at, mapped from the model's files
    # unless something was folded into them.
    if plan.latent:
        folded = element if plan.folds or plan.rotation is not None else 0
        numbers += (16 + element + 1 + folded) * sum(layer.weights for layer in trained)
    # `ScaledLinear.backward` of one layer: its weight's gradient, the levels, and their product.
    # Where codes move, a step of one layer in fp32.
    backward = (7 * 4 if plan.latent else 3 * element + 2) * largest
    # `divergence`: both predictions, and four more of their size on the way to a gradient.
    buffer = 4 * min(PREDICTED_TOKENS, plan.seq_len) * vocabulary
    # Smaller ones lie on the heap and leave as much again free: measured, as in `_graph_bytes`.
    predicted = (6 if buffer >= memory.MAPPED_AT_LAST else 12) * buffer
    graph = _graph_bytes(plan.layers, plan.seq_len, element, hidden)
    return numbers + graph + max(backward, predicted)


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
