"""What a checkpoint came of, as its manifest says it: enough to make it again.

Names and hub ids tell a person where an input came from; hashes decide whether it is the same.
Nothing in it is of this machine but its class (`quantkit.machine`), which the bytes depend on.
"""

from __future__ import annotations

from typing import Any

from quantkit.data.sources import HUB
from quantkit.data.tokens import SourceReport, TokenBatches
from quantkit.job import EVALS, Prepared
from quantkit.machine import library_versions, machine_facts
from quantkit.recipe import Calibration, SourceSpec


def provenance(prepared: Prepared) -> dict[str, Any]:
    """The parts ``recipe``, ``plan``, ``data``, ``machine`` and ``versions`` of a manifest."""
    recipe, tokens = prepared.job.recipe, prepared.tokens
    return {
        "recipe": {
            "name": recipe.file.stem if recipe.file else None,
            "sha256": recipe.sha256,
            "text": recipe.text if recipe.file else None,
        },
        "plan": prepared.plan.digest,
        "data": _data(recipe.calibrate, tokens) if tokens else None,
        "device": prepared.job.device,
        "machine": machine_facts(prepared.source.model.device),
        "versions": library_versions(),
    }


def _data(calibration: Calibration, tokens: TokenBatches) -> dict[str, Any]:
    return {
        "hash": tokens.hash,
        "samples": len(tokens.ids),
        "samples_wanted": calibration.samples,
        "seq_len": calibration.seq_len,
        "seed": calibration.seed,
        "chat_template": calibration.chat_template,
        "sources": [
            _source(spec, report)
            for spec, report in zip(calibration.data, tokens.report, strict=True)
        ],
    }


def _source(spec: SourceSpec, report: SourceReport) -> dict[str, Any]:
    """One source: who it is, how it was read, and what became of each of its rows."""
    public = spec.path.startswith((HUB, EVALS))
    return {
        "name": report.name,
        "id": spec.path if public else None,
        "sha256": report.sha256,
        "license": report.license,
        "weight": spec.weight,
        "field": spec.field,
        "split": spec.split,
        "documents": report.documents_used,
        "documents_held": report.documents,
        "rows_without_words": report.skipped,
        "tokens": report.tokens_used,
        "tokens_short": report.shortfall,
    }
