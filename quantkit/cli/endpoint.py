"""``quantkit eval`` on a model that runs elsewhere: the options, and the way there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from quantkit.cli.engine import Asked
    from quantkit.data.rows import Document
    from quantkit.evals.endpoint import EndpointConfig
    from quantkit.results import Results

PANEL = "Another engine"

EndpointOption = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        metavar="URL",
        help="Ask an OpenAI-compatible server that serves CKPT, instead of loading it. CKPT gives "
        "the tokenizer.",
        rich_help_panel=PANEL,
    ),
]
EndpointModelOption = Annotated[
    str | None,
    typer.Option(
        "--endpoint-model",
        metavar="NAME",
        help="The model's name there. Default: the only one.",
        rich_help_panel=PANEL,
    ),
]
EndpointKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--endpoint-key-file",
        metavar="FILE",
        help="Holds the server's API key.",
        rich_help_panel=PANEL,
    ),
]
EndpointTimeoutOption = Annotated[
    float,
    typer.Option(
        "--endpoint-timeout",
        min=0.1,
        help="Seconds that one answer may take.",
        rich_help_panel=PANEL,
    ),
]
ConcurrencyOption = Annotated[
    int,
    typer.Option(
        "--concurrency", min=1, max=1024, help="Requests under way at once.", rich_help_panel=PANEL
    ),
]


def check_options(
    reference: str | None, kernels: str, kv_cache_dtype: str, device: str, threads: int | None
) -> None:
    """Refuse what only a model that is loaded here can do.

    Raises:
        UsageError: naming the option.
    """
    from quantkit.errors import UsageError

    if reference is not None:
        raise UsageError(
            "--reference: KL and top-1 agreement need the whole distribution of every token, and "
            "an API gives the most likely tokens",
            remedy="leave --reference out (perplexity is measured), or score CKPT here",
        )
    chosen: tuple[tuple[str, object, object], ...] = (
        ("--kernels", kernels, "native"),
        ("--kv-cache-dtype", kv_cache_dtype, "auto"),
        ("--device", device, "cpu"),
        ("--threads", threads, None),
    )
    for option, value, default in chosen:
        if value != default:
            raise UsageError(
                f"{option} {value}: another engine chooses its own", remedy="leave it out"
            )


def configure(url: str, model: str | None, key_file: Path | None, **more: Any) -> EndpointConfig:
    """The options as a config. ``more``: its other fields."""
    from quantkit.evals.endpoint import EndpointConfig, read_key

    key = None if key_file is None else read_key(key_file)
    return EndpointConfig(url, model, key, **more)


def score_started(
    checkpoint: str,
    asked: Asked,
    asking: Mapping[str, Any],
    documents: Sequence[Document] | None,
    **options: Any,
) -> Results:
    """Start vLLM on a checkpoint, score it there, and stop it.

    Args:
        checkpoint: what to serve.
        asked: which vLLM, and how.
        asking: fields of `EndpointConfig`.
        documents, options: see `score`.
    """
    from quantkit.cli import engine
    from quantkit.engines.artifact import read_artifact

    vllm = asked.find()
    artifact = read_artifact(checkpoint)
    known = {
        "engine": "vllm",
        "model": artifact.weight_hash(),
        "kernels": f"vllm-{vllm.version}/{vllm.host.device}",
        "device": vllm.host.device,
    }
    if artifact.original is not None:
        known["original"] = artifact.original
    with engine.running(asked, vllm, artifact, asked.options()) as process:
        config = configure(process.url, artifact.name, None, **asking)
        return score(
            str(artifact.folder), config, documents, known=known, cost=artifact.cost(), **options
        )


def score(
    checkpoint: str,
    config: EndpointConfig,
    documents: Sequence[Document] | None,
    *,
    known: Mapping[str, Any] | None = None,
    cost: Mapping[str, Any] | None = None,
    **options: Any,
) -> Results:
    """Score what a server serves.

    Args:
        checkpoint: gives the tokenizer.
        config: where the server is.
        documents: held-out text.
        known, cost, options: see `quantkit.evals.evaluate_endpoint.evaluate_endpoint`.
    """
    from quantkit.cli.progress import reporter
    from quantkit.data.held_out import join_held_out
    from quantkit.evals.endpoint import connect
    from quantkit.evals.evaluate_endpoint import evaluate_endpoint
    from quantkit.models.tokenizer import load_tokenizer

    endpoint = connect(config)
    tokenizer, length = load_tokenizer(checkpoint)
    typer.echo(f"{endpoint.model} on {endpoint.server}", err=True)
    with reporter("eval") as progress:
        return evaluate_endpoint(
            endpoint,
            tokenizer,
            text=None if documents is None else join_held_out(documents, tokenizer),
            max_length=length,
            known=known,
            cost=cost,
            progress=progress,
            **options,
        )
