"""``quantkit eval``: score a model on suites and on held-out text."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli import endpoint as elsewhere
from quantkit.cli import engine as engines
from quantkit.cli.kernels import Kernels, KernelsOption, KvDtype, KvDtypeOption

if TYPE_CHECKING:
    from quantkit.data.rows import Document
    from quantkit.evals.scorers import Factory
    from quantkit.models.runtime import Runtime
    from quantkit.results import Results


def command(
    context: typer.Context,
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="[CKPT]", help="A checkpoint folder, a hub id or a .gguf file."),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            help="A suite: its name, a YAML file, a folder of them, or a task, group or tag that "
            "lm-eval knows (lm-eval:NAME where a suite is called the same). Repeatable.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            help="Held-out text for perplexity and divergence: a text file as it is, or rows as "
            "in --data of calibrate, conversations in the chat template.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="The original model: KL and top-1 agreement with it."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the results with a row for each item."),
    ] = None,
    seq_len: Annotated[
        int, typer.Option("--seq-len", min=2, help="Tokens of a window of text.")
    ] = 1024,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=2, help="Tokens of text to read. Default: 24 windows."),
    ] = None,
    max_items: Annotated[
        int | None,
        typer.Option("--max-items", min=1, help="Score a seeded subset of each suite."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Draws the subset.")] = 0,
    kernels: KernelsOption = Kernels.native,
    kv_cache_dtype: KvDtypeOption = KvDtype.auto,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads. Default: torch's choice.")
    ] = None,
    canary: Annotated[
        bool | None,
        typer.Option(
            "--canary/--no-canary",
            help="First check that the model's probabilities mean anything. Default: only of other "
            "engines.",
            show_default=False,
        ),
    ] = None,
    endpoint: elsewhere.EndpointOption = None,
    endpoint_model: elsewhere.EndpointModelOption = None,
    endpoint_key_file: elsewhere.EndpointKeyOption = None,
    endpoint_timeout: elsewhere.EndpointTimeoutOption = 300.0,
    concurrency: elsewhere.ConcurrencyOption = 8,
    engine: engines.EngineOption = engines.Engine.quantkit,
    engine_python: engines.EnginePythonOption = None,
    tensor_parallel: engines.TensorParallelOption = 1,
    engine_arg: engines.EngineArgumentOption = None,
    engine_timeout: engines.EngineTimeoutOption = 900.0,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Only print how many items each gate needs; a CKPT is timed on a few items.",
        ),
    ] = False,
    policy: Annotated[
        Path | None, typer.Option("--policy", help="Gates for --plan and --stop-early.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="A recipe with gates (and suites), as --policy."),
    ] = None,
    flip_rate: Annotated[
        list[float] | None,
        typer.Option("--flip-rate", help="Plan for this share of flipped items. Repeatable."),
    ] = None,
    noise_floor: Annotated[
        Kernels | None,
        typer.Option(
            "--noise-floor",
            help="Score CKPT again with these kernels, in other batches: flips without any "
            "quantization, kept in the results.",
        ),
    ] = None,
    stop_early: Annotated[
        Path | None,
        typer.Option(
            "--stop-early",
            metavar="BASELINE",
            help="Stop a suite as soon as it decides against these results, by an e-process.",
        ),
    ] = None,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code",
            help="Run the model's code for suites scored by `code`: limited, but not a sandbox.",
        ),
    ] = False,
    judge: Annotated[
        str | None,
        typer.Option("--judge", help="OpenAI-compatible base URL for suites scored by `judge`."),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option("--judge-model", help="Name of the judging model.")
    ] = None,
    judge_key: Annotated[
        Path | None, typer.Option("--judge-key", help="File that holds the judge's API key.")
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            "--key", metavar="PUB", help="Load CKPT only if this public key's signature holds."
        ),
    ] = None,
    validate: Annotated[
        bool,
        typer.Option("--validate", help="Only read and check the suites; needs no CKPT."),
    ] = False,
    list_names: Annotated[
        bool,
        typer.Option(
            "--list",
            help="Only print what --suite may name; --suite 'arc*' prints the names that match.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> None:
    """Score a model on suites and on held-out text.

    Perplexity, KL(reference || model) and top-1 agreement are measured on --text; each suite
    gives its metric and a row for each item, which `quantkit gate` compares. With --engine or
    --endpoint another engine runs CKPT: one that is started for it, or a server that is there.

    Exit codes: 0 done, 2 usage, 4 runtime, 5 the reference or the server has another tokenizer, or
    the --stop-early baseline is of other items, 130 interrupted.
    """
    from quantkit.cli.eval_options import check_listing, check_options
    from quantkit.cli.eval_scorers import allowed_scorers
    from quantkit.errors import UsageError
    from quantkit.evals.suites import load_suites
    from quantkit.results import check_writable

    if validate or list_names:
        from quantkit.cli.eval_list import print_names, validate_suites

        check_listing(context)
        (print_names if list_names else validate_suites)(suite or [], as_json)
        return
    check_options(context, plan=plan, checkpoint=checkpoint, endpoint=endpoint)
    if output is not None:
        check_writable(output)
    gates, planned = None, list(suite or ())
    if policy is not None or recipe is not None:
        if not plan and stop_early is None:
            raise UsageError(
                "--policy and --recipe serve --plan and --stop-early",
                remedy="give one of these, or hold the results with `quantkit gate --policy`",
            )
        from quantkit.cli.eval_plan import read_gates

        gates, named = read_gates(policy, recipe)
        planned = planned or list(named)
    if plan:
        from quantkit.cli.eval_plan import print_plan

        if not planned:
            raise UsageError("nothing to plan", remedy="give --suite, or a --recipe with suites")
        suites = load_suites(planned)
        load: Callable[[], Runtime] | None = None
        scorers: dict[str, Factory] = {}
        if checkpoint is not None:
            scorers = allowed_scorers(suites, allow_code, judge, judge_model, judge_key)
            _prepare(checkpoint, key, threads)
            load = functools.partial(_load, checkpoint, kernels.value, device, kv_cache_dtype.value)
        print_plan(
            suites,
            gates,
            max_items=max_items,
            flip_rates=flip_rate or (),
            load=load,
            scorers=scorers,
            as_json=as_json,
        )
        return
    if checkpoint is None:
        raise UsageError("no CKPT", remedy="give a checkpoint, or --validate to check suites")
    suite = planned
    if not suite and text is None:
        raise UsageError("nothing to score", remedy="give --suite or --text")
    if reference is not None and text is None:
        raise UsageError(
            "--reference is compared on text and there is none", remedy="give --text FILE"
        )
    asked = engines.Asked(engine_python, tensor_parallel, engine_arg or (), engine_timeout)
    started = engine is not engines.Engine.quantkit
    if endpoint is not None or started:
        elsewhere.check_options(reference, kernels.value, kv_cache_dtype.value, device, threads)
        if noise_floor is not None:
            raise UsageError(
                "--noise-floor compares kernels of quantkit's own",
                remedy="drop it, or score the checkpoint without --endpoint and --engine",
            )
    # Suites and text are read first: their mistakes cost seconds, a model costs minutes.
    suites = load_suites(suite)
    scorers = allowed_scorers(suites, allow_code, judge, judge_model, judge_key)
    early = None
    if stop_early is not None:
        if noise_floor is not None:
            raise UsageError(
                "--noise-floor scores every item and --stop-early does not", remedy="drop one"
            )
        from quantkit.cli.eval_early import early_stops

        early = early_stops(suites, stop_early, gates, max_items=max_items, seed=seed)
    from quantkit.data.held_out import read_held_out

    documents = None if text is None else read_held_out(text)

    options: dict[str, Any] = {
        "suites": suites,
        "seq_len": seq_len,
        "max_tokens": max_tokens,
        "max_items": max_items,
        "seed": seed,
        "scorers": scorers,
    }
    _prepare(checkpoint, key, threads)
    if endpoint is None and not started:
        runtime = _load(checkpoint, kernels.value, device, kv_cache_dtype.value)
        base = None if reference is None else _load(reference, kernels.value, device)
        name = runtime.name
        results = _score(runtime, base, documents, canary=bool(canary), early=early, **options)
        if noise_floor is not None:
            again = _load(checkpoint, noise_floor.value, device, kv_cache_dtype.value)
            results = _with_noise_floor(results, runtime, again, documents, **options)
    else:
        options |= {"canary": canary is not False, "early": early}
        asking = {"timeout": endpoint_timeout, "concurrency": concurrency}
        if endpoint is not None:
            config = elsewhere.configure(endpoint, endpoint_model, endpoint_key_file, **asking)
            results = elsewhere.score(checkpoint, config, documents, **options)
        else:
            results = elsewhere.score_started(checkpoint, asked, asking, documents, **options)
        name = results.fingerprint["served_model"]
    if any(s.scoring is not None and s.scoring.name == "judge" for s in suites):
        results = replace(results, fingerprint={**results.fingerprint, "judge": judge_model})
    try:
        if output is not None:
            results.save(output)
    finally:  # a disk that is full by now must not hide what took hours
        if as_json:
            typer.echo(json.dumps(results.summary(), allow_nan=False))
        else:
            _print_results(results, name)
    if output is not None and not as_json:
        typer.echo(f"wrote {output}")


def _prepare(checkpoint: str, key: Path | None, threads: int | None) -> None:
    """Before a model is loaded or started: whose it is, and how many threads run it."""
    if key is not None:
        from quantkit.signature import check_signature

        check_signature(Path(checkpoint), key)
    if threads:
        import torch

        torch.set_num_threads(threads)


def _score(
    runtime: Runtime, base: Runtime | None, documents: list[Document] | None, **options: Any
) -> Results:
    """Score a loaded model; ``options``: see `quantkit.evals.evaluate.evaluate`."""
    from quantkit.cli.progress import reporter
    from quantkit.data.held_out import join_held_out
    from quantkit.evals.evaluate import evaluate

    text = None if documents is None else join_held_out(documents, runtime.tokenizer)
    with reporter("eval") as progress:
        return evaluate(runtime, reference=base, text=text, progress=progress, **options)


def _with_noise_floor(
    results: Results,
    runtime: Runtime,
    again: Runtime,
    documents: list[Document] | None,
    **options: Any,
) -> Results:
    """Results with what the same model scores in other kernels and batches."""
    from quantkit.cli.progress import reporter
    from quantkit.data.held_out import join_held_out
    from quantkit.evals.noise_floor import with_noise_floor

    text = None if documents is None else join_held_out(documents, runtime.tokenizer)
    with reporter("noise floor") as progress:
        return with_noise_floor(results, runtime, again, text=text, progress=progress, **options)


def _load(source: str, kernels: str, device: str, kv_cache_dtype: str = "auto") -> Runtime:
    from quantkit import model as models
    from quantkit.models.kv_dtype import with_kv_dtype
    from quantkit.models.load import load_runtime

    typer.echo(f"loading {source}", err=True)
    runtime = load_runtime(source, kernels=kernels, device=device)
    models.require_logits(runtime.model.config, "quantkit eval scores")
    if runtime.fallback:
        typer.echo(f"in transformers' modules: {runtime.fallback}", err=True)
    return with_kv_dtype(runtime, kv_cache_dtype)


# --- output ----------------------------------------------------------------------------------


def _print_results(results: Results, name: str) -> None:
    from quantkit.gate.noise_floor import flip_rate

    doc = results.summary()
    rows: list[list[Any]] = [["measure", "value", "over"]]
    if results.text is not None:
        over = f"{results.text.tokens} tokens"
        for key in ("perplexity", "kl_mean", "kl_p99", "kl_p999", "top1_agreement"):
            if doc[key] is not None:
                rows.append([key, f"{doc[key]:.4f}", over])
    for task, result in results.tasks.items():
        rows.append([f"{task}.{result.metric}", f"{result.value:.4f}", f"{result.n} items"])
        if results.noise is not None:
            over = f"noise floor, {results.noise.kernels}"
            rate = flip_rate(result, results.noise.tasks[task])
            rows.append([f"{task} flips", f"{rate:.4f}", over])
    for group, joint in results.groups.items():
        value = f"{joint['value']:.4f}"
        rows.append([f"{group}.{joint['metric']}", value, f"mean of {joint['tasks']} tasks"])
    # Either may be unknown of a model that runs elsewhere.
    if "size_bytes" in doc["cost"]:
        rows.append(["size", f"{doc['cost']['size_bytes'] / 1e6:.1f} MB", ""])
    if "bits_per_weight" in doc["cost"]:
        rows.append(["bits a weight", f"{doc['cost']['bits_per_weight']:.2f}", ""])
    typer.echo(name)
    print_table(rows)


def print_table(rows: list[list[Any]]) -> None:
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo(line.rstrip())
