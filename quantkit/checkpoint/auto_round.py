"""AutoRound's checkpoints (``quant_method: auto-round``): a config of its own over the tensors of
GPTQ or AWQ. Source: AutoRound, ``auto_round/inference/backend.py`` (packing formats) and
``convert_model.py`` (``extra_config``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quantkit.checkpoint.awq import AwqReader
from quantkit.checkpoint.fields import as_integer, as_object
from quantkit.checkpoint.gptq import GptqReader
from quantkit.checkpoint.options import Options, compile_rule, read_usual
from quantkit.errors import UsageError

#: ``packing_format`` → what a stored zero point lacks; None for AWQ's layout.
PACKINGS: dict[str, int | None] = {
    "auto_round:auto_gptq": 1,
    "auto_round:gptqmodel": 0,
    "auto_round": 0,
    "auto_round:auto_awq": None,
}


def open_auto_round(raw: Mapping[str, Any]) -> GptqReader | AwqReader:
    """A reader for config.json's ``quantization_config``.

    Raises:
        UsageError: a packing, or something at inference, that quantkit does not run.
    """
    # Before packing_format there was backend, whose names say less.
    packing = raw.get("packing_format") or raw.get("backend") or "auto_round:auto_gptq"
    if not isinstance(packing, str) or packing not in PACKINGS:
        raise UsageError(
            f"packing_format {packing!r}: not one that quantkit reads",
            remedy=f"known: {', '.join(PACKINGS)}; for the others export with --format "
            "llm_compressor",
        )
    if (raw.get("data_type") or "int") != "int" or _bits(raw, "act_bits", 16) < 16:
        raise UsageError(
            f"data_type {raw.get('data_type')!r}, act_bits {raw.get('act_bits')}: quantkit reads "
            "AutoRound's integer weights under 16-bit activations",
            remedy="export it with --format llm_compressor",
        )
    if raw.get("rotation_config"):
        raise UsageError(
            "rotation_config: rotations that run at inference are not a format that quantkit runs",
            remedy="quantize again without rotations",
        )
    own = as_object(raw.get("extra_config") or {}, "extra_config")
    own = {key: as_object(given, f"extra_config {key!r}") for key, given in own.items()}
    # A layer's full name counts before any pattern that matches it.
    exact = [(re.compile(rf"\A{re.escape(key)}\Z"), _values(given)) for key, given in own.items()]
    loose = [(compile_rule(key), _values(given)) for key, given in own.items()]
    options = Options(read_usual(raw), [*exact, *loose])
    offset = PACKINGS[packing]
    if offset is None:
        return AwqReader(f"AutoRound ({packing})", options)
    return GptqReader(f"AutoRound ({packing})", offset, options)


def _values(given: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A layer's own values; None for one that stays in 16 bits."""
    return None if _bits(given, "bits", 0) >= 16 else given


def _bits(given: Mapping[str, Any], key: str, default: int) -> int:
    return as_integer(given.get(key) or default, key)
