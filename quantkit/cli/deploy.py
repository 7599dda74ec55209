"""``quantkit deploy``: manifests that serve a checkpoint with vLLM elsewhere."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Target(StrEnum):
    """A key of `quantkit.engines.deploy.TARGETS`."""

    compose = "compose"
    kserve = "kserve"
    ray = "ray"


def command(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="A checkpoint folder, a hub id or a .gguf file.")
    ],
    target: Annotated[
        Target, typer.Option("--target", help="docker compose, KServe, or Ray Serve (KubeRay).")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where to write.")],
    model_uri: Annotated[
        str | None,
        typer.Option(
            "--model-uri",
            metavar="URI",
            help="Where a cluster finds the checkpoint: pvc://CLAIM/PATH, s3://…, gs://… or a hub "
            "id.",
        ),
    ] = None,
    image: Annotated[
        str | None, typer.Option("--image", help="Container image. Default: a pinned one.")
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs that share each layer.")] = 1,
    min_replicas: Annotated[int, typer.Option("--min-replicas", min=1)] = 1,
    max_replicas: Annotated[int, typer.Option("--max-replicas", min=1)] = 1,
    max_context: Annotated[
        int | None,
        typer.Option(
            "--max-context", min=2, help="Longest prompt and answer together. Default: the model's."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Write a manifest that serves a checkpoint with vLLM.

    Nothing is started or sent anywhere. A scheme that vLLM does not run is refused (exit 2).
    """
    from quantkit.engines.artifact import read_artifact
    from quantkit.engines.deploy import DeployOptions, write

    options = DeployOptions(model_uri, image, gpus, (min_replicas, max_replicas), max_context)
    path = write(target.value, read_artifact(checkpoint), options, output)
    if as_json:
        typer.echo(json.dumps({"target": target.value, "file": str(path)}))
    else:
        typer.echo(f"wrote {path}")
