"""``quantkit serve``: an OpenAI-compatible server for one checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli import engine as engines
from quantkit.cli.kernels import Kernels, KernelsOption
from quantkit.cli.options import refuse
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from quantkit.serve.capture import CaptureConfig

#: The parameters that no other engine reads.
OWN = (
    *("config", "capture", "capture_rate", "capture_patterns", "otlp_endpoint"),
    *("prefill_chunk", "kv_cache_dtype", "prefix_caching", "speculative_tokens"),
    *("threads", "kernels", "device"),
)


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
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="FILE", help="Tiers, tenants, their keys and limits (YAML)."
        ),
    ] = None,
    allow_unauthenticated: Annotated[
        bool,
        typer.Option(
            "--allow-unauthenticated", help="Listen beyond this machine without API keys."
        ),
    ] = False,
    capture: Annotated[
        Path | None,
        typer.Option(
            "--capture",
            metavar="FILE",
            help="Append a redacted sample of the traffic, as JSONL that calibrate reads.",
        ),
    ] = None,
    capture_rate: Annotated[
        float, typer.Option("--capture-rate", help="Share of the requests to capture.")
    ] = 0.01,
    capture_patterns: Annotated[
        Path | None,
        typer.Option(
            "--capture-patterns",
            metavar="FILE",
            help="More to redact: a YAML mapping of names to regular expressions.",
        ),
    ] = None,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            "--otlp-endpoint",
            metavar="URL",
            help="Send OpenTelemetry spans there, e.g. http://localhost:4318/v1/traces.",
        ),
    ] = None,
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
    prefill_chunk: Annotated[
        int,
        typer.Option(
            "--prefill-chunk", min=1, help="Prompt tokens a step may read beside running answers."
        ),
    ] = 256,
    kv_cache_dtype: Annotated[
        str, typer.Option("--kv-cache-dtype", help="auto, fp32, bf16, fp8 or int8.")
    ] = "auto",
    prefix_caching: Annotated[
        bool,
        typer.Option(
            "--prefix-caching/--no-prefix-caching",
            help="Share keys and values between a tenant's prompts that begin alike.",
        ),
    ] = True,
    speculative_tokens: Annotated[
        int,
        typer.Option(
            "--speculative-tokens",
            min=0,
            help="Tokens to guess from the text before and check in one step; 0 guesses none.",
        ),
    ] = 0,
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
    from quantkit.serve.api.middleware import is_loopback

    if config is not None and api_keys is not None:
        raise UsageError(
            "--config and --api-keys were given both", remedy="list the keys in the configuration"
        )
    if not math.isfinite(drain_seconds):
        raise UsageError(
            f"--drain-seconds {drain_seconds} is not a number of seconds",
            remedy="give a large one to wait for long answers",
        )
    closed = config is not None or api_keys is not None
    if not closed and not allow_unauthenticated and not is_loopback(host):
        raise UsageError(
            f"--host {host} is reachable from other machines and there are no API keys",
            remedy="give --api-keys FILE, or --allow-unauthenticated if that is meant",
        )
    if engine is engines.Engine.quantkit:
        engines.check_unused(context)
    else:
        refuse(context, OWN, f"is quantkit's own; {engine} has none", "leave it out")
    if capture is None:
        unused = ("capture_rate", "capture_patterns")
        refuse(context, unused, "nothing is captured", "add --capture FILE")
    if key is not None:
        from quantkit.signature import check_signature

        check_signature(Path(checkpoint), key)
    asked = engines.Asked(engine_python, tensor_parallel, engine_arg or (), engine_timeout)
    if engine is not engines.Engine.quantkit:
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
    from quantkit.serve.config import open_config, read_config
    from quantkit.serve.keys import read_api_keys
    from quantkit.serve.tracing import connect

    if config is not None:
        serving = read_config(config)
    else:
        serving = open_config(read_api_keys(api_keys) if api_keys else ())
    sample = _capture(capture, capture_rate, capture_patterns)
    tracing = connect(otlp_endpoint, Path(checkpoint).name) if otlp_endpoint else None
    with server.bind(host, port) as sock:
        import torch

        from quantkit.models.load import load_runtime
        from quantkit.serve.api.app import create_app
        from quantkit.serve.capture import Capture
        from quantkit.serve.engine import Engine, EngineConfig
        from quantkit.serve.policy.tiered import Tiered
        from quantkit.serve.speculation import SpeculativeConfig

        if threads:
            torch.set_num_threads(threads)
        typer.echo(f"loading {checkpoint}", err=True)
        runtime = load_runtime(checkpoint, kernels=kernels.value, device=device)
        if runtime.fallback:
            typer.echo(f"in transformers' modules: {runtime.fallback}", err=True)
        guesses = (
            SpeculativeConfig(num_speculative_tokens=speculative_tokens)
            if speculative_tokens
            else None
        )
        limits = EngineConfig(
            max_sequences=max_sequences,
            max_queue=2**31,  # admission bounds each tier's; one for all would be one to fill
            max_context=max_context,
            prefill_chunk=prefill_chunk,
            kv_cache_dtype=kv_cache_dtype,
            enable_prefix_caching=prefix_caching,
            speculative_config=guesses,
        )
        loop = Engine(runtime, limits, Tiered(serving.tiers))
        local_only = not closed and not allow_unauthenticated
        captured = Capture(sample) if sample else None
        app = create_app(
            loop.start(),
            access=serving,
            capture=captured,
            tracing=tracing,
            local_only=local_only,
        )

        def announce() -> None:
            address = server.url(sock)
            context = loop.capacity.max_context
            typer.echo(f"serving {runtime.name} at {address} (context {context} tokens)", err=True)
            if as_json:
                ready = {"url": address, "model": runtime.name, "max_context": context}
                typer.echo(json.dumps(ready))

        try:
            code = server.serve(app, loop, sock, drain_seconds=drain_seconds, on_ready=announce)
        finally:
            if captured is not None:
                captured.close()
    raise typer.Exit(code)


def _capture(path: Path | None, rate: float, patterns: Path | None) -> CaptureConfig | None:
    from quantkit.serve.capture import CaptureConfig
    from quantkit.serve.redaction import PATTERNS, read_patterns

    if path is None:
        return None
    own = read_patterns(patterns) if patterns else PATTERNS
    return CaptureConfig(path, rate, patterns=own)
