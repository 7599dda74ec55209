"""``quantkit serve``: an OpenAI-compatible server for one checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli import engine as engines
from quantkit.cli.kernels import Kernels, KernelsOption, KvDtype, KvDtypeOption
from quantkit.cli.options import refuse
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from quantkit.serve.capture import CaptureConfig
    from quantkit.serve.peer import Peer

PAGE = "Web page"

#: Guesses a step and request where nothing else is said: beyond, few are right.
SPECULATIVE_TOKENS = 4

#: The parameters that no other engine reads.
OWN = (
    *("config", "capture", "capture_rate", "capture_patterns", "otlp_endpoint"),
    *("prefill_chunk", "kv_cache_dtype", "prefix_caching", "speculative_tokens"),
    *("threads", "kernels", "device", "draft", "tool_parser", "reasoning_parser"),
    "stream_interval",
    *("web", "compare_with", "compare_model", "compare_key"),
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
    kv_cache_dtype: KvDtypeOption = KvDtype.auto,
    prefix_caching: Annotated[
        bool,
        typer.Option(
            "--prefix-caching/--no-prefix-caching",
            help="Share keys and values between a tenant's prompts that begin alike.",
        ),
    ] = True,
    speculative_tokens: Annotated[
        int | None,
        typer.Option(
            "--speculative-tokens",
            min=0,
            help="Tokens to guess and check in one step at most, where that pays; 0 guesses none. "
            "Default: 4 in the native decoder.",
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft",
            metavar="CKPT",
            help="A smaller model with the same tokenizer that guesses what CKPT will say.",
        ),
    ] = None,
    tool_parser: Annotated[
        str,
        typer.Option(
            "--tool-parser",
            metavar="NAME",
            help="How the model writes tool calls: hermes, qwen3_coder, llama3_json, mistral, "
            "mistral_args, none, or auto, which goes by its chat template.",
        ),
    ] = "auto",
    reasoning_parser: Annotated[
        str,
        typer.Option(
            "--reasoning-parser",
            metavar="NAME",
            help="How it writes reasoning: think, mistral, none or auto.",
        ),
    ] = "auto",
    stream_interval: Annotated[
        int,
        typer.Option(
            "--stream-interval",
            min=1,
            help="Tokens of a streamed answer that are written together; its first goes out at "
            "once.",
        ),
    ] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads. Default: torch's choice.")
    ] = None,
    kernels: KernelsOption = Kernels.native,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    web: Annotated[
        bool,
        typer.Option(
            "--web/--no-web",
            help="Show a page at /: chat, and live plots of queue and latencies.",
            rich_help_panel=PAGE,
        ),
    ] = True,
    compare_with: Annotated[
        str | None,
        typer.Option(
            "--compare-with",
            metavar="URL",
            help="Let operators see another OpenAI-compatible server's answers beside CKPT's.",
            rich_help_panel=PAGE,
        ),
    ] = None,
    compare_model: Annotated[
        str | None,
        typer.Option(
            "--compare-model",
            metavar="NAME",
            help="The model's name there. Default: the only one.",
            rich_help_panel=PAGE,
        ),
    ] = None,
    compare_key: Annotated[
        Path | None,
        typer.Option(
            "--compare-key-file",
            metavar="FILE",
            help="Holds the other server's API key.",
            rich_help_panel=PAGE,
        ),
    ] = None,
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
    peer = _peer(compare_with, compare_model, compare_key, web=web)
    asked = engines.Asked(engine_python, tensor_parallel, engine_arg or (), engine_timeout)
    if draft is not None and speculative_tokens == 0:
        raise UsageError(
            "--draft guesses tokens and --speculative-tokens 0 allows none",
            remedy="leave one of them out",
        )
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
    from quantkit.serve.chat_formats import check_parsers
    from quantkit.serve.config import open_config, read_config
    from quantkit.serve.keys import read_api_keys
    from quantkit.serve.tracing import connect

    if config is not None:
        serving = read_config(config)
    else:
        serving = open_config(read_api_keys(api_keys) if api_keys else ())
    if peer is not None and not serving.keys and allow_unauthenticated:
        raise UsageError(
            "--compare-with and --allow-unauthenticated let anyone use the other server",
            remedy="give --api-keys FILE",
        )
    if peer is not None and not serving.operators:
        raise UsageError(
            f"--compare-with is for operators, and no tenant of {config} is one",
            remedy="give a tenant 'operator: true'",
        )
    check_parsers(tool_parser, reasoning_parser)
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
        count = speculative_tokens
        if count is None:  # transformers' modules cannot check guesses
            count = 0 if runtime.decoder is None and draft is None else SPECULATIVE_TOKENS
        guesses = SpeculativeConfig(num_speculative_tokens=count) if count else None
        drafting = None
        if draft is not None:
            typer.echo(f"loading {draft}", err=True)
            drafting = load_runtime(draft, kernels=kernels.value, device=device)
        limits = EngineConfig(
            max_sequences=max_sequences,
            max_queue=2**31,  # admission bounds each tier's; one for all would be one to fill
            max_context=max_context,
            prefill_chunk=prefill_chunk,
            kv_cache_dtype=kv_cache_dtype.value,
            enable_prefix_caching=prefix_caching,
            speculative_config=guesses,
        )
        loop = Engine(runtime, limits, Tiered(serving.tiers), drafting)
        local_only = not closed and not allow_unauthenticated
        captured = Capture(sample) if sample else None
        app = create_app(
            loop.start(),
            access=serving,
            capture=captured,
            tracing=tracing,
            local_only=local_only,
            page=web,
            peer=peer,
            tool_parser=tool_parser,
            reasoning_parser=reasoning_parser,
            stream_interval=stream_interval,
        )

        def announce() -> None:
            address = server.url(sock)
            context = loop.capacity.max_context
            typer.echo(f"serving {runtime.name} at {address} (context {context} tokens)", err=True)
            if web:
                typer.echo(f"chat and live plots: {address}/", err=True)
            if as_json:
                ready = {"url": address, "model": runtime.name, "max_context": context}
                typer.echo(json.dumps(ready))

        try:
            code = server.serve(app, loop, sock, drain_seconds=drain_seconds, on_ready=announce)
        finally:
            if captured is not None:
                captured.close()
    raise typer.Exit(code)


def _peer(url: str | None, model: str | None, key_file: Path | None, *, web: bool) -> Peer | None:
    if url is None:
        if model is not None or key_file is not None:
            raise UsageError(
                "--compare-model and --compare-key-file are of the server to compare with",
                remedy="give its address with --compare-with URL",
            )
        return None
    if not web:
        raise UsageError(
            "--compare-with shows its answers on the web page, and --no-web leaves that out",
            remedy="leave one of them out",
        )
    from quantkit.evals.endpoint import check_address, read_key
    from quantkit.serve.peer import Peer

    check_address(url, "--compare-with", "--compare-key-file")
    return Peer(url, None if key_file is None else read_key(key_file), model)


def _capture(path: Path | None, rate: float, patterns: Path | None) -> CaptureConfig | None:
    from quantkit.serve.capture import CaptureConfig
    from quantkit.serve.redaction import PATTERNS, read_patterns

    if path is None:
        return None
    own = read_patterns(patterns) if patterns else PATTERNS
    return CaptureConfig(path, rate, patterns=own)
