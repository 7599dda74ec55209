"""What a run was asked to do, and everything that can be checked before any work."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit import gate
from quantkit import model as models
from quantkit.baseline import check_baseline
from quantkit.batches import Batch, CalibrationData, calibration_batches
from quantkit.checkpoint.write import MANIFEST
from quantkit.data.contamination import overlap, words
from quantkit.data.held_out import join_held_out, read_held_out
from quantkit.data.rows import Document
from quantkit.data.sources import Source, iter_documents, iter_texts
from quantkit.data.tokens import TokenBatches
from quantkit.documents import positions_apart
from quantkit.errors import QuantkitError, UsageError
from quantkit.evals.divergence import cut_windows
from quantkit.evals.evaluate import harness
from quantkit.evals.scorers import SCORERS
from quantkit.evals.suite import Suite
from quantkit.evals.suites import find_suites, installed_folder, load_suite, load_suites
from quantkit.gate.policy import LimitGate, Policy, TaskGate
from quantkit.inputs import load_inputs
from quantkit.limits import check_limits
from quantkit.models.load import check_target
from quantkit.parallel import ALONE, World
from quantkit.plan import Plan, make_plan
from quantkit.recipe import Recipe
from quantkit.results import Results
from quantkit.work import LOCK

#: In front of a suite's name, where its traffic is meant.
EVALS = "evals:"

#: Share of the held-out words that may stand in calibration text, too: headings and greetings
#: are alike by chance, a copy is not.
LEAK_BOUND = 0.01

#: Held-out documents of fewer words are compared by no one: they are alike by chance.
LEAST_WORDS = 8


@dataclass(frozen=True)
class Job:
    """What one run was asked to do.

    Attributes:
        source: MODEL.
        recipe: with the command line's overrides applied.
        out: the checkpoint's final folder; None for a job that is only prepared.
        suites: validated suites to score.
        text: held-out text file, or None for the installed suites' traffic that the recipe
            does not calibrate on.
        baseline: results of the original model, to not score it again.
        gated: False promotes without scoring.
        resume: continue from finished blocks.
        device: ``cpu`` or ``cuda``.
        kernels: what the artifact is judged in.
        activation_memory: bytes of hidden states that calibration may hold; None for all.
        seq_len, max_tokens: windows of held-out text.
    """

    source: str
    recipe: Recipe
    out: Path | None
    suites: tuple[Suite, ...] = ()
    text: Path | None = None
    baseline: Path | None = None
    gated: bool = True
    resume: bool = False
    device: str = "cpu"
    kernels: str = "native"
    seq_len: int = 1024
    max_tokens: int | None = None
    activation_memory: int | None = None

    @property
    def folder(self) -> Path:
        """OUT. Raises UsageError when there is none."""
        if self.out is None:
            raise UsageError("no output folder", remedy="give -o OUT, or --dry-run")
        return self.out

    def beside(self, suffix: str) -> Path:
        """``OUT.suffix``."""
        return self.folder.with_name(f"{self.folder.name}.{suffix}")


@dataclass(frozen=True)
class Prepared:
    """A job whose inputs are loaded and checked; nothing has been written yet.

    ``text`` is what to measure perplexity and divergence on, ``baseline`` the job's: both None
    for a job that is not gated. ``batches`` are the inputs of a model that reads more than the
    windows of ``tokens``.
    """

    job: Job
    source: models.SourceModel
    plan: Plan
    tokens: TokenBatches | None
    policy: Policy | None
    preflight: tuple[gate.Preflight, ...]
    text: str | None
    baseline: Results | None
    load_seconds: float
    batches: Sequence[Batch] = ()

    @property
    def data(self) -> CalibrationData | None:
        """What `quantkit.calibrate.calibrate` reads."""
        if (tokens := self.tokens) is None:
            return None
        share = (
            0.0 if self.batches else self.job.recipe.calibrate.apart
        )  # a recording is read alone
        positions = positions_apart(tokens.starts, share)
        return CalibrationData(tokens.ids, tokens.hash, self.batches, positions, tokens.answers)


def prepare(job: Job, together: World = ALONE) -> Prepared:
    """Load and check everything a run needs, before any work.

    Args:
        job: what was asked for.
        together: the processes that will calibrate. Only the first one needs OUT.

    Raises:
        UsageError: whatever is wrong with the arguments, recipe, data, suites or policy.
        NotComparableError: the baseline is of another model, or of other suites or text.
        QuantkitError: a damaged model, or calibration data that holds eval items.
    """
    began = time.monotonic()
    if job.out is not None and together.leads:
        _check_out(job)
    check_target(job.kernels, job.device)
    _check_scorers(job.suites)
    policy, preflights = _policy(job)
    # Files are read before the model: their mistakes cost seconds, a model costs minutes.
    documents = _held_out(job, policy) if policy is not None else []
    baseline = None
    if job.baseline is not None and policy is not None:
        baseline = Results.load(job.baseline)
    source = models.load_source(job.source, device=job.device)
    if job.gated and policy is not None:
        models.require_logits(source.model.config, "gates score")
    text = windows = None
    if documents:
        text = join_held_out(documents, source.tokenizer)
        windows = cut_windows(source.tokenizer, text, job.seq_len, job.max_tokens)
    if job.baseline is not None and baseline is not None and policy is not None:
        check_baseline(
            baseline,
            job.baseline,
            policy,
            fingerprint={**source.identity, **harness()},
            suites=job.suites,
            windows=windows,
        )
    calibration = job.recipe.calibrate
    samples, seq_len = calibration.samples, calibration.seq_len
    plan = make_plan(job.recipe, source.model, samples=samples, seq_len=seq_len)
    tokens: TokenBatches | None = None
    batches: list[Batch] = []
    sources = data_sources(job.recipe)
    if sources:
        tokens, batches = load_inputs(
            sources,
            source,
            calibration,
            answers=plan.distill is not None and plan.distill.options["answers"] > 1,
        )
        _check_contamination(sources, job.suites)
        if text is not None:
            assert windows is not None
            _check_held_out(sources, documents, windows.numel())
        if len(tokens.ids) != samples:
            plan = make_plan(job.recipe, source.model, samples=len(tokens.ids), seq_len=seq_len)
    elif plan.needs_data:
        raise UsageError("this recipe calibrates, and there is no data", remedy="give --data FILE")
    prepared = Prepared(
        job=job,
        source=source,
        plan=plan,
        tokens=tokens,
        policy=policy,
        preflight=preflights,
        text=text,
        baseline=baseline,
        load_seconds=time.monotonic() - began,
        batches=batches,
    )
    check_limits(
        plan,
        source.model,
        calibration_batches(prepared.data, needed=plan.needs_data, processes=together.size),
        activation_memory=job.activation_memory,
        all_experts=calibration.all_experts,
        together=together,
    )
    return prepared


def data_sources(recipe: Recipe) -> list[Source]:
    """The recipe's data, with ``evals:NAME`` turned into that suite's traffic file."""
    sources = []
    for spec in recipe.calibrate.data:
        path = spec.path
        if path.startswith(EVALS):
            path = str(suite_traffic(path.removeprefix(EVALS)))
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


def _policy(job: Job) -> tuple[Policy | None, tuple[gate.Preflight, ...]]:
    """The recipe's gates, and what can be known of their power before any work."""
    if not job.gated:
        return None, ()
    recipe = job.recipe
    if not recipe.gate:
        if not job.suites and job.text is None:
            return None, ()
        raise UsageError("the recipe has no `gate:` section", remedy="add one, or pass --no-gate")
    if job.max_tokens is not None and job.max_tokens < job.seq_len:
        raise UsageError(
            f"{job.max_tokens} held-out tokens are less than one window of {job.seq_len}",
            remedy="raise --eval-tokens or lower --eval-seq-len",
        )
    source = str(recipe.file) if recipe.file else "recipe"
    policy = gate.parse_policy(dict(recipe.gate), source=source, lines=recipe.gate_lines)
    names = {suite.name: suite for suite in job.suites}
    checks = []
    for task_gate in policy.gates:
        if not isinstance(task_gate, TaskGate):
            if task_gate.name.startswith("latency."):
                raise UsageError(
                    f"{source}: {task_gate.name}: a run measures no latency",
                    remedy="hold it with `quantkit gate --timings FILE`",
                )
            continue
        suite = names.get(task_gate.name.rpartition(".")[0])
        if suite is None:
            raise UsageError(
                f"{source}: gate {task_gate.name!r}: no suite of that name is scored",
                remedy="add it to `suites:` or give --suite",
            )
        checks.append(gate.preflight(task_gate.name, suite.n, task_gate.margin))
    return policy, tuple(checks)


