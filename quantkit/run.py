"""One whole run: load → plan → calibrate → export → reload → eval → gate → promote.

A run leaves, beside the checkpoint ``OUT``, a folder ``OUT.run`` with everything a person
or `quantkit report` may want to read::

    run.json       times, dates, machine, peak memory: all that may differ between two runs
    results.json   the checkpoint's scores, a row an item
    baseline.json  the original's scores on the same items
    gate.json      the verdict
    flips.jsonl    items whose answer changed
"""

from __future__ import annotations

import gc
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from quantkit import gate
from quantkit import model as models
from quantkit.calibrate import CalibrationData, Probe, calibrate
from quantkit.checkpoint.write import promote, write_checkpoint, write_manifest
from quantkit.data.contamination import overlap
from quantkit.data.render import render
from quantkit.data.sources import Source, iter_documents, iter_texts
from quantkit.data.tokens import TokenBatches, load_tokens
from quantkit.errors import NotComparableError, QuantkitError, UsageError
from quantkit.evals.evaluate import evaluate
from quantkit.evals.suites import Suite, find_suites, installed_folder, load_suite, load_suites
from quantkit.gate.policy import Policy, TaskGate
from quantkit.layers import QuantLinear
from quantkit.models.load import load_runtime
from quantkit.models.runtime import Runtime
from quantkit.paused import head_input
from quantkit.plan import Plan, make_plan
from quantkit.progress import Progress, silent
from quantkit.recipe import Recipe
from quantkit.results import Outcome, Results, Verdict, write_json, write_text

#: ‖reloaded − in memory‖ / ‖in memory‖ of the last hidden states in the reference kernels,
#: which compute what the calibration loop computed: anything but zero is a defect, and this
#: leaves room for a library that sums in another order.
RELOAD_TOLERANCE = 1e-3

#: ‖native − reference‖ / ‖reference‖ of one layer's output. The reference rounds weights and
#: outputs to bf16, which costs 0.2–0.4 %; a wrong scale or code costs 5 % and up.
KERNEL_TOLERANCE = 0.01

Reporter = Callable[[str], AbstractContextManager[Progress]]


def _silent_reporter(title: str) -> AbstractContextManager[Progress]:
    return nullcontext(silent)


@dataclass(frozen=True)
class Job:
    """What one run was asked to do.

    Attributes:
        source: MODEL.
        recipe: with the command line's overrides applied.
        out: the checkpoint's final folder.
        suites: validated suites to score.
        text: held-out text file, or None for the installed suites' traffic that the recipe
            does not calibrate on.
        baseline: results of the original model, to not score it again.
        gated: False promotes without scoring.
        resume: continue from finished blocks.
        device: ``cpu`` or ``cuda``.
        kernels: what the artifact is judged in.
        seq_len, max_tokens: windows of held-out text.
    """

    source: str
    recipe: Recipe
    out: Path
    suites: tuple[Suite, ...] = ()
    text: Path | None = None
    baseline: Path | None = None
    gated: bool = True
    resume: bool = False
    device: str = "cpu"
    kernels: str = "native"
    seq_len: int = 1024
    max_tokens: int | None = None

    def beside(self, suffix: str) -> Path:
        """``OUT.suffix``."""
        return self.out.with_name(f"{self.out.name}.{suffix}")


@dataclass(frozen=True)
class Prepared:
    """A job whose inputs are loaded and checked; nothing has been written yet."""

    job: Job
    source: models.SourceModel
    plan: Plan
    tokens: TokenBatches | None
    policy: Policy | None
    preflight: tuple[gate.Preflight, ...]
    load_seconds: float


@dataclass(frozen=True)
class Outcomes:
    """How a run ended: where the checkpoint is, what it scored, the verdict."""

    folder: Path
    verdict: Verdict | None
    candidate: Results | None
    baseline: Results | None
    manifest: dict[str, Any]
    seconds: dict[str, float]
    peak_rss_bytes: int
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.folder),
            "verdict": str(self.verdict.outcome) if self.verdict else None,
            "checks": self.verdict.to_json()["checks"] if self.verdict else [],
            "size_bytes": self.manifest["size_bytes"],
            "bits_per_weight": self.manifest["bits_per_weight"],
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "results": self.candidate.summary() if self.candidate else None,
            "baseline": self.baseline.summary() if self.baseline else None,
            "warnings": list(self.warnings),
        }


