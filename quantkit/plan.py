"""Recipe × model → Plan: what will be done to every layer, checked before any work."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from quantkit import model as models
from quantkit.algorithms import RECONSTRUCTORS, ROTATE, SOLVERS
from quantkit.errors import UsageError
from quantkit.folding import Fold, find_folds
from quantkit.footprint import footprint
from quantkit.kv_cache import SIDES, cache_width, decoder_attentions
from quantkit.observers import Candidates
from quantkit.recipe import Recipe, Step
from quantkit.rotation import PlannedRotation, plan_rotation
from quantkit.schemes import Granularity, QuantSpec, Scheme
from quantkit.steps import (
    check_codes,
    check_reconstructible,
    check_trainable,
    layer_steps,
    one_trainer,
    weighs_costs,
)
from quantkit.support import check_family

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: What recipes call the output head.
HEAD = "lm_head"


@dataclass(frozen=True)
class PlannedLayer:
    """One linear layer and what becomes of it.

    Attributes:
        name: dotted module name.
        block: index of its decoder block; None for the head.
        shape: ``(out_features, in_features)``.
        scheme: how it will be stored and run.
        solver: name of the algorithm that rounds it.
        options: the solver's options, defaults filled in.
        rescalers: what scales its input before it is solved, in order; options filled in.
        reconstructor: what trains it once its block's layers are solved; None for nothing.
        distilled: it is trained once every layer is solved.
        rotated: whether the model's rotation turns its weight.
        hadamard: order of the Hadamard matrix that multiplies its input at inference, 0 for none.
    """

    name: str
    block: int | None
    shape: tuple[int, int]
    scheme: Scheme
    solver: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rescalers: tuple[Step, ...] = ()
    reconstructor: str | None = None
    distilled: bool = False
    rotated: bool = False
    hadamard: int = 0

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def needs_drift(self) -> bool:
        """Whether its solver compares its inputs with the unquantized model's."""
        return bool(self.options.get("feedback"))

    @property
    def fisher(self) -> float:
        """Exponent of its tokens' Fisher weights; 0 for a layer to which all tokens are alike."""
        return float(self.options.get("fisher", 0.0))

    @property
    def reconstructed(self) -> bool:
        """Whether it is trained once its block's layers are solved."""
        return self.reconstructor is not None

    @property
    def needs_gradients(self) -> bool:
        """Whether its solver or one of its rescalers asks what errors of its output cost."""
        return bool(self.fisher) or weighs_costs(self.rescalers)

    @property
    def coupled(self) -> bool:
        """Whether its solver weighs errors of its outputs against each other."""
        return self.options.get("outputs") == "coupled"

    @property
    def steps(self) -> str:
        """Its algorithms in order, for people: ``smoothquant → gptq``."""
        first = [ROTATE] if self.rotated else []
        last = [self.reconstructor] if self.reconstructor else []
        last += ["distill"] if self.distilled else []
        return " → ".join([*first, *(step.name for step in self.rescalers), self.solver, *last])