def _check_scorers(suites: Sequence[Suite]) -> None:
    """A run neither executes what a model writes nor asks another one."""
    for suite in suites:
        if suite.scoring is not None and suite.scoring.name not in SCORERS:
            raise UsageError(
                f"suite {suite.name}: scorer {suite.scoring.name!r} is not used by a run",
                remedy="calibrate with --no-gate, then `quantkit eval` and `quantkit gate`",
            )


def _held_out(job: Job, policy: Policy) -> list[Document]:
    """Documents for perplexity and divergence that calibration has not seen.

    ``--text`` if given; else the traffic of every installed suite that the recipe does not
    calibrate on. UsageError when a gate needs some and there are none.
    """
    if job.text is not None:
        return read_held_out(job.text)
    folder = installed_folder()
    used = {Path(source.path).resolve() for source in data_sources(job.recipe)}
    documents = [
        document
        for suite in (load_suites([folder]) if folder else ())
        if suite.traffic is not None and suite.traffic.resolve() not in used
        for document in iter_documents(Source(str(suite.traffic)))
    ]
    gates = [g.name for g in policy.gates if isinstance(g, LimitGate) and g.needs_text]
    if not documents and (gates or not job.suites):
        raise UsageError(
            f"there is no held-out text{f' for {gates[0]}' if gates else ''}: the recipe "
            "calibrates on the traffic of every installed suite",
            remedy="give --text FILE",
        )
    return documents


