"""``quantkit serve``: an OpenAI-compatible server for one checkpoint."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import engine as engines
from quantkit.cli.kernels import Kernels, KernelsOption
from quantkit.errors import UsageError


def command(
    context: typer.Context,
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="A checkpoint folder, a hub id or a .gguf file.")
    ],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")
    ] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option("--api-keys", metavar="FILE", help="Accepted keys, one a line.")
    ] = None,
    allow_unauthenticated: Annotated[
        bool,
        typer.Option(
            "--allow-unauthenticated", help="Listen beyond this machine without API keys."
        ),
    ] = False,
    key: Annotated[
        Path | None,
        typer.Option(
            "--key", metavar="PUB", help="Load CKPT only if this public key's signature holds."
        ),
    ] = None,
    max_sequences: Annotated[
        int, typer.Option("--max-sequences", min=1, max=1024, help="Requests that run at once.")
    ] = 16,
    max_context: Annotated[
        int | None,
        typer.Option(
            "--max-context",
            min=2,
            help="Longest prompt and answer together. Default: what model and memory allow.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads. Default: torch's choice.")
    ] = None,
    kernels: KernelsOption = Kernels.native,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    drain_seconds: Annotated[
        float,
        typer.Option(
            "--drain-seconds", min=0, help="How long running requests may finish after a signal."
        ),
    ] = 30.0,
    engine: engines.EngineOption = engines.Engine.quantkit,
    engine_python: engines.EnginePythonOption = None,
    tensor_parallel: engines.TensorParallelOption = 1,
    engine_arg: engines.EngineArgumentOption = None,
    engine_timeout: engines.EngineTimeoutOption = 900.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="When ready, print url and model as JSON on stdout.")
    ] = False,
) -> None:
    """Serve a checkpoint over an OpenAI-compatible API.

    Ctrl-C or SIGTERM lets running requests finish (exit 0; 4 if some outlast the drain); a
    second one ends them (exit 130). With --engine vllm an installed vLLM serves instead.
    """
    if api_keys is None and not allow_unauthenticated and not _is_loopback(host):
        raise UsageError(
            f"--host {host} is reachable from other machines and there are no API keys",
            remedy="give --api-keys FILE, or --allow-unauthenticated if that is meant",
        )
    if engine is engines.Engine.quantkit:
        engines.check_unused(context)
    if key is not None:
        from quantkit.signature import check_signature

        check_signature(Path(checkpoint), key)
    asked = engines.Asked(engine_python, tensor_parallel, engine_arg or (), engine_timeout)
    if engine is not engines.Engine.quantkit:
        if (kernels, device, threads) != (Kernels.native, "cpu", None):
            raise UsageError(
                f"--kernels, --device and --threads are quantkit's own; {engine} chooses its own",
                remedy="leave them out",
            )
        code = engines.serve(
            checkpoint,
            asked,
            host=host,
            port=port,
            api_keys=api_keys,
            max_sequences=max_sequences,
            max_context=max_context,
            drain_seconds=drain_seconds,
            as_json=as_json,
        )
        raise typer.Exit(code)
    # What the user can get wrong is checked before the model takes its minutes to load.
    from quantkit.serve.api import server
    from quantkit.serve.api.middleware import read_api_keys

    keys = read_api_keys(api_keys) if api_keys else ()
    with server.bind(host, port) as sock:
        import torch

        from quantkit.models.load import load_runtime
        from quantkit.serve.api.app import create_app
        from quantkit.serve.engine import Engine, EngineConfig

        if threads:
            torch.set_num_threads(threads)
        typer.echo(f"loading {checkpoint}", err=True)
        runtime = load_runtime(checkpoint, kernels=kernels.value, device=device)
        if runtime.fallback:
            typer.echo(f"in transformers' modules: {runtime.fallback}", err=True)
        loop = Engine(runtime, EngineConfig(max_sequences=max_sequences, max_context=max_context))
        app = create_app(loop.start(), api_keys=keys)

        def announce() -> None:
            address = server.url(sock)
            context = loop.capacity.max_context
            typer.echo(f"serving {runtime.name} at {address} (context {context} tokens)", err=True)
            if as_json:
                ready = {"url": address, "model": runtime.name, "max_context": context}
                typer.echo(json.dumps(ready))

        code = server.serve(app, loop, sock, drain_seconds=drain_seconds, on_ready=announce)
    raise typer.Exit(code)


def _is_loopback(host: str) -> bool:
    """Only this machine can reach it. A name other than localhost may resolve to anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
