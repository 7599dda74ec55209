"""``quantkit bench decode CKPT --reference MODEL``: latencies of both, interleaved."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from quantkit.models.runtime import Runtime
    from quantkit.timings import PairedTimings, Timings


def compare(
    load: Callable[[str], Runtime],
    checkpoint: str,
    reference: str,
    *,
    kv_cache_dtype: str,
    prompt_tokens: int,
    new_tokens: int,
    concurrency: int,
    repeats: int,
    prompts: int,
    data: Path | None,
    timings: Path | None,
    as_json: bool,
) -> None:
    """Time a checkpoint and its original on the same prompts; print both and write the file.

    Args:
        load: gives a model to time.
        checkpoint, reference: what to load.
        kv_cache_dtype: of the checkpoint's keys and values; the original keeps its own.
        prompt_tokens: length of random prompts; those of ``data`` are cut to it.
        new_tokens, concurrency, repeats: see `quantkit.serve.latency.measure_pair`.
        prompts: how many.
        data: held-out text whose documents are the prompts; None draws random tokens.
        timings: where to write what `quantkit gate --timings` reads.
        as_json: one JSON document in place of a table.
    """
    import torch

    from quantkit.cli.progress import reporter
    from quantkit.evals.evaluate import cpu_model
    from quantkit.models.kv_dtype import with_kv_dtype
    from quantkit.results import check_writable, write_json
    from quantkit.serve.latency import measure_pair
    from quantkit.timings import PairedTimings, Timed

    if timings is not None:
        check_writable(timings)
    sides = (with_kv_dtype(load(checkpoint), kv_cache_dtype), load(reference))
    # What `quantkit.timings.HOST_KEYS` names.
    host = {
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
    }
    with reporter("bench") as progress:
        times = measure_pair(
            *sides,
            _prompts(sides, prompts, prompt_tokens, data),
            new_tokens=new_tokens,
            concurrency=concurrency,
            repeats=repeats,
            host=host,
            progress=progress,
        )
    ours, theirs = (
        Timed(str(runtime.fingerprint["model"]), str(runtime.fingerprint["kernels"]), side)
        for runtime, side in zip(sides, times, strict=True)
    )
    pair = PairedTimings(ours, theirs)
    try:
        if timings is not None:
            write_json(timings, pair.to_json())
    finally:  # a disk that is full by now must not hide what was measured
        _show(pair, new_tokens, as_json)
    if timings is not None and not as_json:
        typer.echo(f"wrote {timings}")


def _prompts(
    sides: tuple[Runtime, Runtime], count: int, length: int, data: Path | None
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """The same prompts as token ids of each model's own tokenizer."""
    if data is None:
        import torch

        vocab = min(side.model.config.get_text_config().vocab_size for side in sides)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(vocab, (count, length), generator=generator).tolist()
        same = {f"random-{i:03d}": ids for i, ids in enumerate(drawn)}
        return same, same
    from quantkit.data.held_out import join_held_out, read_held_out
    from quantkit.errors import UsageError

    documents = read_held_out(data)
    if len(documents) < count:
        raise UsageError(
            f"{data}: {len(documents)} documents where {count} prompts are asked",
            remedy="give more of them, or a smaller --prompts",
        )
    read: list[dict[str, list[int]]] = []
    for side in sides:
        texts = [join_held_out([document], side.tokenizer) for document in documents[:count]]
        ids: Any = [side.tokenizer.encode(text, verbose=False)[:length] for text in texts]
        read.append({f"document-{i:03d}": tokens for i, tokens in enumerate(ids)})
    return read[0], read[1]


def _show(pair: PairedTimings, new_tokens: int, as_json: bool) -> None:
    from quantkit import gate
    from quantkit.cli.eval import print_table

    ours, theirs = pair.candidate.timings, pair.baseline.timings
    rows: list[list[Any]] = [["measure", "checkpoint", "reference", "ratio", "95 % bounds"]]
    document: dict[str, Any] = {
        "host": dict(ours.host),
        "concurrency": ours.concurrency,
        "prompts": len(ours.ttft),
        "new_tokens": new_tokens,
    }
    for kind in ("ttft", "tpot"):
        bounds = gate.ratio_bounds(gate.log_ratios(getattr(ours, kind), getattr(theirs, kind)))
        milliseconds = [1e3 * _median(side, kind) for side in (ours, theirs)]
        between = "too few prompts"
        if bounds.lower is not None and bounds.upper is not None:
            between = f"{bounds.lower:.3f} … {bounds.upper:.3f}"
        document[kind] = {
            "checkpoint_ms": milliseconds[0],
            "reference_ms": milliseconds[1],
            "ratio": bounds.estimate,
            "lower": bounds.lower,
            "upper": bounds.upper,
        }
        shown = [f"{value:.2f} ms" for value in milliseconds]
        rows.append([kind.upper(), *shown, f"{bounds.estimate:.3f}", between])
    if as_json:
        typer.echo(json.dumps(document))
        return
    print_table(rows)
    where = ", ".join(f"{key} {value}" for key, value in ours.host.items())
    typer.echo(f"{len(ours.ttft)} prompts, {ours.concurrency} in flight; {where}")


def _median(timings: Timings, kind: str) -> float:
    """Median over prompts of each prompt's median seconds."""
    return median(median(seconds) for seconds in getattr(timings, kind).values())
