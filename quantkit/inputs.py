"""A recipe's data → what a family of models reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from quantkit import model as models
from quantkit.batches import Batch
from quantkit.data.sources import Source
from quantkit.data.speech import NO_TOKEN, load_speech
from quantkit.data.tokens import TokenBatches, content_hash, load_tokens
from quantkit.errors import UsageError
from quantkit.recipe import Calibration


def load_inputs(
    sources: Sequence[Source],
    source: models.SourceModel,
    calibration: Calibration,
    *,
    answers: bool = False,
) -> tuple[TokenBatches, list[Batch]]:
    """Windows of tokens, and what is read instead of them by a model that reads more.

    ``answers``: of text, with which of the tokens are of an answer.

    Raises:
        UsageError: a malformed source, windows that are longer than the model's positions, a
            recognizer without a feature extractor.
    """
    family = source.family
    if family.audio:
        return _speech(sources, source, calibration)
    seq_len = calibration.seq_len
    encoder = family is models.FAMILIES["encoder"]
    most = _positions(source.model) if encoder else None
    if most is not None and seq_len > most:
        raise UsageError(
            f"calibrate.seq_len {seq_len} is more than the {most} positions of this encoder",
            remedy=f"set it to {most} or less",
        )
    frame = _frame(source) if encoder else None
    tokens = load_tokens(
        sources,
        source.tokenizer,
        samples=calibration.samples,
        seq_len=seq_len - 2 if frame else seq_len,
        seed=calibration.seed,
        chat_template=calibration.chat_template and source.tokenizer.chat_template is not None,
        answers=answers,
    )
    if frame is None:
        return tokens, []
    ends = torch.tensor(frame).expand(len(tokens.ids), 2)
    ids = torch.cat([ends[:, :1], tokens.ids, ends[:, 1:]], dim=1)
    return replace(tokens, ids=ids, hash=content_hash(ids.numpy()), starts=None, answers=None), []


def _positions(model: nn.Module) -> int | None:
    """The longest input of an encoder in tokens, or None where its config does not say.

    Encoders learn position by position; rotary ones go on behind their last. RoBERTa and its like
    count positions from behind the padding token's: transformers,
    ``create_position_ids_from_input_ids``.
    """
    most: int | None = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.rpartition(".")[2] == "position_embeddings" and padding is not None:
            return None if most is None else most - padding - 1
    return most


def _frame(source: models.SourceModel) -> tuple[int, int] | None:
    """The tokens that an encoder's texts begin and end with: where it gathers what they mean."""
    begin, end = source.tokenizer.cls_token_id, source.tokenizer.sep_token_id
    return None if begin is None or end is None else (begin, end)


def _speech(
    sources: Sequence[Source], source: models.SourceModel, calibration: Calibration
) -> tuple[TokenBatches, list[Batch]]:
    from transformers import AutoFeatureExtractor

    try:
        with models.quiet_transformers():
            extractor = AutoFeatureExtractor.from_pretrained(source.folder, local_files_only=True)
    except (OSError, ValueError) as e:
        raise UsageError(
            f"{source.source}: has no feature extractor ({models.first_line(e)})",
            remedy="copy preprocessor_config.json from the original model",
        ) from e
    config = source.model.config
    tokens, features = load_speech(
        sources,
        extractor,
        source.tokenizer,
        start=config.decoder_start_token_id,
        longest=config.max_target_positions,
        samples=calibration.samples,
        seed=calibration.seed,
    )
    dtype = source.model.dtype
    batches: list[Batch] = [
        {"input_features": heard.to(dtype), "decoder_input_ids": ids[ids != NO_TOKEN][None]}
        for heard, ids in zip(features, tokens.ids, strict=True)
    ]
    return tokens, batches
