"""What the forward passes of calibration read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit import model as models

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Token ids int64 ``[B, T]``, or a model's inputs by name where there are others beside them.
Batch = Tensor | Mapping[str, Tensor]

#: Tokens of one paused forward pass. Large enough for the matrix products to run at their
#: full rate, small enough that a pass's temporaries are a few tens of MB.
BATCH_TOKENS = 4096

#: Windows that a recipe runs which needs no data, only to measure output errors.
PROBE_WINDOWS = 8

#: Windows that training is judged on and never sees, at most.
HELD_WINDOWS = 8


@dataclass(frozen=True)
class CalibrationData:
    """Token ids int64 ``[samples, seq_len]`` and their content hash.

    ``batches`` stand in for the windows of a model that reads more than tokens. ``positions``,
    int64 of the same shape, are those of tokens in their documents, where these do not see each
    other (`quantkit.documents.positions_apart`); None where a window is one text. ``answers``,
    bool, is true where a token is of an answer; None where nobody looked.
    """

    ids: Tensor
    hash: str
    batches: Sequence[Batch] = ()
    positions: Tensor | None = None
    answers: Tensor | None = None


@dataclass(frozen=True)
class Probe:
    """A batch, token ids ``[1, T]`` as a rule, and what the quantized model's head sees for it
    ``[1, T, hidden]``: what a reloaded checkpoint must reproduce."""

    ids: Batch
    head_input: Tensor


def model_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """The arguments of a model's forward pass over a batch.

    An encoder–decoder given plain token windows reads the first half of each and predicts the
    second, as T5's prefix language model does (Raffel et al., "Exploring the Limits of Transfer
    Learning", section 3.2.1).
    """
    family = models.family_of(model.config)
    if not isinstance(batch, Tensor):
        inputs = dict(batch)
    elif family.stacks == 2:
        half = batch.shape[1] // 2
        start = torch.full_like(batch[:, :1], model.config.decoder_start_token_id or 0)
        inputs = {
            "input_ids": batch[:, :half],
            "decoder_input_ids": torch.cat([start, batch[:, half:-1]], dim=1),
        }
    else:
        inputs = {"input_ids": batch}
    arguments: dict[str, Any] = {name: x.to(model.device) for name, x in inputs.items()}
    if family is not models.FAMILIES["encoder"]:
        arguments["use_cache"] = False
    return arguments


def rows(batch: Batch) -> int:
    """B: how many sequences a batch holds."""
    return len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))


def cut_batches(ids: Tensor | None, least: int = 1) -> list[Tensor]:
    """Windows ``[samples, seq_len]`` cut into batches of about `BATCH_TOKENS`.

    The first batch is one window: layers are traced on it, and the reloaded checkpoint is
    run on it in exactly the same shapes.

    Args:
        ids: the windows.
        least: batches that are wanted at least; smaller ones are cut for that, if there are
            windows enough.
    """
    if ids is None:
        return []
    windows = max(1, min(BATCH_TOKENS // ids.shape[1], (len(ids) - 1) // max(least - 1, 1)))
    rest = list(ids[1:].split(windows)) if len(ids) > 1 else []
    return [ids[:1], *rest]


def calibration_batches(
    data: CalibrationData | None, *, needed: bool, processes: int = 1
) -> Sequence[Batch]:
    """What calibration runs; nothing without data.

    Args:
        data: of the recipe.
        needed: whether the plan needs data; else `PROBE_WINDOWS` do.
        processes: that want a share.
    """
    if data is None:
        return []
    if data.batches:
        return data.batches
    count = len(data.ids) if needed else PROBE_WINDOWS
    batches: list[Batch] = list(cut_batches(data.ids[:count], processes))
    if data.positions is not None:
        # A reloaded checkpoint is compared on the first, and the decoder reads tokens alone.
        places = cut_batches(data.positions[:count], processes)
        for i in range(1, len(batches)):
            batches[i] = {"input_ids": token_ids(batches[i]), "position_ids": places[i]}
    return batches


def single_windows(batches: Sequence[Batch]) -> list[Batch]:
    """The windows of batches one by one, ``[1, T]`` each."""
    windows: list[Batch] = []
    for batch in batches:
        if isinstance(batch, Tensor):
            windows += batch.split(1)
        else:
            windows += [
                {name: x[i : i + 1] for name, x in batch.items()} for i in range(rows(batch))
            ]
    return windows


def token_ids(batch: Batch) -> Tensor:
    """Token ids ``[B, T]`` of a batch of text."""
    return batch if isinstance(batch, Tensor) else batch["input_ids"]


def random_batch(model: PreTrainedModel, length: int = 64) -> Batch:
    """A batch of random tokens ``[1, length]``, with silence for a model that reads audio."""
    vocabulary = models.embedding_shape(model)[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, length), generator=generator)
    if not models.family_of(model.config).audio:
        return ids
    frames = 2 * model.config.max_source_positions
    features = torch.zeros(1, model.config.num_mel_bins, frames, dtype=model.dtype)
    return {"input_features": features, "decoder_input_ids": ids}


def held_back(windows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the windows that are never trained on, one in sixteen and `HELD_WINDOWS` at most,
    and of the others, in the order in which these are trained on; int64."""
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))
    held = min(HELD_WINDOWS, max(1, windows // 16))
    return order[:held], order[held:]
