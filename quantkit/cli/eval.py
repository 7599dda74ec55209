"""``quantkit eval``: score a model on suites and on held-out text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.kernels import Kernels, KernelsOption

if TYPE_CHECKING:
    from quantkit.evals.suites import Suite
    from quantkit.models.runtime import Runtime
    from quantkit.results import Results


def command(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="[CKPT]", help="A checkpoint folder, a hub id or a .gguf file."),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite", help="A suite: its name, a YAML file or a folder of them. Repeatable."
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
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads. Default: torch's choice.")
    ] = None,
    canary: Annotated[
        bool,
        typer.Option("--canary", help="First check that the model's probabilities mean anything."),
    ] = False,
    key: Annotated[
        Path | None,
        typer.Option(
            "--key", metavar="PUB", help="Load CKPT only if this public key's signature holds."
        ),
    ] = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="Only check the suites; needs no CKPT.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> None:
    """Score a model on suites and on held-out text.

    Perplexity, KL(reference || model) and top-1 agreement are measured on --text; each suite
    gives its metric and a row for each item, which `quantkit gate` compares.

    Exit codes: 0 done, 2 usage, 4 runtime, 5 the reference has another tokenizer.
    """
    from quantkit.errors import UsageError
    from quantkit.evals.suites import installed_folder, load_suites

    if validate:
        specs = suite or [str(folder) for folder in [installed_folder()] if folder]
        _print_suites(load_suites(specs), as_json)
        return
    if checkpoint is None:
        raise UsageError("no CKPT", remedy="give a checkpoint, or --validate to check suites")
    if not suite and text is None:
        raise UsageError("nothing to score", remedy="give --suite or --text")
    if reference is not None and text is None:
        raise UsageError(
            "--reference is compared on text and there is none", remedy="give --text FILE"
        )
    # Suites and text are read first: their mistakes cost seconds, a model costs minutes.
    suites = load_suites(suite or ())
    from quantkit.data.held_out import join_held_out, read_held_out

    documents = None if text is None else read_held_out(text)

    import torch

    from quantkit.cli.progress import reporter
    from quantkit.evals.evaluate import evaluate

    if threads:
        torch.set_num_threads(threads)
    if key is not None:
        from quantkit.signature import check_signature

        check_signature(Path(checkpoint), key)
    runtime = _load(checkpoint, kernels.value, device)
    passage = None if documents is None else join_held_out(documents, runtime.tokenizer)
    base = None if reference is None else _load(reference, kernels.value, device)
    with reporter("eval") as progress:
        results = evaluate(
            runtime,
            reference=base,
            suites=suites,
            text=passage,
            seq_len=seq_len,
            max_tokens=max_tokens,
            max_items=max_items,
            seed=seed,
            canary=canary,
            progress=progress,
        )
    if output is not None:
        results.save(output)
    if as_json:
        typer.echo(json.dumps(results.summary(), allow_nan=False))
    else:
        _print_results(results, runtime.name, output)


def _load(source: str, kernels: str, device: str) -> Runtime:
    from quantkit.models.load import load_runtime

    typer.echo(f"loading {source}", err=True)
    runtime = load_runtime(source, kernels=kernels, device=device)
    if runtime.fallback:
        typer.echo(f"in transformers' modules: {runtime.fallback}", err=True)
    return runtime


# --- output ----------------------------------------------------------------------------------


def _print_suites(suites: list[Suite], as_json: bool) -> None:
    rows = [
        {
            "suite": s.name,
            "items": s.n,
            "metric": s.metric,
            "kind": s.output_type,
            "slices": len({row.get(s.slice) for row in s.rows}) if s.slice else 0,
            "hash": s.hash,
            "file": str(s.path),
        }
        for s in suites
    ]
    if as_json:
        typer.echo(json.dumps({"suites": rows}))
        return
    shown = [{**row, "hash": str(row["hash"])[:12]} for row in rows]
    _print_table([list(shown[0]) if shown else ["no suites"], *(list(r.values()) for r in shown)])


def _print_results(results: Results, name: str, output: Path | None) -> None:
    doc = results.summary()
    rows: list[list[Any]] = [["measure", "value", "over"]]
    if results.text is not None:
        over = f"{results.text.tokens} tokens"
        for key in ("perplexity", "kl_mean", "kl_p99", "kl_p999", "top1_agreement"):
            if doc[key] is not None:
                rows.append([key, f"{doc[key]:.4f}", over])
    for task, result in results.tasks.items():
        rows.append([f"{task}.{result.metric}", f"{result.value:.4f}", f"{result.n} items"])
    rows.append(["size", f"{doc['cost']['size_bytes'] / 1e6:.1f} MB", ""])
    rows.append(["bits a weight", f"{doc['cost']['bits_per_weight']:.2f}", ""])
    typer.echo(name)
    _print_table(rows)
    if output is not None:
        typer.echo(f"wrote {output}")


def _print_table(rows: list[list[Any]]) -> None:
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo(line.rstrip())