def prepare(job: Job) -> Prepared:
    """Load and check everything a run needs, before any work.

    Raises:
        UsageError: whatever is wrong with the arguments, recipe, data, suites or policy.
        QuantkitError: a damaged model, or calibration data that holds eval items.
    """
    began = time.monotonic()
    _check_out(job.out)
    policy, preflights = _policy(job)
    source = models.load_source(job.source, device=job.device)
    calibration = job.recipe.calibrate
    samples, seq_len = calibration.samples, calibration.seq_len
    plan = make_plan(job.recipe, source.model, samples=samples, seq_len=seq_len)
    tokens = None
    sources = data_sources(job.recipe)
    if sources:
        tokens = load_tokens(
            sources,
            source.tokenizer,
            samples=samples,
            seq_len=seq_len,
            seed=calibration.seed,
            chat_template=calibration.chat_template and source.tokenizer.chat_template is not None,
        )
        _check_contamination(sources, job.suites)
        if len(tokens.ids) != samples:
            plan = make_plan(job.recipe, source.model, samples=len(tokens.ids), seq_len=seq_len)
    elif plan.needs_data:
        raise UsageError("this recipe calibrates, and there is no data", remedy="give --data FILE")
    return Prepared(job, source, plan, tokens, policy, preflights, time.monotonic() - began)


def execute(prepared: Prepared, reporter: Reporter = _silent_reporter) -> Outcomes:
    """Carry a prepared job out.

    Raises:
        QuantkitError: see `quantkit.calibrate.calibrate`; the reload differs; NaN in evals.
    """
    job, source, plan = prepared.job, prepared.source, prepared.plan
    seconds = {"load": round(prepared.load_seconds, 3)}
    work, staging = job.beside("partial"), job.beside("staging")
    shutil.rmtree(staging, ignore_errors=True)
    began = time.monotonic()
    with reporter("calibrate") as progress:
        calibrated = calibrate(
            source,
            plan,
            CalibrationData(prepared.tokens.ids, prepared.tokens.hash) if prepared.tokens else None,
            work,
            observer=job.recipe.calibrate.observer,
            resume=job.resume,
            release=True,
            progress=progress,
        )
    seconds["quantize"] = round(calibrated.solve_seconds, 3)
    seconds["calibrate"] = round(time.monotonic() - began - calibrated.solve_seconds, 3)
    began = time.monotonic()
    try:
        manifest = write_checkpoint(staging, source, plan, calibrated.layers, _provenance(prepared))
        outcomes = _judge(prepared, staging, manifest, calibrated.probe, seconds, began, reporter)
    except BaseException:
        # What failed a check is worth nothing; the finished blocks stay, for --resume.
        shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)
    return outcomes


def _judge(
    prepared: Prepared,
    staging: Path,
    manifest: dict[str, Any],
    probe: Probe,
    seconds: dict[str, float],
    began: float,
    reporter: Reporter,
) -> Outcomes:
    job = prepared.job
    _drop_weights(prepared.source)
    calibration_peak = _peak_rss()
    candidate_runtime = load_runtime(staging, kernels=job.kernels, device=job.device)
    _check_reload(staging, candidate_runtime, probe, job.device)
    seconds["export"] = round(time.monotonic() - began, 3)
    began = time.monotonic()
    verdict = candidate = baseline = None
    if job.gated and prepared.policy is not None:
        candidate, baseline = _score(job, prepared.policy, candidate_runtime, prepared, reporter)
        verdict = gate.judge(candidate, baseline, prepared.policy)
        manifest["evals"] = _evidence(candidate, baseline)
        manifest["verdict"] = verdict.to_json()
        write_manifest(staging, manifest)
    seconds["eval"] = round(time.monotonic() - began, 3)
    accepted = verdict is None or verdict.outcome is Outcome.PASS
    folder = job.out if accepted else job.beside("rejected")
    promote(staging, folder)
    outcomes = Outcomes(
        folder=folder,
        verdict=verdict,
        candidate=candidate,
        baseline=baseline,
        manifest=manifest,
        seconds=seconds,
        peak_rss_bytes=calibration_peak,
        warnings=prepared.tokens.warnings if prepared.tokens else (),
    )
    _write_run(job, outcomes, prepared)
    return outcomes


# --- inputs ------------------------------------------------------------------------------------


