"""``quantkit explain``: which layers a failed gate is to be blamed on, and what would mend it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from quantkit.blame import Blame, Restored
    from quantkit.models.runtime import Runtime
    from quantkit.results import Flip, Results

#: Flips that are printed side by side.
SHOWN = 5


def command(
    results: Annotated[
        Path,
        typer.Argument(
            metavar="RESULTS", help="The OUT.run folder of a calibration, or a results file."
        ),
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="What scored them. Default: the run's own."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="The original model. Default: the run's own."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", help="The original's results. Default: the run's own."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Measure on this text instead of the flipped items."),
    ] = None,
    layers: Annotated[
        int, typer.Option("--layers", min=1, help="How many layers to put back.")
    ] = 5,
    items: Annotated[
        int, typer.Option("--items", min=1, help="Flipped items, or windows of --text, at most.")
    ] = 32,
    seq_len: Annotated[
        int, typer.Option("--seq-len", min=2, help="Tokens of a window or an item at most.")
    ] = 256,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads. Default: torch's choice.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the recipe that would mend it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Name the layers whose restoration recovers the most, and the rules that would do it.

    Every block, then every layer of the worst blocks, is put back in 16 bits, one at a time, and
    the KL from the original measured again on the items that flipped. Nothing is estimated.

    Exit codes: 0 done, 2 usage, 4 runtime, 5 the results are of another checkpoint, or not
    comparable with the baseline.
    """
    from quantkit.results import check_writable, write_text

    if output is not None:
        check_writable(output)
    case = _read_case(results, checkpoint, reference, baseline)

    import torch

    from quantkit.blame import find_blame
    from quantkit.cli.progress import reporter
    from quantkit.models.load import load_runtime

    if threads:
        torch.set_num_threads(threads)
    flips = case.flips()
    typer.echo(f"loading {case.checkpoint} and {case.reference}", err=True)
    candidate = load_runtime(case.checkpoint, kernels="modules")
    _require_same(candidate, case.candidate, case.checkpoint)
    original = load_runtime(case.reference, kernels="modules")
    sequences, source = _sequences(candidate, flips, text, items, seq_len)
    with reporter("explain") as progress:
        blame = find_blame(candidate, original, sequences, count=layers, progress=progress)
    rules = _recipe_lines(candidate, blame)
    try:
        if output is not None:
            write_text(output, "\n".join(rules) + "\n")
    finally:  # a disk that is full by now must not hide what was measured
        if as_json:
            document = {**asdict(blame), "measured_on": source, "keep": _kept(candidate, blame)}
            typer.echo(json.dumps(document, indent=1))
        else:
            _show_flips(flips)
            _show(blame, candidate, source, rules)
    if output is not None and not as_json:
        typer.echo(f"wrote {output}")


@dataclass(frozen=True)
class _Case:
    """What is explained: results, whose they are, and what they are held against."""

    candidate: Results
    baseline: Results | None
    checkpoint: Path
    reference: str

    def flips(self) -> list[Flip]:
        """Items of the suites that both scored, which the original got right and the checkpoint
        got wrong.

        Raises:
            NotComparableError: what was scored differs by more than the model.
        """
        from quantkit import gate

        if self.baseline is None:
            return []
        common = [name for name in self.candidate.tasks if name in self.baseline.tasks]
        if not common:
            return []
        candidate, baseline = (
            replace(side, tasks={name: side.tasks[name] for name in common}, text=None)
            for side in (self.candidate, self.baseline)
        )
        policy = gate.default_policy(candidate, baseline)
        gate.check_comparable(candidate, baseline, policy)
        found = gate.flips(candidate, baseline, policy)
        return [flip for flip in found if flip.direction == "loss"]


def _read_case(
    results: Path, checkpoint: Path | None, reference: str | None, baseline: Path | None
) -> _Case:
    from quantkit.errors import UsageError
    from quantkit.results import Results

    folder = results if results.is_dir() else results.parent
    file = results / "results.json" if results.is_dir() else results
    run = _read_run(folder / "run.json")
    candidate = Results.load(file)
    if checkpoint is None and run:
        checkpoint = Path(run["output"])
        if not checkpoint.exists():  # the run was moved as a whole
            checkpoint = folder.parent / checkpoint.name
    if checkpoint is None:
        raise UsageError(f"{results}: not in a run folder", remedy="give --checkpoint CKPT")
    if reference is None and not run:
        raise UsageError(f"{results}: not in a run folder", remedy="give --reference MODEL")
    if baseline is None and run and (folder / "baseline.json").is_file():
        baseline = folder / "baseline.json"
    return _Case(
        candidate,
        None if baseline is None else Results.load(baseline),
        checkpoint,
        str(run["model"]) if reference is None else reference,
    )