@dataclass(frozen=True)
class PlannedFold(Fold):
    """Where a scaling folds, and the rescalers that choose it, in order."""

    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        layers: every layer that will be quantized, in the model's order.
        kept: linear layers that stay as they are.
        blocks: number of decoder blocks.
        source_bytes: the original's weights on disk.
        size_bytes: the export's tensors, by theory.
        activation_bytes: of the calibration tokens' hidden states, at their peak.
        spilled_bytes: the same with those of all but one batch on disk.
        block_bytes: one block's weights.
        samples, seq_len: calibration tokens.
        unties_head: the head gets a tensor of its own.
        rotation: what is rotated before anything else, or None.
        folds: where rescalers scale, in order.
        unscaled: label → reason, for whatever the recipe would have scaled and cannot.
        reconstruction: how the layers that ask for it are trained, block by block.
        distill: how the layers that ask for it are trained once all are solved.
        kv: how keys and values are quantized, or None.
        caches: the attention modules whose keys and values are, in order.
    """

    layers: tuple[PlannedLayer, ...]
    kept: tuple[str, ...]
    blocks: int
    source_bytes: int
    size_bytes: int
    activation_bytes: int
    spilled_bytes: int
    block_bytes: int
    samples: int
    seq_len: int
    unties_head: bool
    rotation: PlannedRotation | None = None
    folds: tuple[PlannedFold, ...] = ()
    unscaled: Mapping[str, str] = field(default_factory=dict)
    reconstruction: Step | None = None
    distill: Step | None = None
    kv: QuantSpec | None = None
    caches: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the quantized layers, scales included, over their weights."""
        bits = sum(layer_bits(layer) for layer in self.layers)
        return bits / sum(layer.weights for layer in self.layers)

    @property
    def needs_data(self) -> bool:
        return bool(self.folds or self.reconstruction or self.distill or self.caches) or any(
            SOLVERS[layer.solver].needs_hessian or layer.scheme.needs_static_input
            for layer in self.layers
        )

    @property
    def needs_drift(self) -> bool:
        """Whether the unquantized model's pass stops at every layer beside the quantized one's."""
        return any(layer.needs_drift for layer in self.layers)

    @property
    def needs_reference(self) -> bool:
        """Whether the unquantized model runs through every block, too."""
        return self.needs_drift or self.reconstruction is not None

    @property
    def needs_fisher(self) -> bool:
        """Whether calibration goes back through the unquantized model first."""
        return any(layer.needs_gradients for layer in self.layers)

    @property
    def latent(self) -> frozenset[str]:
        """Layers whose codes move when all layers are solved."""
        if self.distill is None or not self.distill.options["weight_lr"]:
            return frozenset()
        return frozenset(layer.name for layer in self.layers if layer.distilled)

    def reconstructed_by(self, name: str) -> Step | None:
        """How blocks are trained, if they are by this algorithm."""
        step = self.reconstruction
        return step if step is not None and step.name == name else None

    def in_block(self, block: int | None) -> dict[str, PlannedLayer]:
        """The planned layers of one block (None: outside of all blocks), by name."""
        return {layer.name: layer for layer in self.layers if layer.block == block}

    def caches_in(self, block: int) -> list[str]:
        """The attention modules of one block whose keys and values are quantized."""
        return [self.caches[block]] if self.caches else []

    def folds_in(self, block: int) -> list[PlannedFold]:
        """The scalings of one block, in order."""
        return [fold for fold in self.folds if fold.block == block]

    def groups(self) -> Iterator[tuple[Scheme, str, list[PlannedLayer]]]:
        """Layers that share a scheme and algorithms, for printing."""
        seen: dict[tuple[str, str], list[PlannedLayer]] = {}
        for layer in self.layers:
            seen.setdefault((layer.scheme.name, layer.steps), []).append(layer)
        for (_, steps), layers in seen.items():
            yield layers[0].scheme, steps, layers

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": {
                layer.name: {
                    "shape": list(layer.shape),
                    "scheme": layer.scheme.name,
                    "solver": layer.solver,
                    "options": dict(layer.options),
                }
                for layer in self.layers
            },
            "rotation": asdict(self.rotation) if self.rotation else None,
            "folds": {
                fold.label: [{"name": s.name, "options": dict(s.options)} for s in fold.steps]
                for fold in self.folds
            },
            "unscaled": dict(self.unscaled),
            **{
                name: _trained(
                    self.reconstructed_by(name),
                    [x.name for x in self.layers if x.reconstructed],
                )
                for name in RECONSTRUCTORS
            },
            "distill": _trained(self.distill, [x.name for x in self.layers if x.distilled]),
            "kv_cache": None if self.kv is None else self.kv.label(),
            "caches": list(self.caches),
            "kept": list(self.kept),
            "blocks": self.blocks,
            "source_bytes": self.source_bytes,
            "size_bytes": self.size_bytes,
            "bits_per_weight": self.bits_per_weight,
            "activation_bytes": self.activation_bytes,
            "spilled_bytes": self.spilled_bytes,
            "block_bytes": self.block_bytes,
            "samples": self.samples,
            "seq_len": self.seq_len,
        }

    @property
    def digest(self) -> str:
        """sha256 of the plan: a resumed run must have the same one."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def make_plan(recipe: Recipe, model: PreTrainedModel, *, samples: int, seq_len: int) -> Plan:
    """Decide for every linear layer of the model.

    Raises:
        UsageError: a group that does not divide a layer, a pattern that matches nothing, an
            algorithm chain that cannot run, or nothing to quantize.
    """
    stacks = models.find_stacks(model)
    numbers = models.block_numbers(model)
    blocks = [block for _, stack in stacks for block in stack]
    caches = () if recipe.kv_cache is None else decoder_attentions(model)
    encoder = models.family_of(model.config) is models.FAMILIES["encoder"]
    head = None if encoder else models.head_name(model)
    linears = models.linear_layers(model)
    # Recipes call every architecture's output head lm_head, and encoders have none.
    kept_head = HEAD in recipe.keep and HEAD not in linears
    unmatched = [p for p in recipe.unmatched(linears) if not (p == HEAD and kept_head)]
    if unmatched:
        raise UsageError(
            f"pattern {unmatched[0]!r} matches no layer",
            remedy=f"layers are named like {next(iter(linears))!r}",
        )
    layers, kept, reconstructors, refiners = [], [], {}, {}
    for name, module in linears.items():
        block = models.block_of(name, numbers)
        scheme = None if name == head and kept_head else recipe.scheme_for(name)
        # What lies outside of the decoder (a vision tower, say) never meets its traffic.
        if scheme is None or (block is None and name != head):
            kept.append(name)
            continue
        shape = (module.out_features, module.in_features)
        _check_fits(name, shape, scheme)
        steps = layer_steps(recipe, name)
        check_codes(name, steps.solver.name, scheme)
        if steps.reconstructor is not None and block is not None:
            check_reconstructible(name, steps.reconstructor.name, scheme)
            reconstructors[name] = steps.reconstructor
        if steps.refiner is not None and block is not None:
            check_trainable(name, scheme, steps.refiner)
            refiners[name] = steps.refiner
        trained = (reconstructors[name].name if name in reconstructors else None, name in refiners)
        solver, options = steps.solver.name, steps.solver.options
        layers.append(
            PlannedLayer(name, block, shape, scheme, solver, options, steps.rescalers, *trained)
        )
    if not layers:
        raise UsageError("the recipe keeps every layer: nothing to quantize")
    # Refused before any work, not at the first static layer.
    Candidates.of(recipe.calibrate.observer.name, recipe.calibrate.observer.options)
    check_family(model, layers)
    rotation = plan_rotation(recipe, model, [layer.name for layer in layers])
    if rotation is not None:
        layers = [
            replace(
                layer,
                rotated=rotation.turns(layer.name, model),
                hadamard=rotation.order(layer.name, layer.shape[1]),
            )
            for layer in layers
        ]
    folds, unscaled = _plan_folds(model, layers)
    scaled = {name: fold.steps for fold in folds for name in fold.consumers}
    layers = [replace(layer, rescalers=scaled.get(layer.name, ())) for layer in layers]
    quantized_head = any(layer.name == head for layer in layers)
    turned_head = rotation is not None and rotation.residual
    unties = (quantized_head or turned_head) and models.is_tied(model)
    source_bytes = _weight_bytes(model)
    element = torch.finfo(next(model.parameters()).dtype).bits // 8
    hidden = models.embedding_shape(model)[1]
    if models.family_of(model.config).stacks == 2:
        hidden *= 3  # the encoder's outputs stay beside the decoder's hidden states
    original = sum(layer.weights * element for layer in layers)
    if unties and quantized_head:
        original -= next(x.weights * element for x in layers if x.name == head)
    size = source_bytes - original + sum(math.ceil(layer_bits(x, element * 8) / 8) for x in layers)
    size += len(caches) * len(SIDES) * element
    if rotation is not None:
        size += rotation.head_bytes
    cached = cache_width(model) if caches else 0
    states = footprint(layers, samples, seq_len, element, hidden, cached)
    return Plan(
        layers=tuple(layers),
        kept=tuple(kept),
        blocks=len(blocks),
        source_bytes=source_bytes,
        size_bytes=size,
        activation_bytes=states.held,
        spilled_bytes=states.spilled,
        block_bytes=sum(p.numel() * p.element_size() for p in blocks[0].parameters()),
        samples=samples,
        seq_len=seq_len,
        unties_head=unties,
        rotation=rotation,
        folds=folds,
        unscaled=unscaled,
        reconstruction=one_trainer(reconstructors, "a whole block"),
        distill=one_trainer(refiners, "the whole model"),
        kv=recipe.kv_cache,
        caches=caches,
    )


def layer_bits(layer: PlannedLayer, model_dtype_bits: int = 16) -> int:
    """Bits of a quantized layer on disk: weight, scales, zero points, input scale, shape."""
    bits = layer.scheme.weight.stored_bits(layer.shape, model_dtype_bits)
    if layer.scheme.needs_static_input:
        bits += model_dtype_bits
    return bits


def _trained(step: Step | None, names: Sequence[str]) -> dict[str, Any] | None:
    """What is trained, and how, as JSON."""
    return None if step is None else {"options": dict(step.options), "layers": list(names)}


def _check_fits(name: str, shape: tuple[int, int], scheme: Scheme) -> None:
    try:
        scheme.weight.scale_shape(shape)
        inputs = scheme.input
        if inputs is not None and inputs.granularity is Granularity.GROUP:
            inputs.scale_shape((1, shape[1]))
    except UsageError as e:
        raise UsageError(f"{name}: {e.message}", remedy=e.remedy) from e


def _plan_folds(
    model: PreTrainedModel, layers: Sequence[PlannedLayer]
) -> tuple[tuple[PlannedFold, ...], dict[str, str]]:
    """Where the layers' rescalers scale, and what they would scale and cannot.

    Raises:
        UsageError: layers that read one input name different rescalers, or the architecture
            has no table.
    """
    asking = {layer.name: layer for layer in layers if layer.rescalers}
    if not asking:
        return (), {}
    planned = {layer.name: layer for layer in layers}
    found, refused = find_folds(model)
    folds = []
    unscaled = {
        name: "no scaling folds outside of the blocks"
        for name, layer in asking.items()
        if layer.block is None
    }
    for fold in found:
        members = [planned[name] for name in fold.consumers if name in planned]
        if not any(layer.rescalers for layer in members):
            continue
        steps = members[0].rescalers
        for layer in members[1:]:
            if layer.rescalers != steps:
                raise UsageError(
                    f"{members[0].name} has the rescalers {[s.name for s in steps]} and "
                    f"{layer.name} {[s.name for s in layer.rescalers]}, but they read one input",
                    remedy="give layers that share an input the same rescalers and options",
                )
        if not fold.of_norm:
            steps = tuple(step for step in steps if step.options["pairs"] == "all")
        if steps and any(layer.hadamard for layer in members):
            unscaled[fold.label] = "a rotation stands between, which runs at inference"
        elif steps:
            producer = planned.get(fold.producer)
            if producer is not None and producer.coupled:
                raise UsageError(
                    f"{producer.name}: outputs: coupled knows the original's outputs, and the "
                    f"scaling of {members[0].name}'s input makes others of them",
                    remedy="take one of the two out, or scale behind norms only (pairs: norms)",
                )
            folds.append(PlannedFold(**vars(fold), steps=steps))
    unscaled |= {r.label: r.reason for r in refused if any(name in asking for name in r.consumers)}
    return tuple(folds), unscaled


def _weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters and persistent buffers, a tied tensor once."""
    return sum(t.numel() * t.element_size() for t in models.stored_tensors(model).values())