def data_sources(recipe: Recipe) -> list[Source]:
    """The recipe's data, with ``evals:NAME`` turned into that suite's traffic file."""
    sources = []
    for spec in recipe.calibrate.data:
        path = spec.path
        if path.startswith("evals:"):
            path = str(suite_traffic(path.removeprefix("evals:")))
        else:
            path = recipe.locate(spec)
        sources.append(Source(path, weight=spec.weight, split=spec.split, field=spec.field))
    return sources


def suite_traffic(name: str) -> Path:
    """The calibration traffic that belongs to a suite. UsageError when it has none."""
    suite = load_suite(find_suites(name)[0])
    if suite.traffic is None:
        raise UsageError(f"evals:{name}: this suite has no traffic file")
    return suite.traffic


def held_out_text(job: Job, tokenizer: Any) -> str | None:
    """Text for perplexity and divergence that calibration has not seen.

    ``--text`` if given; else the traffic of every installed suite that the recipe does not
    calibrate on, rendered as the model would see it.
    """
    template = tokenizer.chat_template is not None
    if job.text is not None:
        if job.text.suffix in (".txt", ".md"):
            return "".join(iter_texts(Source(str(job.text))))
        documents = iter_documents(Source(str(job.text)))
        return "\n".join(render(d, tokenizer, chat_template=template) for d in documents)
    folder = installed_folder()
    if folder is None:
        return None
    used = {Path(source.path).resolve() for source in data_sources(job.recipe)}
    rendered = []
    for suite in load_suites([folder]):
        if suite.traffic is not None and suite.traffic.resolve() not in used:
            for document in iter_documents(Source(str(suite.traffic))):
                rendered.append(render(document, tokenizer, chat_template=template))
    return "\n".join(rendered) or None


def _policy(job: Job) -> tuple[Policy | None, tuple[gate.Preflight, ...]]:
    """The recipe's gates, and what can be known of their power before any work."""
    if not job.gated:
        return None, ()
    recipe = job.recipe
    if not recipe.gate:
        if not job.suites and job.text is None:
            return None, ()
        raise UsageError("the recipe has no `gate:` section", remedy="add one, or pass --no-gate")
    source = str(recipe.file) if recipe.file else "recipe"
    policy = gate.parse_policy(dict(recipe.gate), source=source, lines=recipe.gate_lines)
    names = {suite.name: suite for suite in job.suites}
    checks = []
    for task_gate in policy.gates:
        if not isinstance(task_gate, TaskGate):
            continue
        suite = names.get(task_gate.name.rpartition(".")[0])
        if suite is None:
            raise UsageError(
                f"{source}: gate {task_gate.name!r}: no suite of that name is scored",
                remedy="add it to `suites:` or give --suite",
            )
        checks.append(gate.preflight(task_gate.name, suite.n, task_gate.margin))
    return policy, tuple(checks)


def _check_out(out: Path) -> None:
    if out.exists() and not (out / "quantkit.json").exists() and any(_entries(out)):
        raise UsageError(
            f"{out}: exists and is not a quantkit checkpoint", remedy="choose another -o"
        )
    parent = out.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        probe = parent / f".{out.name}.probe"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise UsageError(f"{parent}: cannot be written ({e.strerror})") from e


def _entries(path: Path) -> Sequence[Path]:
    return list(path.iterdir()) if path.is_dir() else [path]


def _check_contamination(sources: Sequence[Source], suites: Sequence[Suite]) -> None:
    """Calibration text that holds eval items would flatter the checkpoint."""
    for suite in suites:
        items = [
            "\n".join(str(v) for k, v in row.items() if isinstance(v, str) and k != "id")
            for row in suite.rows
        ]
        texts = [text for source in sources for text in iter_texts(source)]
        found = overlap(texts, items)
        if found:
            item = suite.item_id(found[0].eval_index)
            raise QuantkitError(
                f"{len(found)} items of {suite.name} are in the calibration data "
                f"(first: {item}, {found[0].kind})",
                remedy="calibrate on other traffic, or drop those items",
            )


# --- reload ------------------------------------------------------------------------------------