def _read_run(path: Path) -> dict[str, Any]:
    """What a calibration left there; empty where the file is another program's, or absent."""
    from quantkit.results import read_json

    run: Any = read_json(path) if path.is_file() else None
    ours = isinstance(run, dict) and all(isinstance(run.get(k), str) for k in ("output", "model"))
    return run if ours else {}


def _require_same(runtime: Runtime, results: Results, checkpoint: Path) -> None:
    from quantkit.errors import NotComparableError

    for key in ("model", "tokenizer"):
        if runtime.fingerprint.get(key) != results.fingerprint.get(key):
            raise NotComparableError(
                f"{checkpoint}: its {key} hash is not the one of the results",
                remedy="give --checkpoint the one that was scored",
            )


def _sequences(
    runtime: Runtime, flips: list[Flip], text: Path | None, items: int, seq_len: int
) -> tuple[list[list[int]], str]:
    """Token ids to measure on, and where they are from."""
    from quantkit.data.held_out import join_held_out, read_held_out
    from quantkit.errors import UsageError

    tokenizer = runtime.tokenizer
    if text is not None:
        ids: Any = tokenizer.encode(join_held_out(read_held_out(text), tokenizer), verbose=False)
        windows = [ids[i : i + seq_len] for i in range(0, min(len(ids), items * seq_len), seq_len)]
        return windows, f"{len(windows)} windows of {text}"
    if not flips:
        raise UsageError(
            "no item flipped from right to wrong, so that there is nothing to measure on",
            remedy="give --text FILE, or --baseline with the original's results",
        )
    chosen = flips[:items]
    encoded: list[Any] = [
        tokenizer.encode(f"{flip.prompt} {flip.target}", verbose=False) for flip in chosen
    ]
    # The end of a long prompt is what the answer hangs on.
    return [ids[-seq_len:] for ids in encoded], f"{len(chosen)} items that flipped to wrong"


def _kept(runtime: Runtime, blame: Blame) -> list[str]:
    """Patterns of a recipe's ``keep`` that would do what the last of the chosen did."""
    names = dict.fromkeys(r.name for r in blame.chosen)
    patterns = [f"{name}.*" if blame.whole_blocks else name for name in names]
    return [*runtime.manifest.get("kept", ()), *patterns]


def _recipe_lines(runtime: Runtime, blame: Blame) -> list[str]:
    """The checkpoint's recipe with a ``keep`` that puts the chosen layers back."""
    import yaml

    text = (runtime.manifest.get("recipe") or {}).get("text")
    keep = ["keep:", *(f"  - {json.dumps(name)}" for name in _kept(runtime, blame))]
    if not text:
        return keep
    document = yaml.safe_load(text)
    document.pop("keep", None)
    return [*yaml.safe_dump(document, sort_keys=False).rstrip().splitlines(), *keep]


def _show_flips(flips: list[Flip]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not flips:
        return
    table = Table(box=None, header_style="bold", pad_edge=False, title_justify="left")
    for title in ("item", "prompt ends", "right", "original", "quantized"):
        table.add_column(title, overflow="fold")
    for flip in flips[:SHOWN]:
        shown = (flip.target, flip.baseline_prediction, flip.candidate_prediction)
        cells = [flip.id, "…" + " ".join(flip.prompt.split())[-60:]]
        cells += [" ".join(text.split())[:40] for text in shown]
        # As text: chat templates hold [/INST], which would be read as markup.
        table.add_row(*map(Text, cells))
    Console().print(table)
    typer.echo(f"{len(flips)} items flipped from right to wrong\n")


def _show(blame: Blame, runtime: Runtime, source: str, rules: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    typer.echo(
        f"KL from the original {blame.kl:.4f} nats a token ({source}, {blame.tokens} tokens)"
    )
    if blame.whole_blocks:
        typer.echo(f"only whole blocks can be put back: {blame.whole_blocks}")
    console = Console()
    ranked = blame.layers or sorted(blame.blocks, key=lambda r: r.kl)
    for title, rows in (
        ("put back alone", ranked[: 2 * len(blame.chosen)]),
        ("put back together", blame.chosen),
    ):
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column(title, no_wrap=True)
        for column in ("KL", "recovered", "larger by"):
            table.add_column(column, justify="right")
        for i, row in enumerate(rows):
            plus = "+ " if rows is blame.chosen and i else ""
            table.add_row(Text(plus + row.name), *_cells(row, blame.kl, runtime.size_bytes))
        console.print(table)
        typer.echo("")
    typer.echo("A recipe that does it (its solver may then do better than what was measured):\n")
    typer.echo("\n".join(rules))


def _cells(row: Restored, before: float, size: int) -> tuple[str, str, str]:
    recovered = (before - row.kl) / before if before > 0 else 0.0
    return (
        f"{row.kl:.4f}",
        f"{recovered:.1%}",
        f"{row.extra_bytes / 1e6:.1f} MB ({row.extra_bytes / size:+.1%})",
    )
