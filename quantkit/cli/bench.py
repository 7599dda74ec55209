"""``quantkit bench``: how fast it is on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli import bench_serve
from quantkit.cli.kernels import Kernels, KernelsOption, KvDtype, KvDtypeOption
from quantkit.cli.options import refuse
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from quantkit.models.runtime import Runtime

app = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)
app.command("serve")(bench_serve.command)


@app.callback()
def bench() -> None:
    """Measure speed on this machine."""


@app.command()
def decode(
    context: typer.Context,
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="A checkpoint folder, a hub id or a .gguf file.")
    ],
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=1, help="Length of each prompt.")
    ] = 128,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=1, help="Tokens to decode after it.")
    ] = 128,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences side by side.")] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads. Default: torch's choice.")
    ] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Rounds; the median is reported.")
    ] = 3,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            help="The original: time both on the same prompts, interleaved, TTFT and TPOT.",
        ),
    ] = None,
    timings: Annotated[
        Path | None,
        typer.Option("--timings", help="Write them for `quantkit gate --timings`."),
    ] = None,
    prompts: Annotated[
        int, typer.Option("--prompts", min=1, help="With --reference: how many prompts.")
    ] = 16,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="With --reference: take the prompts from these documents, cut to --prompt-tokens, "
            "in place of random tokens.",
        ),
    ] = None,
    kernels: KernelsOption = Kernels.native,
    kv_cache_dtype: KvDtypeOption = KvDtype.auto,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Tokens per second of prefill and decode, through the server's own loop.

    weight_gb_s is what a step reads of the weights, a second: compare it with the read bandwidth
    that `quantkit bench kernels` prints. With --reference, times to the first token and per token
    after it of both models, --batch requests in flight: what `latency.*` gates are held to.
    """
    import torch

    from quantkit.models.kv_dtype import with_kv_dtype
    from quantkit.serve.measure import measure_decode

    if reference is None:
        pair = ("timings", "data", "prompts")
        refuse(context, pair, "belongs to a comparison of two models", "give --reference MODEL")
    if threads:
        torch.set_num_threads(threads)
    load = partial(_load, kernels=kernels.value, device=device)
    if reference is not None:
        from quantkit.cli.bench_pair import compare

        compare(
            load,
            checkpoint,
            reference,
            kv_cache_dtype=kv_cache_dtype.value,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            concurrency=batch,
            repeats=repeats,
            prompts=prompts,
            data=data,
            timings=timings,
            as_json=as_json,
        )
        return
    runtime = with_kv_dtype(load(checkpoint), kv_cache_dtype.value)
    speed = measure_decode(
        runtime,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        repeats=repeats,
    )
    result = {
        "prefill_tok_s": round(speed.prefill_tok_s, 2),
        "decode_tok_s": round(speed.decode_tok_s, 2),
        "weight_gb_s": None
        if runtime.decoder is None
        else round(runtime.decoder.native.weight_nbytes * speed.decode_tok_s / batch / 1e9, 2),
        "native_share": None if speed.native_share is None else round(speed.native_share, 3),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch": batch,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "model": runtime.name,
        "kernels": runtime.fingerprint.get("kernels", kernels.value),
        "dtype": runtime.fingerprint.get("dtype", str(runtime.model.dtype).removeprefix("torch.")),
        "device": str(runtime.device),
    }
    if as_json:
        typer.echo(json.dumps(result))
        return
    width = max(map(len, result))
    for name, value in result.items():
        typer.echo(f"{name:<{width}}  {value}")


def _load(source: str, *, kernels: str, device: str) -> Runtime:
    from quantkit.models.load import load_runtime

    typer.echo(f"loading {source}", err=True)
    runtime = load_runtime(source, kernels=kernels, device=device)
    if runtime.fallback:
        typer.echo(f"in transformers' modules: {runtime.fallback}", err=True)
    return runtime


@app.command()
def kernels(
    shapes: Annotated[
        str, typer.Option("--shapes", help="Weights, as N x K: 576x576,1536x576.")
    ] = "960x576,3072x576,576x1536,2048x2048",
    rows: Annotated[str, typer.Option("--rows", help="Rows of x: 1,16,512.")] = "1,4,16,512",
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Interleaved rounds; the median is reported.")
    ] = 15,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads. Default: torch's choice.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """GB/s and TOPS of the CPU's linear kernels, beside torch and the machine's measured limits."""
    import torch

    from quantkit import ops
    from quantkit.ops import measure

    if threads:
        torch.set_num_threads(threads)
    weights = [_pair(shape) for shape in shapes.split(",")]
    heights = [_positive(row, "--rows") for row in rows.split(",")]
    machine = measure.limits()
    document: dict[str, Any] = {
        "cpu": measure.cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": ops.get_isa(),
        "read_gb_s": machine.read_bytes / 1e9,
        "bf16_tops": machine.bf16_operations / 1e12,
        "int8_tops": machine.int8_operations / 1e12,
        "timings": [],
    }
    if not as_json:
        typer.echo(f"{document['cpu']}, {document['threads']} threads, {document['isa']}")
        typer.echo(
            f"limits: reads {document['read_gb_s']:.1f} GB/s, torch bf16 "
            f"{document['bf16_tops']:.2f} and int8 {document['int8_tops']:.2f} TOPS\n"
        )
        typer.echo(
            f"{'N x K':>12} {'M':>4}  {'kernel':<16} {'us':>9} {'p10':>8} {'p90':>9} {'GB/s':>6} "
            f"{'TOPS':>6} {'roof':>5} {'x torch':>7}"
        )
    for n, k in weights:
        for m in heights:
            for t in measure.measure(n, k, m, rounds, machine):
                document["timings"].append(asdict(t))
                if not as_json:
                    typer.echo(
                        f"{f'{n} x {k}':>12} {m:>4}  {t.kernel:<16} {t.microseconds:9.1f} "
                        f"{t.p10:8.1f} {t.p90:9.1f} {t.gb_s:6.1f} {t.gflop_s / 1e3:6.3f} "
                        f"{t.roof_share:5.0%} {t.speedup_over_bf16:7.2f}"
                    )
    if as_json:
        typer.echo(json.dumps(document))


def _pair(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2:
        raise UsageError(f"--shapes {text!r}: a weight is N x K, such as 576x1536")
    return _positive(parts[0], "--shapes"), _positive(parts[1], "--shapes")


def _positive(text: str, option: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise UsageError(f"{option} {text!r} is not a positive number")
    return int(text)
