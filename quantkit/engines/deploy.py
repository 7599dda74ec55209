"""Manifests that serve a checkpoint with vLLM: docker compose, KServe, Ray Serve on Kubernetes.

Each target is a function from a checkpoint and options to a document; the flags of vLLM are those
of `quantkit.engines.vllm`, so that what was evaluated is what is deployed.

Sources: the Compose specification (services); KServe ``serving.kserve.io/v1beta1``
InferenceService with a container of its own, which gets the files of ``STORAGE_URI`` in
/mnt/models; KubeRay ``ray.io/v1`` RayService around ``ray.serve.llm:build_openai_app``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantkit.engines.artifact import Artifact
from quantkit.engines.support import Host, check
from quantkit.engines.vllm import VllmOptions, as_arguments, flags
from quantkit.errors import UsageError
from quantkit.results import write_text

Document = dict[str, Any]

PORT = 8000

#: Where a container finds the checkpoint.
MOUNT = "/mnt/models"

#: vLLM's server in its own image, followed by the checkpoint.
PROGRAM = ("vllm", "serve")

#: Default image of each target.
IMAGES = {
    "compose": "vllm/vllm-openai:v0.32.0",
    "kserve": "vllm/vllm-openai:v0.32.0",
    "ray": "rayproject/ray-llm:2.58.0-py312-cu130",
}

#: Where a cluster may fetch a checkpoint from. Anything else is a hub id.
SCHEMES = ("pvc", "s3", "gs", "hf")


class Block(str):
    """Text that is written line by line, as a person would."""


class Dumper(yaml.SafeDumper):
    """A YAML writer that knows `Block`."""


Dumper.add_representer(
    Block, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|")
)


@dataclass(frozen=True)
class DeployOptions:
    """How a checkpoint is deployed.

    Attributes:
        model_uri: where a cluster finds the checkpoint: ``pvc://CLAIM/PATH``, ``s3://``, ``gs://``,
            or a hub id. Compose mounts the folder itself and takes none.
        image: container image; of `IMAGES` when None.
        gpus: GPUs that share each layer.
        replicas: (fewest, most) copies of the model.
        max_context: longest prompt and answer together; the model's own when None.
    """

    model_uri: str | None = None
    image: str | None = None
    gpus: int = 1
    replicas: tuple[int, int] = (1, 1)
    max_context: int | None = None


def write(target: str, artifact: Artifact, options: DeployOptions, folder: Path) -> Path:
    """Write a target's manifest into a folder; returns the file.

    Args:
        target: a key of `TARGETS`.
        artifact: the checkpoint.
        options: see `DeployOptions`.
        folder: made if it is not there; a file in it is never replaced.

    Raises:
        UsageError: an unknown target, a scheme that vLLM does not run on GPUs, a context beyond
            the model's, no model_uri for a cluster or one for compose, or a file that is there
            already.
    """
    if target not in TARGETS:
        raise UsageError(f"target {target!r}: one of {', '.join(TARGETS)}")
    if not 1 <= options.replicas[0] <= options.replicas[1]:
        raise UsageError(f"replicas {options.replicas}: fewest and most, from 1 up")
    check(artifact, Host("cuda"))
    document = TARGETS[target](artifact, options)
    path = folder / f"{target}.yaml"
    if path.exists():
        raise UsageError(f"{path} exists", remedy="remove it, or give another -o")
    head = f"# {artifact.name} on vLLM, written by quantkit deploy --target {target}\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"{folder}: cannot be made ({e.strerror or e})") from e
    write_text(path, head + yaml.dump(document, Dumper=Dumper, sort_keys=False))
    return path


def compose(artifact: Artifact, options: DeployOptions) -> Document:
    """A service of docker compose that mounts the checkpoint's folder."""
    if options.replicas != (1, 1):
        raise UsageError(
            f"replicas {options.replicas}: one port has one copy", remedy="use kserve or ray"
        )
    if options.model_uri:
        raise UsageError(
            f"model_uri {options.model_uri!r}: compose mounts the checkpoint's own folder",
            remedy="leave --model-uri out, or use kserve or ray",
        )
    arguments = as_arguments(_flags(artifact, options))
    gpu = {"driver": "nvidia", "count": options.gpus, "capabilities": ["gpu"]}
    service = {
        "image": options.image or IMAGES["compose"],
        "entrypoint": list(PROGRAM),
        "command": [MOUNT, *map(_literal, arguments)],
        # The key stays out of the file, and compose refuses to start without one.
        "environment": {"VLLM_API_KEY": "${VLLM_API_KEY:?set it in .env}"},
        "volumes": [
            {
                "type": "bind",
                "source": _literal(str(artifact.folder.resolve())),
                "target": MOUNT,
                "read_only": True,
            }
        ],
        "ports": [f"127.0.0.1:{PORT}:{PORT}"],
        "ipc": "host",
        "healthcheck": {
            "test": ["CMD", "curl", "-f", f"http://localhost:{PORT}/health"],
            "interval": "10s",
            "timeout": "5s",
            "retries": 3,
            "start_period": "600s",
        },
        "restart": "unless-stopped",
        "deploy": {"resources": {"reservations": {"devices": [gpu]}}},
    }
    return {"name": _label(artifact), "services": {"vllm": service}}


