"""The CUDA kernels on a CPU: csrc/cuda compiled by g++ against its host twin, called by ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "twin"
SOURCES = (
    "cuda/host/machine.cpp",
    "cuda/api.cu",
    "cuda/fp4_api.cu",
    "cuda/fp4a16_bf16.cu",
    "cuda/fp4a16_f16.cu",
    "cuda/hadamard.cu",
    "cuda/paged_decode.cu",
    "cuda/rope_store.cu",
    "cuda/row_quantize.cu",
    "cuda/w4_linear.cu",
    "cuda/w8_linear.cu",
    "cuda/w4a16_bf16.cu",
    "cuda/w4a16_f16.cu",
    "cuda/w8_api.cu",
    "cuda/w8a16_bf16.cu",
    "cuda/w8a16_f16.cu",
    "tests/twin_probes.cu",
)
# Kernel templates compile several times as fast as at -O2, and run small shapes in no time.
FLAGS = (
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",  # unroll
)

OK, INVALID_ARGUMENT, UNSUPPORTED, LAUNCH_FAILED = 0, 1, 2, 4


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-8000:]}"


def _texts(path: Path, seen: dict[Path, bytes]) -> dict[Path, bytes]:
    """A file and the project's headers that it includes, directly or not."""
    if path not in seen:
        seen[path] = path.read_bytes()
        for name in re.findall(r'^#include "(.+)"', seen[path].decode(), re.MULTILINE):
            found = [f / name for f in (path.parent, CSRC / "include") if (f / name).exists()]
            _texts(found[0].resolve(), seen)
    return seen


def _object(source: str) -> Path:
    """Compile one file, unless the same text was compiled before."""
    path = CSRC / source
    texts = b"".join(text for _, text in sorted(_texts(path, {}).items()))
    key = hashlib.sha256(texts + repr(FLAGS).encode()).hexdigest()[:16]
    out = BUILD / f"{path.stem}-{key}.o"
    if not out.exists():
        partial = out.with_suffix(f".{os.getpid()}.o")
        compiler = os.environ.get("CXX", "g++")
        command = [compiler, *FLAGS, "-DQK_HOST_TWIN", "-I", str(CSRC / "include")]
        _run([*command, "-c", "-x", "c++", str(path), "-o", str(partial)])
        partial.replace(out)
    return out


@functools.cache
def library() -> ctypes.CDLL:
    """The library, built where its sources changed."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(_object, SOURCES))
    key = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
    out = BUILD / f"libquantkit_twin-{key}.so"
    if not out.exists():
        partial = out.with_suffix(f".{os.getpid()}.so")
        _run([os.environ.get("CXX", "g++"), "-shared", "-o", str(partial), *map(str, objects)])
        partial.replace(out)
    handle = ctypes.CDLL(str(out))
    handle.qk_twin_error.restype = ctypes.c_char_p
    return handle


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def watch(*inputs: Tensor | None, outputs: tuple[Tensor | None, ...] = ()) -> None:
    """Let kernels touch these tensors and no other memory; without any, everything."""
    twin = library()
    twin.qk_twin_watch(None, ctypes.c_int64(0), 0)
    for tensors, writable in ((inputs, 0), (outputs, 1)):
        for t in tensors:
            if t is not None:
                storage = t.untyped_storage()
                size = ctypes.c_int64(storage.nbytes())
                twin.qk_twin_watch(ctypes.c_void_p(storage.data_ptr()), size, writable)


def error() -> str:
    """What the last failed launch did wrong."""
    return library().qk_twin_error().decode()


def check(status: int) -> None:
    assert status == OK, f"status {status}: {error()}"


def words(*shape: int) -> Tensor:
    """Random 32-bit patterns."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)
