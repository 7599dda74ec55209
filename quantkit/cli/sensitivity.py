"""``quantkit inspect --sensitivity``: measure or read a sensitivity file, choose, and show."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from quantkit.mixture import Mixture
    from quantkit.sensitivity import Sensitivity


@dataclass(frozen=True)
class Request:
    """The options of `quantkit inspect` that belong to a sensitivity file.

    Attributes:
        file: the sensitivity file.
        model: MODEL, or None to only read the file.
        data: text to measure on; empty to only read the file.
        schemes: names; None for `mixture.CANDIDATES`.
        solver, samples, seq_len, seed, checks: see `measurement.measure_sensitivity`.
        bits: budget a weight of a mixture, or None.
        recipe: where to write the mixture's recipe.
        plot: where to write the page.
        as_json: one document on stdout.
    """

    file: Path
    model: str | None
    data: Sequence[str]
    schemes: str | None
    solver: str
    samples: int
    seq_len: int
    seed: int
    checks: int
    bits: float | None
    recipe: Path | None
    plot: Path | None
    as_json: bool


def show(request: Request) -> None:
    """Measure what is not there yet, choose, write and print.

    Raises:
        UsageError: arguments that do not go together.
        NotComparableError: the file is of another model, data, schemes or settings.
    """
    from quantkit import mixture as mixtures
    from quantkit.errors import UsageError
    from quantkit.report.sensitivity import render_sensitivity
    from quantkit.results import check_writable, write_text

    if request.bits is not None and not math.isfinite(request.bits):
        raise UsageError(f"--bits {request.bits}: not a number of bits", remedy="e.g. --bits 4.5")
    if request.recipe is not None and request.bits is None:
        raise UsageError(f"--recipe {request.recipe}: nothing is chosen", remedy="give --bits too")
    for path in (request.file, request.recipe, request.plot):
        if path is not None and not path.is_file():
            check_writable(path)
    sensitivity = _sensitivity(request)
    mixture = None
    if request.bits is not None:
        mixture = mixtures.choose_mixture(sensitivity, request.bits)
    if request.recipe is not None and mixture is not None:
        write_text(request.recipe, mixtures.write_recipe(sensitivity, mixture))
    if request.plot is not None:
        write_text(request.plot, render_sensitivity(_page(sensitivity, mixture)))
    if request.as_json:
        typer.echo(json.dumps(_document(sensitivity, mixture), indent=1))
        return
    _print(sensitivity, mixture)
    for what, path in (("recipe", request.recipe), ("page", request.plot)):
        if path is not None:
            typer.echo(f"{what:<18}{path}")


def _sensitivity(request: Request) -> Sensitivity:
    """Read the file if it is of what was asked for, else measure and write it."""
    from quantkit.errors import UsageError
    from quantkit.sensitivity import Sensitivity

    saved = Sensitivity.load(request.file) if request.file.exists() else None
    if request.model is None or not request.data:
        if saved is None:
            raise UsageError(
                f"{request.file}: no such file, and nothing to measure it on",
                remedy="give MODEL and --data FILE",
            )
        if request.model is not None:
            from quantkit import model as models

            folder = models.resolve(request.model)
            files = models.hash_folder(folder)
            saved.require({"weights": models.weight_hash(files)}, request.file)
        return saved

    from quantkit import model as models
    from quantkit.algorithms import SOLVERS
    from quantkit.cli.progress import reporter
    from quantkit.curvature import state_bytes
    from quantkit.data import Source, load_tokens
    from quantkit.job import suite_traffic
    from quantkit.measurement import measure_sensitivity, origin
    from quantkit.mixture import CANDIDATES, candidate
    from quantkit.support import check_measurable

    if request.solver not in SOLVERS:
        raise UsageError(
            f"--algorithm {request.solver}: no such solver", remedy=f"known: {', '.join(SOLVERS)}"
        )
    schemes = list(dict.fromkeys((request.schemes or ",".join(CANDIDATES)).split(",")))
    for label in schemes:
        candidate(label)  # a mistake in a name costs nothing yet
    source = models.load_source(request.model)
    check_measurable(source.model)
    tokens = load_tokens(
        [
            Source(str(suite_traffic(path[6:])) if path.startswith("evals:") else path)
            for path in request.data
        ],
        source.tokenizer,
        samples=request.samples,
        seq_len=request.seq_len,
        seed=request.seed,
        chat_template=source.tokenizer.chat_template is not None,
    )
    settings = (schemes, request.solver, request.seed, request.checks)
    if saved is not None:
        saved.require(origin(source, tokens, *settings), request.file)
        typer.echo(f"{request.file}: measured before, used as it is", err=True)
        return saved
    for warning in tokens.warnings:
        typer.echo(f"warning: {warning}", err=True)
    held = state_bytes(source, *tokens.ids.shape)
    typer.echo(f"working memory     {held / 1e6:.0f} MB of hidden states", err=True)
    found = measure_sensitivity(
        source,
        tokens,
        schemes,
        solver=request.solver,
        seed=request.seed,
        checks=request.checks,
        reporter=reporter,
    )
    found.save(request.file)
    return found


def _document(sensitivity: Sensitivity, mixture: Mixture | None) -> dict[str, Any]:
    from dataclasses import asdict

    document = asdict(sensitivity)
    document["mixture"] = None
    if mixture is not None:
        document["mixture"] = {
            "bits_per_weight": mixture.bits / sensitivity.weights,
            "predicted_kl": mixture.kl,
            "chosen": dict(mixture.chosen),
        }
    return document


def _page(sensitivity: Sensitivity, mixture: Mixture | None) -> Any:
    from quantkit.mixture import best_mixtures, uniform_mixtures
    from quantkit.report.sensitivity import Page, Point, Row

    count = sensitivity.weights
    return Page(
        source=sensitivity.source,
        tokens=f"{sensitivity.samples} windows of {sensitivity.seq_len} tokens",
        solver=str(sensitivity.origin["solver"]),
        schemes=tuple(_by_bits(sensitivity)),
        rows=tuple(
            Row(
                name,
                {scheme: cost.kl for scheme, cost in layer.costs.items()},
                {scheme: cost.bits / layer.weights for scheme, cost in layer.costs.items()},
                None if mixture is None else mixture.chosen[name],
            )
            for name, layer in sensitivity.layers.items()
        ),
        frontier=tuple(best_mixtures(sensitivity)),
        uniform=tuple(
            Point(scheme, m.bits / count, m.kl)
            for scheme, m in uniform_mixtures(sensitivity).items()
        ),
        chosen=None if mixture is None else Point("mixture", mixture.bits / count, mixture.kl),
        checks=()
        if sensitivity.checks is None
        else tuple((c.predicted, c.measured) for c in sensitivity.checks.single),
    )


def _print(sensitivity: Sensitivity, mixture: Mixture | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from quantkit.mixture import uniform_mixtures

    # A pipe has no width, and a folded name cannot be searched for.
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False)
    schemes = _by_bits(sensitivity)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer", overflow="fold")
    for scheme in schemes:
        table.add_column(scheme.replace("a16", ""), justify="right")
    for name, layer in sensitivity.layers.items():
        cells = [Text(name)]
        for scheme in schemes:
            cost = layer.costs.get(scheme)
            text = "–" if cost is None else f"{1e6 * cost.kl:.0f}"
            taken = mixture is not None and mixture.chosen[name] == scheme
            cells.append(Text(text, "bold reverse" if taken else ""))
        table.add_row(*cells)
    console.print(table)
    typer.echo("micronats of KL a token if this layer alone is quantized; standard error: median "
               f"{_median_error(sensitivity):.0%}")  # fmt: skip
    uniform = uniform_mixtures(sensitivity)
    for scheme, m in sorted(uniform.items(), key=lambda item: item[1].bits):
        typer.echo(f"{scheme:<18}{m.bits / sensitivity.weights:.3f} bits, predicted KL {m.kl:.4f}")
    if mixture is not None:
        bits = mixture.bits / sensitivity.weights
        typer.echo(f"{'chosen':<18}{bits:.3f} bits, predicted KL {mixture.kl:.4f}")
    checks = sensitivity.checks
    if checks is not None:
        typer.echo(
            f"{'checked':<18}{len(checks.single)} layers, rank correlation {checks.rank:.3f}; all "
            f"at once: predicted {checks.predicted:.4f}, measured {checks.measured:.4f}"
        )


def _by_bits(sensitivity: Sensitivity) -> list[str]:
    """Names of the schemes, the fewest bits on a layer first."""
    least: dict[str, float] = {}
    for layer in sensitivity.layers.values():
        for scheme, cost in layer.costs.items():
            least[scheme] = min(cost.bits / layer.weights, least.get(scheme, math.inf))
    return sorted(least, key=lambda scheme: (least[scheme], scheme))


def _median_error(sensitivity: Sensitivity) -> float:
    from statistics import median

    errors = [
        cost.error / cost.kl
        for layer in sensitivity.layers.values()
        for cost in layer.costs.values()
        if cost.kl > 0
    ]
    return median(errors) if errors else 0.0
