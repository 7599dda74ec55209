"""``quantkit doctor``: what this machine can run, and why not."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def command(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show CPU features, GPU, library versions, and which kernels are built."""
    facts = _facts()
    if as_json:
        typer.echo(json.dumps(facts, indent=1, default=str))
        return
    for section, content in facts.items():
        typer.echo(f"{section}")
        for key, value in content.items():
            typer.echo(f"  {key:<22} {_plain(value)}")


def _facts() -> dict[str, dict[str, Any]]:
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import psutil
    import torch

    from quantkit.ops import kernel_status

    libraries = {}
    for name in ("torch", "transformers", "compressed-tensors", "lm-eval", "safetensors"):
        try:
            libraries[name] = version(name)
        except PackageNotFoundError:
            libraries[name] = "not installed"
    gpu: dict[str, Any] = {"cuda": torch.version.cuda or "torch is a CPU build"}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            gpu[f"device {i}"] = f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})"
    else:
        gpu["devices"] = "none that torch can see"
    return {
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "cores": len(os.sched_getaffinity(0)),
            "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        },
        "libraries": libraries,
        "gpu": gpu,
        "kernels": kernel_status(),
    }


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple | set):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return str(value)
