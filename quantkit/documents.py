"""Documents of a window that do not see each other.

A window of calibration text holds many short documents, and a model reads each of them behind all
that came before it. A server reads a request from position 0 with nothing before it. Here such a
window is read so: positions begin anew with each document, and transformers masks by that what
another one said, as it does for packed sequences.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit import model as models
from quantkit.batches import Batch
from quantkit.errors import UsageError
from quantkit.paused import head_input

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: A relative difference that rounding does not make.
_APART = 0.05


def positions(starts: Tensor) -> Tensor:
    """Place of each token in its document, int64 ``[T]``.

    Args:
        starts: bool ``[T]``, true where a document begins. What stands in front of the first is
            the rest of one that began in another window, and counts from 0, too.
    """
    place = torch.arange(len(starts), device=starts.device)
    return place - torch.where(starts, place, torch.zeros_like(place)).cummax(0).values


def digest(starts: Tensor | None) -> str | None:
    """sha256 of where documents begin; None where nobody knows."""
    return None if starts is None else hashlib.sha256(starts.cpu().numpy().tobytes()).hexdigest()


def cut_apart(ids: Tensor, starts: Tensor | None, share: float) -> list[Batch]:
    """Windows ``[1, T]`` one by one, a share of them with their documents read apart.

    Those are evenly spread and always the same ones.

    Args:
        ids: tokens int64 ``[samples, T]``.
        starts: bool ``[samples, T]``; None where nobody knows.
        share: from 0, none, to 1, all.

    Raises:
        UsageError: a share is asked for and there are no documents to tell apart.
    """
    windows: list[Batch] = list(ids.split(1))
    if share == 0:
        return windows
    if starts is None:
        raise UsageError(
            f"apart {share}: what is calibrated on has no documents of tokens",
            remedy="set apart to 0",
        )
    for i, window in enumerate(ids.split(1)):
        if math.floor((i + 1) * share) > math.floor(i * share):
            windows[i] = {"input_ids": window, "position_ids": positions(starts[i])[None]}
    return windows


@torch.no_grad()
def check_apart(model: PreTrainedModel, windows: Sequence[Batch]) -> None:
    """Raise unless the model reads a window's second document as it reads it alone.

    Args:
        model: any that has an output head.
        windows: of `cut_apart`; the first that reads two documents apart is tried.

    Raises:
        UsageError: its layers do not go by positions, as those with a state or convolutions.
    """
    for window in windows:
        if isinstance(window, Tensor):
            continue
        begins = (window["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        if len(begins) > 1:
            break
    else:
        return
    first, end = begins[1], [*begins, window["input_ids"].shape[1]][2]
    if models.family_of(model.config).logits:
        behind = {name: x[:, :end] for name, x in window.items()}
        seen = head_input(model, behind)[0, first:].float()
        alone = head_input(model, window["input_ids"][:, first:end])[0].float()
        if float((seen - alone).norm()) <= _APART * float(alone.norm()):
            return
    raise UsageError(
        f"{type(model).__name__}: does not read the documents of a window apart by their positions",
        remedy="set apart to 0",
    )
