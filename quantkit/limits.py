"""What calibration refuses before any work, for its processes, its memory or its device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantkit import model as models
from quantkit.batches import Batch, rows
from quantkit.errors import UsageError
from quantkit.footprint import spills
from quantkit.parallel import ALONE, World
from quantkit.plan import Plan
from quantkit.reconstruct import check_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_limits(
    plan: Plan,
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    activation_memory: int | None = None,
    all_experts: bool = False,
    together: World = ALONE,
) -> None:
    """Refuse a calibration that cannot come to an end. Nothing is asked of the other processes.

    Args:
        plan: what will be done.
        model: to which.
        batches: of all processes.
        activation_memory: bytes of hidden states to hold; None for all.
        all_experts: every expert is to see every token.
        together: the processes that will calibrate.

    Raises:
        UsageError: one batch of hidden states is more than ``activation_memory``, or the others
            cannot go to disk; a reconstructor on other inputs than tokens or on a single window, or
            distillation on one; something that several processes cannot do, or fewer batches than
            processes.
    """
    spilled = spills(plan, activation_memory)
    if spilled:
        _check_spilling(model)
    if plan.reconstruction is not None:
        check_windows(plan.reconstruction, batches)
    if plan.distill is not None and sum(rows(batch) for batch in batches) < 2:
        raise UsageError(
            "distill holds windows back that it does not train on, and there is one in all",
            remedy="give --samples 2 or more",
        )
    if together.size == 1:
        return
    if spilled or plan.reconstruction is not None:
        trained = plan.reconstruction
        what = "--activation-memory" if spilled or trained is None else trained.name
        raise UsageError(
            f"{what}: goes through all windows of a block, and they are in {together.size} "
            "processes",
            remedy="start one process, or leave it out",
        )
    if not all_experts and _plans_experts(plan, model):
        raise UsageError(
            f"a router sends an expert other tokens in each of {together.size} processes, and "
            "maybe none",
            remedy="set `all_experts: true`, or start one process",
        )
    together.share(batches)


def _check_spilling(model: PreTrainedModel) -> None:
    if model.device.type != "cpu":
        raise UsageError(
            f"--activation-memory: hidden states are on {model.device.type}",
            remedy="leave it out, or calibrate on the CPU",
        )
    if len(models.find_stacks(model)) > 1:
        raise UsageError(
            "--activation-memory: a decoder begins with what its encoder made of all batches",
            remedy="leave it out, or calibrate on fewer or shorter samples",
        )


def _plans_experts(plan: Plan, model: PreTrainedModel) -> bool:
    experts = tuple(f"{name}." for name in models.find_experts(model))
    return any(layer.name.startswith(experts) for layer in plan.layers)