def kserve(artifact: Artifact, options: DeployOptions) -> Document:
    """A KServe InferenceService around vLLM's own image."""
    scheme, rest = _uri(options)
    container = {
        # KServe puts the files of STORAGE_URI into the container of this name.
        "name": "kserve-container",
        "image": options.image or IMAGES["kserve"],
        "command": list(PROGRAM),
        "args": [MOUNT, *as_arguments(_flags(artifact, options))],
        "env": [{"name": "STORAGE_URI", "value": f"{scheme}://{rest}"}],
        "ports": [{"containerPort": PORT, "protocol": "TCP"}],
        "readinessProbe": _probe(period=5, failures=3),
        "startupProbe": _probe(period=10, failures=90),
        "resources": _gpus(options),
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": _label(artifact),
            # Plain deployments: Knative takes neither long start-ups nor shared memory gladly.
            "annotations": {"serving.kserve.io/deploymentMode": "RawDeployment"},
        },
        "spec": {
            "predictor": {
                "minReplicas": options.replicas[0],
                "maxReplicas": options.replicas[1],
                "containers": [container],
                "volumes": [_shared_memory()],
            }
        },
    }


def ray(artifact: Artifact, options: DeployOptions) -> Document:
    """A KubeRay RayService whose application is Ray Serve's LLM app, which runs vLLM."""
    image = options.image or IMAGES["ray"]
    version = re.search(r":(\d+\.\d+\.\d+)", image)
    if version is None:
        raise UsageError(
            f"image {image}: its tag does not begin with Ray's version, which a RayService names",
            remedy=f"such as {IMAGES['ray']}",
        )
    application = {
        "name": "llm",
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [_llm_config(artifact, options)]},
    }
    least, most = options.replicas
    worker = {
        "groupName": "gpu",
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": most,
        "rayStartParams": {},
        "template": _ray_pod(image, options, resources=_gpus(options)),
    }
    head = {
        # The head schedules and answers; the model runs on workers.
        "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
        "template": _ray_pod(image, options, resources={"requests": {"cpu": "2", "memory": "8Gi"}}),
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": _label(artifact)},
        "spec": {
            "serveConfigV2": Block(
                yaml.safe_dump({"applications": [application]}, sort_keys=False)
            ),
            "rayClusterConfig": {
                "rayVersion": version.group(1),
                # Else nobody adds the workers that more replicas need.
                "enableInTreeAutoscaling": most > least,
                "headGroupSpec": head,
                "workerGroupSpecs": [worker],
            },
        },
    }