def _check_reload(folder: Path, runtime: Runtime, probe: Probe, device: str) -> None:
    """The files hold what calibration made, and the kernels compute what the files say.

    Raises:
        QuantkitError: they do not.
    """
    reference = load_runtime(folder, kernels="reference", device=device)
    expected = probe.head_input.float().cpu()
    with torch.no_grad():
        got = head_input(reference.model, probe.ids).float().cpu()
        error = float((got - expected).norm() / expected.norm())
        if not error <= RELOAD_TOLERANCE:
            raise QuantkitError(
                f"the reloaded checkpoint's hidden states differ by {error:.2%} from the model "
                "in memory",
                remedy="this is a defect in export or reload; please report it",
            )
        for name, layer in runtime.model.named_modules():
            if not isinstance(layer, QuantLinear) or layer.kernels == "reference":
                continue
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(4, layer.in_features, generator=generator).to(runtime.model.dtype)
            ours = layer(x.to(device)).float()
            theirs = reference.model.get_submodule(name)(x.to(device)).float()
            error = float((ours - theirs).norm() / theirs.norm())
            if not error <= KERNEL_TOLERANCE:
                raise QuantkitError(
                    f"{name}: the native kernel's output differs by {error:.2%} from the reference",
                    remedy="this is a defect in a kernel; run with --kernels reference and "
                    "report it",
                )


def _drop_weights(source: models.SourceModel) -> None:
    """Free the modified model: its parameters become empty tensors."""
    for parameter in source.model.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    gc.collect()


def _peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- scoring -----------------------------------------------------------------------------------


def _score(
    job: Job, policy: Policy, runtime: Runtime, prepared: Prepared, reporter: Reporter
) -> tuple[Results, Results]:
    original = load_runtime(job.source, device=job.device)
    text = held_out_text(job, runtime.tokenizer)
    with reporter("evaluate") as progress:
        candidate = evaluate(
            runtime,
            reference=original if text is not None else None,
            suites=job.suites,
            text=text,
            seq_len=job.seq_len,
            max_tokens=job.max_tokens,
            progress=progress,
        )
    candidate = replace(
        candidate, cost={**candidate.cost, "reference_size_bytes": original.size_bytes}
    )
    if job.baseline is not None:
        baseline = Results.load(job.baseline)
        if baseline.fingerprint.get("model") != original.fingerprint["model"]:
            raise NotComparableError(
                f"{job.baseline}: was scored on another model than {job.source}",
                remedy="score the original with `quantkit eval`",
            )
        return candidate, baseline
    with reporter("evaluate the original") as progress:
        baseline = evaluate(
            original,
            suites=job.suites,
            text=text,
            seq_len=job.seq_len,
            max_tokens=job.max_tokens,
            progress=progress,
        )
    return candidate, baseline


def _evidence(candidate: Results, baseline: Results) -> dict[str, Any]:
    """The scores without anything that differs between machines of one type."""

    def clean(results: Results) -> dict[str, Any]:
        summary = results.summary()
        summary["fingerprint"] = {
            k: v for k, v in summary["fingerprint"].items() if k not in ("host", "model")
        }
        return summary

    return {"candidate": clean(candidate), "baseline": clean(baseline)}


def _provenance(prepared: Prepared) -> dict[str, Any]:
    recipe, tokens = prepared.job.recipe, prepared.tokens
    calibration = recipe.calibrate
    return {
        "recipe": {
            "name": recipe.file.stem if recipe.file else None,
            "sha256": recipe.sha256,
            "text": recipe.file.read_text(encoding="utf-8") if recipe.file else None,
        },
        "plan": prepared.plan.digest,
        "data": {
            "hash": tokens.hash,
            "samples": len(tokens.ids),
            "seq_len": calibration.seq_len,
            "seed": calibration.seed,
            "sources": [
                {"sha256": r.sha256, "documents": r.documents_used, "tokens": r.tokens_used}
                for r in tokens.report
            ],
        }
        if tokens
        else None,
        "versions": {
            "torch": torch.__version__.split("+")[0],
            "transformers": _version("transformers"),
            "compressed-tensors": _version("compressed-tensors"),
        },
    }


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def _write_run(job: Job, outcomes: Outcomes, prepared: Prepared) -> None:
    folder = job.beside("run")
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        **outcomes.to_json(),
        "model": job.source,
        "recipe": str(job.recipe.file) if job.recipe.file else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
        "manifest": outcomes.manifest,
        "plan": prepared.plan.to_json(),
    }
    write_json(folder / "run.json", document)
    if outcomes.candidate is None or outcomes.baseline is None or outcomes.verdict is None:
        return
    outcomes.candidate.save(folder / "results.json")
    outcomes.baseline.save(folder / "baseline.json")
    write_json(folder / "gate.json", outcomes.verdict.to_json())
    assert prepared.policy is not None
    flips = gate.flips(outcomes.candidate, outcomes.baseline, prepared.policy)
    write_text(folder / "flips.jsonl", gate.flips_jsonl(flips))
