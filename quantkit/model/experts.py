"""Experts as linear layers: what transformers computes as one 3-D tensor, taken apart again.

transformers 5 keeps a layer's experts as ``gate_up_proj [E, 2·I, H]`` and ``down_proj [E, H, I]``,
while checkpoints, and the runtimes that load them, have three matrices for each expert.
Calibration needs those: each expert has inputs, and so a Hessian, of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkit.errors import UsageError
from quantkit.model.parts import set_submodule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Which tokens an expert's layers see: those routed to it; all, as one tensor that every expert
#: reads; or all, each expert a copy of its own, so that tracing tells their inputs apart.
MODES = ("routed", "all", "apart")


class Expert(nn.Module):
    """The three matrices of one gated MLP, without biases, under their names on disk.

    Args:
        names: of gate, up and down, such as ``("w1", "w3", "w2")``.
        gate_up: ``[2·I, H]``.
        down: ``[H, I]``.
    """

    def __init__(self, names: tuple[str, str, str], gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.names = names
        for name, weight in zip(names, (*gate_up.chunk(2), down), strict=True):
            # Views: until a layer is quantized, nothing is held twice.
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(name, linear)


class LinearExperts(nn.Module):
    """Experts of one layer, run one after the other; stands in for transformers' fused module.

    Args:
        fused: what it replaces; left without its weights, it still joins gate and up.
        names: of each expert's matrices on disk: gate, up, down.
    """

    def __init__(self, fused: Any, names: tuple[str, str, str]) -> None:
        super().__init__()
        self.mode = "routed"
        self.count = len(fused.gate_up_proj)
        for i in range(self.count):
            expert = Expert(names, fused.gate_up_proj.data[i], fused.down_proj.data[i])
            self.add_module(str(i), expert)
        del fused.gate_up_proj, fused.down_proj
        self.fused = fused
        self.names = names

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens ``[T, H]``, their experts int64 ``[T, k]`` and weights ``[T, k]`` → ``[T, H]``.

        Only routed tokens count towards the result, whatever ``mode`` says.
        """
        out = torch.zeros_like(hidden_states)
        for i in range(self.count):
            tokens, place = torch.where(top_k_index == i)
            if self.mode == "routed":
                if not len(tokens):
                    continue
                made = self._run(i, hidden_states[tokens])
            else:
                x = hidden_states if self.mode == "all" else hidden_states.clone()
                made = self._run(i, x)[tokens]
            made = made * top_k_weights[tokens, place, None]
            out.index_add_(0, tokens, made.to(out.dtype))
        return out

    def _run(self, index: int, x: Tensor) -> Tensor:
        gate, up, down = (getattr(getattr(self, str(index)), name) for name in self.names)
        joined: Tensor = self.fused._apply_gate(torch.cat([gate(x), up(x)], dim=-1))
        out: Tensor = down(joined)
        return out


def linearize(model: PreTrainedModel) -> None:
    """Replace a model's fused experts by linear layers; does nothing to a model without experts.

    Raises:
        UsageError: experts of another form, or that checkpoints do not hold one by one: their
            weights would stay in 16 bits without a word.
    """
    found = {n: m for n, m in model.named_modules() if _fused_weights(m)}
    if not found:
        return
    names = _names_on_disk(model)
    for name, module in found.items():
        reason = _cannot(module)
        if names is None:
            reason = "checkpoints of this architecture hold all experts in one tensor"
        if any(p.is_meta for p in module.parameters()) and hasattr(module, "_hf_hook"):
            reason = "part of the model is on disk, and fused experts must be in memory"
        if reason or names is None:
            raise UsageError(
                f"{name} ({type(module).__name__}): these experts cannot be calibrated: {reason}",
                remedy="see docs/architectures.md for the mixtures of experts that can",
            )
        set_submodule(model, name, LinearExperts(module, names))


def find_experts(model: nn.Module) -> dict[str, LinearExperts]:
    """The linearized experts of a model by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LinearExperts)}


@contextmanager
def expert_inputs(module: nn.Module, mode: str) -> Iterator[None]:
    """While active, the experts inside a module see what one of `MODES` says."""
    found = list(find_experts(module).values())
    before = [experts.mode for experts in found]
    for experts in found:
        experts.mode = mode
    try:
        yield
    finally:
        for experts, old in zip(found, before, strict=True):
            experts.mode = old


def routers(model: nn.Module) -> list[str]:
    """Modules that multiply by a matrix and are no linear layers, such as routers.

    They are never quantized, and other runtimes, to which they are linear layers, must be told.
    """
    common = (nn.Linear, nn.Embedding)
    found = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 2 and not isinstance(module, common):
            found.append(name)
    return found


def _fused_weights(module: nn.Module) -> bool:
    """Whether a module holds several matrices in one tensor, convolutions aside."""
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    shapes = {name: p.ndim for name, p in module.named_parameters(recurse=False)}
    return not convolution and any(
        ndim == 3 and re.search(r"(gate|up|down)_proj|expert|w\d", name)
        for name, ndim in shapes.items()
    )


def _cannot(module: nn.Module) -> str:
    """Why these experts are no plain gated MLPs; empty if they are."""
    names = {name for name, _ in module.named_parameters()}
    if names != {"gate_up_proj", "down_proj"} or not hasattr(module, "_apply_gate"):
        return f"they hold {', '.join(sorted(names))} where gate_up_proj, down_proj are known"
    for flag, known in (("has_gate", True), ("is_concatenated", True)):
        if getattr(module, flag, known) is not known:
            return f"{flag} is {not known}"
    for flag in ("has_bias", "is_transposed", "has_post_expert_norm"):
        if getattr(module, flag, False):
            return f"{flag} is True"
    return ""


def _names_on_disk(model: PreTrainedModel) -> tuple[str, str, str] | None:
    """Names of an expert's gate, up and down matrices in checkpoint files, from the table by
    which transformers fuses them; None where it fuses nothing."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    leaves: dict[str, list[str]] = {}
    for entry in get_model_conversion_mapping(model):
        for target in ("gate_up_proj", "down_proj"):
            if entry.target_patterns[0].endswith(f"experts.{target}"):
                sources = [re.search(r"\.(\w+)\.weight", p) for p in entry.source_patterns]
                leaves[target] = [match[1] for match in sources if match]
    joined = [*leaves.get("gate_up_proj", ()), *leaves.get("down_proj", ())]
    return (joined[0], joined[1], joined[2]) if len(joined) == 3 else None
