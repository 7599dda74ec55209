"""What a checkpoint's bytes depend on beside its inputs: instruction sets, threads, libraries.

torch adds up in another order with another number of threads, and kernels of another
instruction set round elsewhere. A run is resumed and rebuilt only where these are the same.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from quantkit import __version__
from quantkit.ops import kernel_status

#: Distributions whose arithmetic, sampling or file formats enter a checkpoint.
LIBRARIES = ("torch", "transformers", "compressed-tensors", "tokenizers", "numpy", "safetensors")


def machine_facts(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The class of machine: kernels' and torch's instruction sets, threads, and the GPU's name.

    Args:
        device: what calibration runs on.
    """
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {
        "isa": kernel_status()["cpu"]["isa"],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def library_versions() -> dict[str, str | None]:
    """Versions of `LIBRARIES` without their builds' suffixes."""
    return {name: _version(name) for name in LIBRARIES}


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Machine, libraries and quantkit's own version, flat: fact → value."""
    return {"quantkit": __version__, **library_versions(), **machine_facts(device)}


def _version(name: str) -> str | None:
    try:
        return version(name).split("+")[0]
    except PackageNotFoundError:
        return None
