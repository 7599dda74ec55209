"""One whole run: load → plan → calibrate → export → reload → eval → gate → promote.

`quantkit.job` holds what comes before any work, `quantkit.outcomes` what is left when it ends.
"""

from __future__ import annotations

import gc
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from quantkit import gate
from quantkit import model as models
from quantkit.calibrate import Calibrated, calibrate
from quantkit.checkpoint.write import promote, recover, write_checkpoint, write_manifest
from quantkit.integrity import few_tokens
from quantkit.job import Job, Prepared, prepare
from quantkit.models.load import load_runtime
from quantkit.outcomes import Outcomes, write_run
from quantkit.parallel import ALONE, World
from quantkit.peak import peak_resident
from quantkit.progress import Progress, Reporter, silent, silent_reporter
from quantkit.provenance import provenance
from quantkit.reload import check_layers, check_reload
from quantkit.results import Outcome
from quantkit.scoring import evidence, score
from quantkit.work import empty_work, locked_work

__all__ = ["Job", "Outcomes", "Prepared", "execute", "follow", "prepare"]


def execute(
    prepared: Prepared, reporter: Reporter = silent_reporter, together: World = ALONE
) -> Outcomes:
    """Carry a prepared job out, as the first or only process.

    Raises:
        UsageError: another run is at work on the same OUT.
        QuantkitError: see `quantkit.calibrate.calibrate`; the reload differs; NaN in evals.
    """
    with locked_work(prepared.job.beside("partial")):
        return _execute(prepared, reporter, together)


def follow(prepared: Prepared, together: World) -> None:
    """Calibrate a prepared job's windows for the first process, which does the rest.

    Raises:
        QuantkitError: what ended the first process's calibration, too, or NaN in these windows.
    """
    _calibrate(prepared, silent, together)


def _calibrate(prepared: Prepared, progress: Progress, together: World) -> Calibrated:
    job = prepared.job
    return calibrate(
        prepared.source,
        prepared.plan,
        prepared.data,
        job.beside("partial"),
        observer=job.recipe.calibrate.observer,
        min_expert_tokens=job.recipe.calibrate.min_expert_tokens,
        all_experts=job.recipe.calibrate.all_experts,
        resume=job.resume,
        release=True,
        activation_memory=job.activation_memory,
        progress=progress,
        together=together,
    )


def _execute(prepared: Prepared, reporter: Reporter, together: World) -> Outcomes:
    job, source, plan = prepared.job, prepared.source, prepared.plan
    seconds = {"load": round(prepared.load_seconds, 3)}
    work, staging = job.beside("partial"), job.beside("staging")
    # What a run that was killed left: half an export, or OUT between the renames of `promote`.
    shutil.rmtree(staging, ignore_errors=True)
    for folder in (job.folder, job.beside("rejected")):
        recover(folder)
    began = time.monotonic()
    with reporter("calibrate") as progress:
        calibrated = _calibrate(prepared, progress, together)
    seconds["quantize"] = round(calibrated.solve_seconds, 3)
    seconds["calibrate"] = round(time.monotonic() - began - calibrated.solve_seconds, 3)
    began = time.monotonic()
    try:
        facts = provenance(prepared)
        if calibrated.distilled is not None:
            facts["distill"] = calibrated.distilled.to_json()
        manifest = write_checkpoint(
            staging, source, plan, calibrated.layers, facts, calibrated.caches
        )
        outcomes = _judge(prepared, staging, manifest, calibrated, seconds, began, reporter)
    except BaseException:
        # What failed a check is worth nothing; the finished blocks stay, for --resume.
        shutil.rmtree(staging, ignore_errors=True)
        raise
    empty_work(work)
    return outcomes


def _judge(
    prepared: Prepared,
    staging: Path,
    manifest: dict[str, Any],
    calibrated: Calibrated,
    seconds: dict[str, float],
    began: float,
    reporter: Reporter,
) -> Outcomes:
    job = prepared.job
    _drop_weights(prepared.source)
    calibration_peak = peak_resident()
    candidate_runtime = load_runtime(staging, kernels=job.kernels, device=job.device)
    check_layers(candidate_runtime, prepared.plan)
    check_reload(staging, candidate_runtime, calibrated.probe, job.device)
    seconds["export"] = round(time.monotonic() - began, 3)
    began = time.monotonic()
    verdict = candidate = baseline = None
    if job.gated and prepared.policy is not None:
        candidate, baseline = score(prepared, candidate_runtime, reporter)
        verdict = gate.judge(candidate, baseline, prepared.policy)
        manifest["evals"] = evidence(candidate, baseline)
        manifest["verdict"] = verdict.to_json()
        write_manifest(staging, manifest)
    seconds["eval"] = round(time.monotonic() - began, 3)
    accepted = verdict is None or verdict.outcome is Outcome.PASS
    folder = job.folder if accepted else job.beside("rejected")
    promote(staging, folder)
    outcomes = Outcomes(
        folder=folder,
        verdict=verdict,
        candidate=candidate,
        baseline=baseline,
        manifest=manifest,
        seconds=seconds,
        peak_rss_bytes=calibration_peak,
        warnings=_warnings(prepared, calibrated),
    )
    write_run(outcomes, prepared)
    return outcomes


def _warnings(prepared: Prepared, calibrated: Calibrated) -> tuple[str, ...]:
    found = list(prepared.tokens.warnings) if prepared.tokens else []
    few = few_tokens(prepared.plan, calibrated.layers)
    if few is not None:
        found.append(few)
    if calibrated.distilled is not None and calibrated.distilled.warning is not None:
        found.append(calibrated.distilled.warning)
    return tuple(found)


def _drop_weights(source: models.SourceModel) -> None:
    """Free the modified model: its parameters become empty tensors."""
    for parameter in source.model.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    gc.collect()
