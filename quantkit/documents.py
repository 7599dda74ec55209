"""Documents of a window that do not see each other.

A window of calibration text holds many short documents, and a model reads each of them behind all
that came before it. A server reads a request from position 0 with nothing before it. Here such a
window is read so: positions begin anew with each document, and transformers masks by that what
another one said, as it does for packed sequences. And what predicting a token of a request is
worth: those of its answer are what a product lives by.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit import model as models
from quantkit.batches import Batch, token_ids
from quantkit.errors import QuantkitError, UsageError
from quantkit.folding import PAIRS
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


def digest(marks: Tensor | None) -> str | None:
    """sha256 of what is known of each token; None where nothing is."""
    return None if marks is None else hashlib.sha256(marks.cpu().numpy().tobytes()).hexdigest()


def positions_apart(starts: Tensor | None, share: float) -> Tensor | None:
    """Positions of tokens where a share of the windows has its documents read apart, int64
    ``[samples, T]``; None for a share of 0.

    Such windows are evenly spread and always the same ones. The first is never one: what a reloaded
    checkpoint says of it is compared.

    Args:
        starts: bool ``[samples, T]``, true where a document begins; None where nobody knows.
        share: from 0, none, to 1, all.

    Raises:
        UsageError: a share is asked for and there are no documents to tell apart.
    """
    if share == 0:
        return None
    if starts is None:
        raise UsageError(
            f"calibrate.apart {share:g}: what is calibrated on has no documents of tokens",
            remedy="set it to 0",
        )
    places = torch.arange(starts.shape[1]).repeat(len(starts), 1)
    for i in range(1, len(starts)):
        if math.floor((i + 1) * share) > math.floor(i * share):
            places[i] = positions(starts[i])
    return places


def prediction_weights(answers: Tensor | None, factor: float) -> Tensor | None:
    """What predicting each position's next token is worth in a loss, fp32 ``[samples, T]``.

    A token of an answer is predicted where the token in front of it is read.

    Args:
        answers: bool ``[samples, T]``, true where a token is of an answer; None where nobody knows.
        factor: of those, where others have 1.

    Returns:
        None for a factor of 1.

    Raises:
        UsageError: the text has no answers.
    """
    if factor == 1:
        return None
    if answers is None or not bool(answers.any()):
        raise UsageError(
            f"answers {factor:g}: nothing in the text that is calibrated on is known as an answer",
            remedy="give rows of `prompt` and `completion`, or of `messages`; or set answers to 1",
        )
    weights = torch.ones(answers.shape, dtype=torch.float32)
    weights[:, :-1][answers[:, 1:]] = factor
    return weights


@torch.no_grad()
def check_apart(model: PreTrainedModel, windows: Sequence[Batch]) -> None:
    """Raise unless the model reads a window's second document as it reads it alone.

    Args:
        model: any that has an output head.
        windows: ``[1, T]`` each; the first that reads two documents apart is tried.

    Raises:
        UsageError: its layers do not go by positions, as those with a state or convolutions; or
            part of it is on disk and it is not one of `quantkit.folding.PAIRS`, which do.
        QuantkitError: its states are not finite.
    """
    if any(p.is_meta for p in model.parameters()):
        if model.config.model_type in PAIRS:  # attention alone, so that positions tell
            return
        raise UsageError(
            f"{type(model).__name__}: whether it reads documents apart cannot be tried, as part of "
            "it is on disk",
            remedy="set calibrate.apart to 0, or give it more memory",
        )
    for window in windows:
        if isinstance(window, Tensor):
            continue
        begins = (window["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        if len(begins) > 1:
            break
    else:
        return
    first, end = begins[1], [*begins, token_ids(window).shape[1]][2]
    family = models.family_of(model.config)
    if family.logits and family.stacks == 1:
        behind = {name: x[:, :end] for name, x in window.items()}
        seen = head_input(model, behind)[0, first:].float()
        alone = head_input(model, token_ids(window)[:, first:end])[0].float()
        if not bool(alone.isfinite().all()):
            raise QuantkitError(
                f"{type(model).__name__}: its last states are not finite, of a document alone",
                remedy="check the original with `quantkit eval --canary`",
            )
        if float((seen - alone).norm()) <= _APART * float(alone.norm()):
            return
    raise UsageError(
        f"{type(model).__name__}: does not read the documents of a window apart by their positions",
        remedy="set calibrate.apart to 0",
    )
