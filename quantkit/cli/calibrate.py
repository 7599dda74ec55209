"""``quantkit calibrate``: from a recipe to a gated checkpoint."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.kernels import Kernels, KernelsOption

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quantkit.peak import Peak
    from quantkit.recipe import Recipe
    from quantkit.rotation import PlannedRotation
    from quantkit.run import Outcomes, Prepared


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A hub id, a local folder or a .gguf file. Default: the recipe's.",
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="An installed recipe's name, or a YAML file.")
    ] = "w4a16-gptq",
    out: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="The checkpoint's folder.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="Calibration traffic: JSONL, chat logs, text, a data set, or evals:SUITE. "
            "Repeatable; replaces the recipe's.",
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option("--suite", help="Score these suites too, named as in eval. Repeatable."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Held-out text for KL and perplexity."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="Calibration windows.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", min=2, help="Tokens of a calibration window.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Draws the calibration windows.")
    ] = None,
    eval_seq_len: Annotated[
        int, typer.Option("--eval-seq-len", min=2, help="Tokens of a window of held-out text.")
    ] = 1024,
    eval_tokens: Annotated[
        int | None, typer.Option("--eval-tokens", min=2, help="Tokens of held-out text to score.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline", help="Results of the original on the same suites and text, to reuse."
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads. Default: torch's choice.")
    ] = None,
    kernels: KernelsOption = Kernels.native,
    activation_memory: Annotated[
        float | None,
        typer.Option(
            "--activation-memory",
            help="GB of hidden states to hold in memory; beyond that they lie on disk, and "
            "calibration takes two to three times as long. Same bytes.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run that was interrupted.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
    ] = False,
    gate: Annotated[
        bool, typer.Option("--gate/--no-gate", help="Score the reloaded checkpoint and judge it.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Calibrate, quantize, export, reload, score, gate and promote.

    The plan is printed first. The checkpoint appears at OUT only when every gate passes;
    otherwise it stays at OUT.rejected. OUT.run holds scores, verdict and flips.

    `torchrun --nproc-per-node N -m quantkit calibrate …` shares the calibration windows out; the
    first process solves, writes and judges. torchrun itself ends with 1 whatever that one's code.

    Exit codes: 0 pass, 1 regression, 2 usage, 3 inconclusive, 4 runtime, 5 the baseline is of
    another model, other suites or other text, 130 interrupted.
    """
    from quantkit.errors import UsageError

    if out is None and not dry_run:
        raise UsageError("no output folder", remedy="give -o OUT, or --dry-run")
    unread = {"--baseline": baseline, "--text": text, "--suite": suite}
    if not gate and (given := [option for option, value in unread.items() if value]):
        raise UsageError(
            f"{' and '.join(given)}: nothing is scored with --no-gate",
            remedy="leave one or the other out",
        )
    from quantkit.evals.suites import load_suites

    loaded = _recipe(recipe, data, samples=samples, seq_len=seq_len, seed=seed)
    source = model or loaded.model
    if source is None:
        raise UsageError("no MODEL", remedy="name it on the command line or in the recipe")
    names = dict.fromkeys([*loaded.suites, *(suite or [])]) if gate else {}
    suites = tuple(load_suites(names))

    import torch

    from quantkit.cli.progress import reporter
    from quantkit.parallel import world
    from quantkit.run import Job, execute, follow, prepare

    if threads:
        torch.set_num_threads(threads)
    job = Job(
        source=source,
        recipe=loaded,
        out=out,
        suites=suites,
        text=text,
        baseline=baseline,
        gated=gate,
        resume=resume,
        device=device,
        kernels=kernels.value,
        seq_len=eval_seq_len,
        max_tokens=eval_tokens,
        activation_memory=_bytes(activation_memory),
    )
    with world() as together:
        prepared = together.first_before_others(lambda: prepare(job, together))
        if not together.leads:
            if not dry_run:
                follow(prepared, together)
            return
        if not as_json or not dry_run:
            _show_plan(prepared, together.size)
        if dry_run:
            if as_json:
                document = prepared.plan.to_json()
                if device == "cpu":
                    document["peak"] = _peak(prepared).to_json()
                typer.echo(json.dumps(document, indent=1))
            return
        outcomes = execute(prepared, reporter, together)
    if as_json:
        typer.echo(json.dumps(outcomes.to_json(), indent=1))
    else:
        _show_outcomes(outcomes)
    if outcomes.verdict is not None:
        raise typer.Exit(outcomes.verdict.exit_code)


