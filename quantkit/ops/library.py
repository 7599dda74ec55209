"""Finding and loading the two native libraries.

``libquantkit_cpu.so`` is loaded when ``quantkit.ops`` is imported, if it is there. The CUDA library
is loaded by the first call that has a CUDA tensor, so importing never touches a GPU. A library that
is missing, or built for another version of this package, is an error when it is needed and not
before; nothing falls back to a slower implementation on its own.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.errors import KernelMissingError

NATIVE_DIR = Path(__file__).resolve().parent.parent / "_native"
ABI_VERSION = 5
BUILD_COMMAND = "`make native` or `pip install --no-build-isolation --no-deps -e .`"


@dataclass
class NativeLibrary:
    """One shared library: where it should be, and what came of loading it."""

    file_name: str
    version_symbol: str
    handle: ctypes.CDLL | None = None
    problem: str | None = None

    @property
    def path(self) -> Path:
        return NATIVE_DIR / self.file_name

    def load(self) -> bool:
        """Load once; on failure remember why."""
        if self.handle is not None or self.problem is not None:
            return self.handle is not None
        if not self.path.exists():
            self.problem = f"{self.file_name} is not built ({self.path} does not exist)"
            return False
        try:
            handle = ctypes.CDLL(str(self.path))
            version = int(getattr(handle, self.version_symbol)())
            if version != ABI_VERSION:
                self.problem = (
                    f"{self.path} has ABI version {version}, this package needs {ABI_VERSION}"
                )
                return False
            torch.ops.load_library(str(self.path))
        except (OSError, AttributeError) as error:
            self.problem = f"{self.path} does not load in torch {torch.__version__}: {error}"
            return False
        self.handle = handle
        return True

    def require(self) -> ctypes.CDLL:
        """The loaded library, or an error that names the build command."""
        if self.handle is None and not self.load():
            raise KernelMissingError(str(self.problem), remedy=f"build it with {BUILD_COMMAND}")
        assert self.handle is not None
        return self.handle


CPU = NativeLibrary("libquantkit_cpu.so", "qk_abi_version")
CUDA = NativeLibrary("libquantkit_cuda.so", "qk_cuda_abi_version")
CPU.load()


def require_for(tensor: torch.Tensor) -> None:
    """Make sure that the library for this tensor's device is loaded."""
    library = CUDA if tensor.is_cuda else CPU
    if library.handle is None:
        library.require()


def require_cuda_kernel(operator: str, tensor: torch.Tensor) -> None:
    """The same for an operator that only the CUDA library has."""
    if not tensor.is_cuda:
        device = tensor.device.type.upper()
        raise KernelMissingError(
            f"{operator} has no {device} kernel",
            remedy="use get_backend('reference') there, or move the tensor to a GPU",
        )
    require_for(tensor)


def require_cpu_kernel(operator: str, tensor: torch.Tensor) -> None:
    """The same for an operator that only the CPU library has."""
    if tensor.device.type != "cpu":
        device = tensor.device.type.upper()
        raise KernelMissingError(
            f"{operator} has no {device} kernel",
            remedy="use get_backend('reference') there, or move the tensor to the CPU",
        )
    require_for(tensor)