#: What a run writes over, by suffix, and the file that shows it to be an earlier run's. An
#: export that was cut short may hold any file; the work that it came of lies beside it.
_MARKS = {
    "rejected": (MANIFEST, "a quantkit checkpoint"),
    "run": ("run.json", "the folder of a quantkit run"),
    "partial": ("state.json", "unfinished work of quantkit"),
    "staging": ("../{out}.partial/state.json", "an unfinished export of quantkit"),
}


def _check_out(job: Job) -> None:
    try:
        _check_places(job)
    except OSError as e:  # a name that is too long, a folder that may not be searched
        raise UsageError(f"{job.folder}: cannot be used ({e.strerror or e})") from e


def _check_places(job: Job) -> None:
    out = job.folder
    if out.name in ("", ".."):
        raise UsageError(f"{out}: has no name to put others beside", remedy="choose another -o")
    places = {out: (MANIFEST, "a quantkit checkpoint")}
    places |= {job.beside(suffix): mark for suffix, mark in _MARKS.items()}
    for place, (mark, what) in places.items():
        if place.is_symlink():
            # A rename would replace the link and leave what it points to as it was.
            raise UsageError(
                f"{place}: is a symbolic link, and a run replaces whole folders",
                remedy=f"give the folder's own name: -o {os.path.realpath(out)}"
                if place == out
                else "move it away, or choose another -o",
            )
        if (
            place.exists()
            and not (place / mark.format(out=out.name)).exists()
            and any(_entries(place))
        ):
            raise UsageError(
                f"{place}: exists and is not {what}", remedy="move it away, or choose another -o"
            )
    # Folders that are missing are made when there is something to write.
    parent = next(folder for folder in out.resolve().parents if folder.exists())
    try:
        probe = parent / f".{out.name}.probe"
        probe.touch()
        probe.unlink(missing_ok=True)  # another run may have probed, too
    except OSError as e:
        raise UsageError(f"{parent}: cannot be written ({e.strerror})") from e


def _entries(path: Path) -> Sequence[Path]:
    """What would be lost; the lock of a run that was killed is not."""
    return [p for p in path.iterdir() if p.name != LOCK] if path.is_dir() else [path]


def _check_contamination(sources: Sequence[Source], suites: Sequence[Suite]) -> None:
    """Calibration text that holds eval items would flatter the checkpoint."""
    texts = [text for source in sources for text in iter_texts(source)] if suites else []
    for suite in suites:
        items = [
            "\n".join(str(v) for k, v in row.items() if isinstance(v, str) and k != "id")
            for row in suite.rows
        ]
        found = overlap(texts, items)
        if found:
            item = suite.item_id(found[0].eval_index)
            raise QuantkitError(
                f"{len(found)} items of {suite.name} are in the calibration data "
                f"(first: {item}, {found[0].kind})",
                remedy="calibrate on other traffic, or drop those items",
            )


def _check_held_out(sources: Sequence[Source], documents: Sequence[Document], tokens: int) -> None:
    """Held-out text that was calibrated on would show too small a divergence.

    Args:
        sources: of the calibration text.
        documents: held-out ones; of the first of them ``tokens`` tokens are scored.
        tokens: at least as many words are compared.

    Raises:
        QuantkitError: more than `LEAK_BOUND` of the words compared are in calibration documents.
    """
    passages: list[list[str]] = []
    total = 0
    for paragraph in (p for d in documents for p in d.plain().split("\n\n")):
        if total >= tokens:
            break
        found = words(paragraph)
        total += len(found)
        if len(found) >= LEAST_WORDS:
            passages.append(found)
    texts = (text for source in sources for text in iter_texts(source))
    leaked = overlap(texts, [" ".join(passage) for passage in passages])
    share = sum(len(passages[hit.eval_index]) for hit in leaked) / max(total, 1)
    if share > LEAK_BOUND:
        first = " ".join(passages[leaked[0].eval_index][:LEAST_WORDS])
        raise QuantkitError(
            f"{share:.0%} of the held-out text is in the calibration data, too "
            f"(first: {first!r} …, {leaked[0].kind})",
            remedy="give other text by --text, or calibrate on other data",
        )
