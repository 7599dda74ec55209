"""Families of models: which class loads one, and what calibration feeds it.

A config's ``architectures`` names the class that wrote the weights. That class loads them, so that
nothing is dropped without a word: a BERT encoder is no causal language model, although
transformers has one that would read its files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from quantkit.errors import UsageError


@dataclass(frozen=True)
class Family:
    """What kind of model this is.

    Attributes:
        title: for people.
        logits: its output head predicts tokens of the text it reads: it can be scored and served.
        stacks: lists of blocks that calibration goes through: encoder and decoder, or one.
        audio: it reads audio beside tokens.
    """

    title: str
    logits: bool = False
    stacks: int = 1
    audio: bool = False


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "causal": Family("causal language model", logits=True),
        "vision-language": Family("vision–language model", logits=True),
        "speech": Family("speech recognizer", stacks=2, audio=True),
        "text-to-text": Family("encoder–decoder", stacks=2),
        "encoder": Family("encoder"),
    }
)

#: transformers' Auto class, its table of classes by ``model_type``, and the family; the first
#: table that holds a class decides.
_TABLES = (
    (
        "AutoModelForImageTextToText",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "vision-language",
    ),
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "causal"),
    ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "speech"),
    ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "text-to-text"),
    ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "encoder"),
    (
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "encoder",
    ),
    ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "encoder"),
    ("AutoModel", "MODEL_MAPPING_NAMES", "encoder"),
)


def auto_class(config: Any) -> Any:
    """transformers' Auto class that loads the class named in ``config.architectures``.

    Raises:
        UsageError: no family has such a class.
    """
    import transformers

    return getattr(transformers, _row(config)[0])


def family_of(config: Any) -> Family:
    """The family of a model by its config. Raises UsageError as `auto_class` does."""
    return FAMILIES[_row(config)[1]]


def require_logits(config: Any, action: str) -> None:
    """Refuse a model whose output is not the next token's.

    Args:
        config: the model's.
        action: what would be done, such as ``"quantkit eval scores"``.

    Raises:
        UsageError: names the family.
    """
    family = family_of(config)
    if not family.logits:
        raise UsageError(
            f"this model is of the family {family.title!r}, and {action} next-token predictions",
            remedy="calibrate it with --no-gate and run the export in transformers; see "
            "docs/architectures.md",
        )


def _row(config: Any) -> tuple[str, str]:
    """(Auto class, family)."""
    from transformers.models.auto import modeling_auto

    named = (getattr(config, "architectures", None) or [None])[0]
    for auto, table, family in _TABLES:
        names = getattr(modeling_auto, table).get(config.model_type, ())
        names = (names,) if isinstance(names, str) else tuple(names)
        # A config without a class name is what every causal model's was taken for so far.
        if named in names or (named is None and family == "causal" and names):
            if family == "encoder" and getattr(config, "is_encoder_decoder", False):
                break  # half of an encoder–decoder, or its bare stacks
            return auto, family
    raise UsageError(
        f"architecture {named or config.model_type!r}: of no family that quantkit calibrates",
        remedy=f"families: {', '.join(f.title for f in FAMILIES.values())}; see "
        "docs/architectures.md",
    )