#: Every target. To add one, add its function.
TARGETS: Mapping[str, Callable[[Artifact, DeployOptions], Document]] = {
    "compose": compose,
    "kserve": kserve,
    "ray": ray,
}


# --- parts -----------------------------------------------------------------------------------


def _flags(artifact: Artifact, options: DeployOptions) -> dict[str, str]:
    serving = VllmOptions(
        host="0.0.0.0",
        port=PORT,
        tensor_parallel=options.gpus,
        max_context=options.max_context,
    )
    return flags(artifact, serving)


def _literal(text: str) -> str:
    """Text that compose does not interpolate: it reads ``$`` as the start of a variable."""
    return text.replace("$", "$$")


def _llm_config(artifact: Artifact, options: DeployOptions) -> Document:
    """Ray's ``LLMConfig``; ``engine_kwargs`` are vLLM's flags as keyword arguments."""
    kwargs: Document = {}
    for flag, value in _flags(artifact, options).items():
        if flag not in ("--served-model-name", "--host", "--port"):
            kwargs[flag.removeprefix("--").replace("-", "_")] = (
                int(value) if value.isdigit() else value
            )
    scheme, rest = _uri(options)
    source: object = rest
    if scheme == "pvc":
        source = f"{MOUNT}/{rest.partition('/')[2]}".rstrip("/")
    elif scheme != "hf":
        source = {"bucket_uri": f"{scheme}://{rest}"}
    return {
        "model_loading_config": {"model_id": artifact.name, "model_source": source},
        "engine_kwargs": kwargs,
        "deployment_config": {
            "autoscaling_config": {
                "min_replicas": options.replicas[0],
                "max_replicas": options.replicas[1],
            }
        },
    }


def _ray_pod(image: str, options: DeployOptions, *, resources: Document) -> Document:
    container: Document = {
        "name": "ray",
        "image": image,
        "resources": resources,
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    volumes = [_shared_memory()]
    scheme, rest = _uri(options)
    if scheme == "pvc":
        claim = {"claimName": rest.partition("/")[0], "readOnly": True}
        volumes.append({"name": "models", "persistentVolumeClaim": claim})
        container["volumeMounts"].append({"name": "models", "mountPath": MOUNT, "readOnly": True})
    return {"spec": {"containers": [container], "volumes": volumes}}


def _gpus(options: DeployOptions) -> Document:
    amount = {"nvidia.com/gpu": str(options.gpus)}
    return {"requests": dict(amount), "limits": dict(amount)}


def _shared_memory() -> Document:
    """Workers of one model talk through it; the default of 64 MB is too little."""
    return {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}


def _probe(*, period: int, failures: int) -> Document:
    return {
        "httpGet": {"path": "/health", "port": PORT},
        "periodSeconds": period,
        "failureThreshold": failures,
    }


def _uri(options: DeployOptions) -> tuple[str, str]:
    """(scheme, rest) of the checkpoint's address.

    Raises:
        UsageError: none was given, or a scheme that clusters do not fetch from.
    """
    if not options.model_uri:
        raise UsageError(
            "a cluster cannot see this machine's folders",
            remedy="upload the checkpoint and say where with --model-uri (pvc://CLAIM/PATH, "
            "s3://…, gs://… or a hub id)",
        )
    scheme, separator, rest = options.model_uri.partition("://")
    if not separator:
        return "hf", options.model_uri
    if scheme not in SCHEMES or not rest:
        raise UsageError(
            f"model_uri {options.model_uri!r}: {scheme!r} is none of {', '.join(SCHEMES)}"
        )
    return scheme, rest


def _label(artifact: Artifact) -> str:
    """The checkpoint's name as a DNS label (RFC 1123), which Kubernetes asks of names."""
    label = re.sub(r"[^a-z0-9]+", "-", artifact.name.lower()).strip("-")[:40].strip("-")
    return label if label[:1].isalpha() else f"model-{label}".rstrip("-")
