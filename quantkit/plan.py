"""Recipe × model → Plan: what will be done to every layer, checked before any work."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from quantkit import model as models
from quantkit.algorithms import SOLVERS
from quantkit.errors import UsageError
from quantkit.recipe import Recipe
from quantkit.schemes import Granularity, Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    """

    name: str
    block: int | None
    shape: tuple[int, int]
    scheme: Scheme
    solver: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


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
        block_bytes: one block's weights.
        samples, seq_len: calibration tokens.
        unties_head: the head gets a tensor of its own.
    """

    layers: tuple[PlannedLayer, ...]
    kept: tuple[str, ...]
    blocks: int
    source_bytes: int
    size_bytes: int
    activation_bytes: int
    block_bytes: int
    samples: int
    seq_len: int
    unties_head: bool

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the quantized layers, scales included, over their weights."""
        bits = sum(layer_bits(layer) for layer in self.layers)
        return bits / sum(layer.weights for layer in self.layers)

    @property
    def needs_data(self) -> bool:
        return any(
            SOLVERS[layer.solver].needs_hessian or layer.scheme.needs_static_input
            for layer in self.layers
        )

    def in_block(self, block: int | None) -> dict[str, PlannedLayer]:
        """The planned layers of one block (None: outside of all blocks), by name."""
        return {layer.name: layer for layer in self.layers if layer.block == block}

    def groups(self) -> Iterator[tuple[Scheme, str, list[PlannedLayer]]]:
        """Layers that share a scheme and solver, for printing."""
        seen: dict[tuple[str, str], list[PlannedLayer]] = {}
        for layer in self.layers:
            seen.setdefault((layer.scheme.name, layer.solver), []).append(layer)
        for (_, solver), layers in seen.items():
            yield layers[0].scheme, solver, layers

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
            "kept": list(self.kept),
            "blocks": self.blocks,
            "source_bytes": self.source_bytes,
            "size_bytes": self.size_bytes,
            "bits_per_weight": self.bits_per_weight,
            "activation_bytes": self.activation_bytes,
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
    if recipe.kv_cache is not None:
        raise UsageError(
            "kv_cache: checkpoints with KV-cache scales are not written by this version",
            remedy="drop the key",
        )
    prefix, blocks = models.find_blocks(model)
    head = models.head_name(model)
    linears = models.linear_layers(model)
    unmatched = recipe.unmatched(linears)
    if unmatched:
        raise UsageError(
            f"pattern {unmatched[0]!r} matches no layer",
            remedy=f"layers are named like {next(iter(linears))!r}",
        )
    layers, kept = [], []
    for name, module in linears.items():
        block = _block_of(name, prefix)
        scheme = recipe.scheme_for(name)
        # What lies outside of the decoder (a vision tower, say) never meets its traffic.
        if scheme is None or (block is None and name != head):
            kept.append(name)
            continue
        shape = (module.out_features, module.in_features)
        _check_fits(name, shape, scheme)
        solver, options = _solver(recipe, name)
        layers.append(PlannedLayer(name, block, shape, scheme, solver, options))
    if not layers:
        raise UsageError("the recipe keeps every layer: nothing to quantize")
    unties = any(layer.name == head for layer in layers) and models.is_tied(model)
    source_bytes = _weight_bytes(model)
    element = torch.finfo(next(model.parameters()).dtype).bits // 8
    width = max(layer.shape[1] for layer in layers)
    hidden = models.embedding_shape(model)[1]
    original = sum(layer.weights * element for layer in layers)
    if unties:
        original -= next(x.weights * element for x in layers if x.name == head)
    size = source_bytes - original + sum(math.ceil(layer_bits(x, element * 8) / 8) for x in layers)
    # Hidden states in and out of a block, and the widest input that is paused inside it.
    activation = samples * seq_len * element * (2 * hidden + width)
    return Plan(
        layers=tuple(layers),
        kept=tuple(kept),
        blocks=len(blocks),
        source_bytes=source_bytes,
        size_bytes=size,
        activation_bytes=activation,
        block_bytes=sum(p.numel() * p.element_size() for p in blocks[0].parameters()),
        samples=samples,
        seq_len=seq_len,
        unties_head=unties,
    )


def layer_bits(layer: PlannedLayer, model_dtype_bits: int = 16) -> int:
    """Bits of a quantized layer on disk: weight, scales, zero points, input scale, shape."""
    bits = layer.scheme.weight.stored_bits(layer.shape, model_dtype_bits)
    if layer.scheme.needs_static_input:
        bits += model_dtype_bits
    return bits


def _block_of(name: str, prefix: str) -> int | None:
    if not name.startswith(prefix + "."):
        return None
    return int(name[len(prefix) + 1 :].split(".", 1)[0])


def _check_fits(name: str, shape: tuple[int, int], scheme: Scheme) -> None:
    try:
        scheme.weight.scale_shape(shape)
        inputs = scheme.input
        if inputs is not None and inputs.granularity is Granularity.GROUP:
            inputs.scale_shape((1, shape[1]))
    except UsageError as e:
        raise UsageError(f"{name}: {e.message}", remedy=e.remedy) from e


def _solver(recipe: Recipe, name: str) -> tuple[str, dict[str, Any]]:
    steps = recipe.algorithm_for(name)
    if len(steps) != 1:
        raise UsageError(
            f"{name}: algorithm list {[s.name for s in steps]}: exactly one solver is needed"
        )
    step = steps[0]
    if step.name not in SOLVERS:
        raise UsageError(
            f"{name}: unknown algorithm {step.name!r}", remedy=f"known: {', '.join(SOLVERS)}"
        )
    defaults = SOLVERS[step.name].options
    unknown = set(step.options) - set(defaults)
    if unknown:
        raise UsageError(
            f"{step.name}: unknown option {min(unknown)!r}",
            remedy=f"known: {', '.join(defaults)}",
        )
    options = {**defaults, **step.options}
    _check_options(step.name, options)
    return step.name, options


def _check_options(solver: str, options: Mapping[str, Any]) -> None:
    def refuse(key: str, rule: str) -> None:
        raise UsageError(f"{solver}: {key} {options[key]!r}: {rule}")

    if "clip" in options and options["clip"] not in ("none", "mse"):
        refuse("clip", "is none or mse")
    if "actorder" in options and options["actorder"] not in ("none", "static"):
        refuse("actorder", "is static or none")
    if "damp" in options:
        damp = options["damp"]
        if not isinstance(damp, int | float) or isinstance(damp, bool) or not 0 <= damp <= 10:
            refuse("damp", "is a number from 0 to 10")


def _weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters and persistent buffers, a tied head once."""
    head = models.head_name(model)
    tied = f"{head}.weight" if models.is_tied(model) else None
    return sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in model.state_dict().items()
        if name != tied
    )