def _bytes(gigabytes: float | None) -> int | None:
    """Of ``--activation-memory``. UsageError for none or without end."""
    from quantkit.errors import UsageError

    if gigabytes is None:
        return None
    if not 0 < gigabytes * 1e9 < math.inf:
        raise UsageError(
            f"--activation-memory {gigabytes:g}: not a number of GB above 0",
            remedy="leave it out to hold all hidden states in memory",
        )
    return int(gigabytes * 1e9)


def _recipe(name: str, data: list[str] | None, **overrides: int | None) -> Recipe:
    """The recipe with the command line's data and numbers, where it gives some."""
    from dataclasses import replace

    from quantkit.algorithms import KNOWN
    from quantkit.observers import OBSERVER_OPTIONS
    from quantkit.recipe import SourceSpec, load_recipe

    recipe = load_recipe(name, known_algorithms=KNOWN, known_observers=OBSERVER_OPTIONS)
    calibration = recipe.calibrate
    if data:
        calibration = replace(calibration, data=tuple(SourceSpec(path) for path in data))
    given: dict[str, Any] = {key: value for key, value in overrides.items() if value is not None}
    return replace(recipe, calibrate=replace(calibration, **given))


def _show_plan(prepared: Prepared, processes: int) -> None:
    """The plan, on stderr: stdout belongs to the result."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from quantkit.footprint import spills
    from quantkit.importance import pass_bytes

    # Names of models, layers and files are the user's, never markup.
    plan, console = prepared.plan, Console(stderr=True, markup=False, emoji=False)
    caution = ("warning", "yellow")
    console.print(
        Text.assemble(("Plan", "bold"), f" for {prepared.job.source}, {plan.blocks} blocks")
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("scheme", "what", "algorithm"):
        table.add_column(title)
    for title in ("layers", "weights", "bits/weight"):
        table.add_column(title, justify="right")
    for scheme, steps, layers in plan.groups():
        weights = sum(layer.weights for layer in layers)
        bits = sum(layer.scheme.weight.stored_bits(layer.shape) for layer in layers) / weights
        table.add_row(
            scheme.name,
            scheme.describe(),
            steps,
            str(len(layers)),
            f"{weights / 1e6:.1f} M",
            f"{bits:.3f}",
        )
    console.print(table)
    console.print(f"kept as they are   {_kept(plan.kept) or 'none'}")
    if plan.rotation is not None:
        console.print(f"rotation           {_rotated(plan.rotation)}")
    if plan.folds:
        console.print(f"scalings           {len(plan.folds)} inputs, folded into their producers")
    for reason, labels in _by_reason(plan.unscaled).items():
        more = f" and {len(labels) - 1} more" if labels[1:] else ""
        console.print(Text.assemble(("not scaled", "yellow"), f": {labels[0]}{more}: {reason}"))
    console.print(
        f"size               {plan.source_bytes / 1e6:.1f} MB → {plan.size_bytes / 1e6:.1f} MB "
        f"({plan.size_bytes / plan.source_bytes:.1%})"
    )
    console.print(
        f"working memory     {plan.activation_bytes / 1e6:.0f} MB of activations "
        f"({plan.spilled_bytes / 1e6:.0f} MB with hidden states on disk), "
        f"{plan.block_bytes / 1e6:.0f} MB a block"
    )
    if spills(plan, prepared.job.activation_memory):
        console.print("                   hidden states go to disk, passes are repeated")
    if plan.needs_fisher:
        console.print(f"Fisher pass        {pass_bytes(plan) / 1e6:.0f} MB beside the whole model")
    if prepared.job.device == "cpu":
        peak = _peak(prepared)
        phases = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in peak.phases.items())
        console.print(f"peak memory        {peak.bytes / 1e9:.2f} GB ({phases})")
        if prepared.policy is not None:
            console.print("                   without keys and values of the texts that are scored")
    if prepared.tokens is not None:
        console.print(
            f"calibration        {plan.samples} × {plan.seq_len} tokens"
            + (f" in {processes} processes" if processes > 1 else "")
            + _apart(prepared)
            + ("" if plan.needs_data else " (this recipe needs none: they only measure errors)")
        )
        for source in prepared.tokens.report:
            console.print(
                f"  {source.name}: {source.tokens_used:,} tokens from "
                f"{source.documents_used} of {source.documents} documents ({source.share:.0%})"
            )
        for warning in prepared.tokens.warnings:
            console.print(Text.assemble(caution, f": {warning}"))
    if prepared.policy is not None:
        limits = ", ".join(gate.name for gate in prepared.policy.gates)
        console.print(f"gates              {limits}")
        for check in prepared.preflight:
            if check.message:
                console.print(Text.assemble(caution, f": {check.message}"))


def _peak(prepared: Prepared) -> Peak:
    from quantkit.footprint import spills
    from quantkit.peak import peak_memory

    spilled = spills(prepared.plan, prepared.job.activation_memory)
    data = prepared.tokens is not None
    return peak_memory(
        prepared.plan,
        prepared.source.model,
        data=data,
        spilled=spilled,
        gated=prepared.policy is not None,
    )


def _kept(names: Sequence[str]) -> str:
    """Layers in the model's dtype; those of a list of blocks, such as a vision tower, as one."""
    parts = Counter(re.split(r"\.\d+\.", name, maxsplit=1)[0] for name in names)
    listed = [f"{part} ({n} layers)" if n > 1 else part for part, n in parts.items()]
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if listed[6:] else "")


