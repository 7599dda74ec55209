"""``quantkit bench``: how fast it is on this machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from quantkit.cli.kernels import Kernels, KernelsOption

app = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure speed on this machine."""


@app.command()
def decode(
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
    kernels: KernelsOption = Kernels.native,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Tokens per second of prefill and decode, through the server's own loop."""
    import torch

    from quantkit.models.load import load_runtime
    from quantkit.serve.measure import measure_decode

    if threads:
        torch.set_num_threads(threads)
    typer.echo(f"loading {checkpoint}", err=True)
    runtime = load_runtime(checkpoint, kernels=kernels.value, device=device)
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
