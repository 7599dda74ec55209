"""The ``--engine`` options that eval and serve share, and what stands behind them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.options import refuse
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from quantkit.engines.artifact import Artifact
    from quantkit.engines.process import EngineProcess
    from quantkit.engines.vllm import Vllm, VllmOptions

PANEL = "Another engine"


class Engine(StrEnum):
    """What runs a checkpoint."""

    quantkit = "quantkit"
    vllm = "vllm"


EngineOption = Annotated[
    Engine,
    typer.Option(
        "--engine", help="quantkit, or an installed vLLM that is started.", rich_help_panel=PANEL
    ),
]
EnginePythonOption = Annotated[
    str | None,
    typer.Option(
        "--engine-python",
        metavar="PATH",
        help="Interpreter of the environment that the engine is installed in. Default: this one.",
        rich_help_panel=PANEL,
    ),
]
TensorParallelOption = Annotated[
    int,
    typer.Option(
        "--tensor-parallel",
        min=1,
        help="Devices of the engine that share each layer.",
        rich_help_panel=PANEL,
    ),
]
EngineArgumentOption = Annotated[
    list[str] | None,
    typer.Option(
        "--engine-arg",
        metavar="ARG",
        help="Passed on to the engine, such as --engine-arg=--enforce-eager. Repeatable.",
        rich_help_panel=PANEL,
    ),
]
EngineTimeoutOption = Annotated[
    float,
    typer.Option(
        "--engine-timeout",
        min=0.1,
        help="Seconds until the engine must be ready.",
        rich_help_panel=PANEL,
    ),
]


#: The parameters above that only another engine reads.
OPTIONS = ("engine_python", "tensor_parallel", "engine_arg", "engine_timeout")


def check_unused(context: typer.Context) -> None:
    """Refuse options of another engine where there is none.

    Raises:
        UsageError: naming the option.
    """
    refuse(context, OPTIONS, "belongs to another engine", "add --engine vllm")


@dataclass(frozen=True)
class Asked:
    """What the options say of an engine."""

    python: str | None
    tensor_parallel: int
    arguments: Sequence[str]
    timeout: float

    def find(self) -> Vllm:
        """The vLLM that was asked for."""
        from quantkit.engines.vllm import find_vllm

        return find_vllm(self.python or sys.executable)

    def options(self, **more: Any) -> VllmOptions:
        from quantkit.engines.vllm import VllmOptions

        return VllmOptions(
            tensor_parallel=self.tensor_parallel, arguments=tuple(self.arguments), **more
        )


@contextlib.contextmanager
def running(
    asked: Asked, vllm: Vllm, artifact: Artifact, options: VllmOptions, **more: Any
) -> Iterator[EngineProcess]:
    """The engine, ready. ``more``: see `quantkit.engines.vllm.running`."""
    from quantkit.engines import vllm as engine

    environment = dict(os.environ)
    # The checkpoint is local: nothing needs the network, and nobody has to hear of the run.
    environment.setdefault("HF_HUB_OFFLINE", "1")
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    # It would ask for a key that was meant for another server, and that nobody here sends.
    environment.pop("VLLM_API_KEY", None)
    environment |= more.pop("secrets", {})
    typer.echo(f"starting vLLM {vllm.version} on {artifact.folder}", err=True)
    with engine.running(
        vllm, artifact, options, environment=environment, timeout=asked.timeout, **more
    ) as process:
        yield process


def serve(
    checkpoint: str,
    asked: Asked,
    *,
    host: str,
    port: int,
    api_keys: Path | None,
    max_sequences: int,
    max_context: int | None,
    drain_seconds: float,
    as_json: bool,
) -> int:
    """``quantkit serve --engine vllm``; returns the exit code."""
    from quantkit.engines.artifact import read_artifact
    from quantkit.serve.keys import read_api_keys

    keys = () if api_keys is None else read_api_keys(api_keys)
    if len(keys) > 1:
        raise UsageError(f"{api_keys}: {len(keys)} keys", remedy="vLLM takes one; keep one line")
    key = keys[0] if keys else None
    vllm = asked.find()
    artifact = read_artifact(checkpoint)
    options = asked.options(
        host=host, port=port, max_context=max_context, max_sequences=max_sequences
    )
    with running(
        asked,
        vllm,
        artifact,
        options,
        secrets={} if key is None else {"VLLM_API_KEY": key},
        headers={} if key is None else {"Authorization": f"Bearer {key}"},
        echo=lambda line: typer.echo(line, err=True),
    ) as process:

        def announce() -> None:
            typer.echo(f"serving {artifact.name} at {process.url} (vLLM {vllm.version})", err=True)
            if as_json:
                typer.echo(json.dumps({"url": process.url, "model": artifact.name}))

        return process.supervise(drain_seconds, announce)