def _rotated(rotation: PlannedRotation) -> str:
    """What is rotated, where, and what it costs."""
    what = ["the residual stream"] if rotation.residual else []
    what += ["the heads' values"] if rotation.heads else []
    parts = [f"{' and '.join(what)}, folded into the weights"] if what else []
    if rotation.mlp:
        parts.append(
            f"the inputs of down_proj ({len(rotation.down)}), at inference: quantkit alone"
        )
    if rotation.head_bytes:
        parts.append(f"the head is untied: {rotation.head_bytes / 1e6:.1f} MB more")
    return "; ".join(parts)


def _by_reason(unscaled: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for label, reason in unscaled.items():
        reasons.setdefault(reason, []).append(label)
    return reasons


def _show_outcomes(outcomes: Outcomes) -> None:
    from quantkit import gate

    size, source = outcomes.manifest["size_bytes"], outcomes.manifest["source_bytes"]
    if outcomes.verdict is not None:
        typer.echo(gate.table(outcomes.verdict))
    trained = outcomes.manifest.get("distill")
    if trained is not None:
        done = "distilled" if trained["kept"] else "distillation undone"
        typer.echo(
            f"{done}: KL on {trained['held_windows']} windows that were held back "
            f"{trained['kl_before']:.4f} → {trained['kl_after']:.4f}"
        )
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in outcomes.seconds.items())
    typer.echo(
        f"{outcomes.folder}: {size / 1e6:.1f} MB of {source / 1e6:.1f} MB, "
        f"{outcomes.manifest['bits_per_weight']:.3f} bits/weight"
    )
    typer.echo(f"{seconds}; peak {outcomes.peak_rss_bytes / 1e9:.2f} GB")


def _apart(prepared: Prepared) -> str:
    """How many windows have their documents read apart, for the plan."""
    share = prepared.job.recipe.calibrate.apart
    if not share or prepared.batches:
        return ""
    return ", documents read apart" + ("" if share == 1 else f" in {share:.0%} of the windows")
