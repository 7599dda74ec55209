"""``quantkit inspect``: what a checkpoint holds, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


#: Options that mean nothing without a sensitivity file.
MEASURING = (
    "data", "schemes", "algorithm", "samples", "seq_len", "seed", "checks", "bits", "recipe",
    "plot", "threads",
)  # fmt: skip


def command(
    context: typer.Context,
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="CKPT", help="A checkpoint folder; with --sensitivity, an original MODEL."
        ),
    ] = None,
    sbom: Annotated[
        Path | None,
        typer.Option(
            "--sbom",
            metavar="FILE",
            help="Write its inputs and their licences as CycloneDX 1.6 JSON.",
        ),
    ] = None,
    sensitivity: Annotated[
        Path | None,
        typer.Option(
            "--sensitivity",
            help="Show this sensitivity file instead; measured first if it is not there.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Text to measure it on, as of calibrate. Repeatable."),
    ] = None,
    schemes: Annotated[
        str | None,
        typer.Option("--schemes", help="Weight-only schemes with commas: w4a16-g64,w5a16-g64."),
    ] = None,
    algorithm: Annotated[
        str, typer.Option("--algorithm", help="The solver whose rounding is judged.")
    ] = "gptq",
    samples: Annotated[int, typer.Option("--samples", min=2, help="Windows.")] = 256,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="Tokens of a window.")] = 128,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws windows and labels.")] = 0,
    checks: Annotated[
        int,
        typer.Option("--checks", min=0, help="Measure so many layers, to judge the estimate by."),
    ] = 0,
    bits: Annotated[
        float | None,
        typer.Option("--bits", min=0, help="Choose schemes within so many bits a weight."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", "-r", help="Write what was chosen as a recipe.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write layers and frontier as an HTML page.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads. Default: torch's choice.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show each layer's scheme, bits and error, the size against theory, and the provenance.

    With --sensitivity: the KL that each layer would cost under each scheme, and the best mixture
    of schemes within a budget of bits.
    """
    from quantkit.errors import UsageError

    if sensitivity is not None:
        from quantkit.cli.sensitivity import Request, show

        if threads:
            import torch

            torch.set_num_threads(threads)
        show(
            Request(
                file=sensitivity,
                model=checkpoint,
                data=tuple(data or ()),
                schemes=schemes,
                solver=algorithm,
                samples=samples,
                seq_len=seq_len,
                seed=seed,
                checks=checks,
                bits=bits,
                recipe=recipe,
                plot=plot,
                as_json=as_json,
            )
        )
        return
    if checkpoint is None:
        raise UsageError("no CKPT", remedy="name a checkpoint folder, or give --sensitivity FILE")
    given = [
        f"--{name.replace('_', '-')}"
        for name in MEASURING
        # typer and click each have an enumeration of sources
        if getattr(context.get_parameter_source(name), "name", None) == "COMMANDLINE"
    ]
    if given:
        raise UsageError(
            f"{' and '.join(given)}: belong to a sensitivity file", remedy="give --sensitivity FILE"
        )
    if sbom is not None:
        _write_sbom(Path(checkpoint), sbom)
    _inspect(Path(checkpoint), as_json)


def _write_sbom(checkpoint: Path, file: Path) -> None:
    from quantkit.checkpoint.write import MANIFEST, read_manifest
    from quantkit.errors import UsageError
    from quantkit.model import hash_file
    from quantkit.results import write_json
    from quantkit.sbom import bill_of_materials

    if file.resolve().parent == checkpoint.resolve():
        raise UsageError(
            f"{file}: a checkpoint holds the files that its manifest lists and no others",
            remedy="write the bill of materials beside it",
        )
    manifest = read_manifest(checkpoint)
    digest = hash_file(checkpoint / MANIFEST)
    with _whole(checkpoint):
        document = bill_of_materials(manifest, checkpoint.resolve().name, digest)
    write_json(file, document)
    typer.echo(f"wrote {file}", err=True)


def _inspect(checkpoint: Path, as_json: bool) -> None:
    from quantkit.checkpoint.describe import describe

    manifest = describe(checkpoint)
    if as_json:
        typer.echo(json.dumps(manifest, indent=1))
        return
    with _whole(checkpoint):
        _show(manifest)


@contextmanager
def _whole(checkpoint: Path) -> Iterator[None]:
    """Say of a manifest that lacks a field, or holds another type there, that it is damaged."""
    from quantkit.checkpoint.write import MANIFEST
    from quantkit.errors import QuantkitError

    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as e:
        raise QuantkitError(
            f"{checkpoint / MANIFEST}: is damaged ({type(e).__name__}: {e})",
            remedy="copy the checkpoint again",
        ) from e


def _show(manifest: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False)  # names are the checkpoint's, never markup
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("layer", "shape", "scheme", "solver"):
        table.add_column(title)
    for title in ("bits", "weight err", "output err"):
        table.add_column(title, justify="right")
    for name, layer in manifest["layers"].items():
        table.add_row(
            name,
            "×".join(map(str, layer["shape"])),
            layer["scheme"],
            layer["solver"] or "–",
            f"{layer['bits']:.3f}",
            _percent(layer["weight_error"]),
            _percent(layer["output_error"]),
        )
    console.print(table)
    _show_ranges(console, manifest)
    if "format" in manifest:
        typer.echo(f"format            {manifest['format']}, of another program: no provenance")
    typer.echo(f"kept              {', '.join(manifest['kept']) or 'none'}")
    typer.echo(
        f"size              {manifest['size_bytes'] / 1e6:.1f} MB of "
        f"{manifest['source_bytes'] / 1e6:.1f} MB "
        f"({manifest['size_bytes'] / manifest['source_bytes']:.1%})"
    )
    typer.echo(f"bits per weight   {manifest['bits_per_weight']:.3f} on the quantized layers")
    if "format" in manifest:
        return
    recipe = manifest.get("recipe", {})
    typer.echo(f"recipe            {recipe.get('name')} sha256 {str(recipe.get('sha256'))[:12]}…")
    typer.echo(f"source weights    sha256 {manifest['source']['hash'][:12]}…")
    data = manifest.get("data")
    if data:
        typer.echo(
            f"calibration data  {data['samples']}×{data['seq_len']} tokens, "
            f"sha256 {data['hash'][:12]}…"
        )
        for source in data["sources"]:
            typer.echo(
                f"                  {source.get('name', 'source')}: {source['tokens']} tokens, "
                f"sha256 {source['sha256'][:12]}…"
            )
    verdict = manifest.get("verdict")
    typer.echo(f"verdict           {verdict['outcome'] if verdict else 'not gated'}")


def _show_ranges(console: Console, manifest: dict[str, Any]) -> None:
    """The range of each static input, and of keys and values; the observer it is from, and the
    error it was chosen by."""
    from rich.table import Table

    layers, caches = manifest["layers"], manifest.get("kv_cache", {}).get("ranges", {})
    static = {name: x["input_range"] for name, x in layers.items() if "input_range" in x}
    for name, sides in caches.items():
        static |= {f"{name}.k_scale": sides["keys"], f"{name}.v_scale": sides["values"]}
    if not static:
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("static range of", no_wrap=True)
    table.add_column("observer")
    for title in ("low", "high", "error", "worst candidate"):
        table.add_column(title, justify="right")
    for name, found in static.items():
        errors = found["errors"]
        table.add_row(
            name,
            found["observer"],
            f"{found['low']:.4g}",
            f"{found['high']:.4g}",
            _percent(errors.get(found["observer"])),
            _percent(max(errors.values(), default=None)) if len(errors) > 1 else "–",
        )
    console.print(table)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"
