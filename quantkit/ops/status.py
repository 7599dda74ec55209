"""What is built, what this CPU offers and what is in use; and the settings of the CPU library.

The settings are for the whole process. ``set_isa`` is for tests and benchmarks.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from quantkit.errors import UsageError
from quantkit.ops.library import CPU, CUDA, NativeLibrary

ISAS = ("generic", "avx2", "avx512", "avx512bf16")  # slowest first

# What the kernels use, and what later ones might.
_CPU_FLAGS = [
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512vbmi",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
]


def set_num_threads(threads: int) -> None:
    """Threads of one CPU kernel, the calling thread included; 0 follows torch.get_num_threads()."""
    if threads < 0:
        raise UsageError(f"num_threads {threads} is negative", remedy="use 0 to follow torch")
    CPU.require().qk_set_num_threads(ctypes.c_int32(threads))


def get_num_threads() -> int:
    """Threads that the next CPU kernel uses."""
    handle = CPU.require()
    handle.qk_set_default_threads(ctypes.c_int32(torch.get_num_threads()))
    return int(handle.qk_get_num_threads())


_pool = "own"


def set_thread_pool(name: str) -> None:
    """Run CPU kernels on "torch"'s threads or on the library's "own".

    torch's OpenMP threads spin for some milliseconds after each parallel operation, on the cores
    that the library's own threads need next: a program that alternates parallel torch operations
    with these kernels runs faster on one pool. Where other programs compete for the cores, the
    library's own pool is the steadier one: it never waits for a thread that is not running.
    """
    if name not in ("own", "torch"):
        raise UsageError(f"thread pool {name!r} is unknown", remedy="use 'own' or 'torch'")
    CPU.require().qk_use_torch_threads(ctypes.c_int32(name == "torch"))
    global _pool
    _pool = name


def get_thread_pool() -> str:
    """The pool in use: "own" or "torch"."""
    return _pool


def available_isas() -> list[str]:
    """The instruction sets that this CPU runs, slowest first."""
    handle = CPU.require()
    return [isa for isa in ISAS if handle.qk_isa_supported(ctypes.c_char_p(isa.encode()))]


def set_isa(name: str) -> None:
    """Force an instruction set: one of :func:`available_isas`, or "auto" for the best."""
    handle = CPU.require()
    if handle.qk_set_isa(ctypes.c_char_p(name.encode())) != 0:
        known = ", ".join([*available_isas(), "auto"])
        raise UsageError(f"isa {name!r} does not run on this CPU", remedy=f"use one of {known}")


def get_isa() -> str:
    """The instruction set in use."""
    handle = CPU.require()
    handle.qk_get_isa.restype = ctypes.c_char_p
    return handle.qk_get_isa().decode()


def _cpu_features() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return []
    return [flag for flag in _CPU_FLAGS if flag in flags]


def _library_status(library: NativeLibrary) -> dict[str, Any]:
    built = library.path.exists()
    loaded = library.handle is not None
    problem = library.problem
    if not built:
        problem = f"{library.file_name} is not built"
    return {"path": str(library.path), "built": built, "loaded": loaded, "problem": problem}


def kernel_status() -> dict[str, Any]:
    """What ``quantkit doctor`` shows about kernels. Loads the CUDA library only if a GPU is usable.

    Returns:
        ``cpu`` and ``cuda``, each with ``path``, ``built``, ``loaded`` and ``problem`` (why it is
        not usable, or None); ``cpu`` adds ``features`` (flags that the kernels care about),
        ``isas`` (paths that run here), ``isa`` (the one in use), ``threads`` and
        ``thread_pool``; ``cuda`` adds ``available`` (torch sees a GPU).
    """
    cuda_available = torch.cuda.is_available()
    if cuda_available:
        CUDA.load()
    cpu = _library_status(CPU) | {"features": _cpu_features(), "isas": [], "isa": None}
    cpu |= {"threads": None, "thread_pool": _pool}
    if CPU.handle is not None:
        cpu |= {"isas": available_isas(), "isa": get_isa(), "threads": get_num_threads()}
    cuda = _library_status(CUDA) | {"available": cuda_available}
    if cuda["built"] and not cuda_available:
        cuda["problem"] = "torch sees no CUDA device"
    return {"cpu": cpu, "cuda": cuda}
