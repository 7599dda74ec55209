"""Giving memory back: what Python and torch free is not always what the system gets."""

from __future__ import annotations

import ctypes
from pathlib import Path

from torch import Tensor

_MADV_DONTNEED = 4  # sys/mman.h
_PAGE = 4096


def forget_pages(tensor: Tensor) -> None:
    """Drop the resident pages of a weight that is mapped from a file and not needed any more.

    A checkpoint's mapping lives as long as any of its tensors, and so do all of its pages that
    were ever read. The pages are clean, so the kernel would read them again if they were
    touched. Does nothing for a tensor that is not mapped read-only from a file.
    """
    start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    first, last = -(-start // _PAGE) * _PAGE, (start + size) // _PAGE * _PAGE
    if size and last > first and _is_file_mapping(start, start + size):
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED
        )


def trim_heap() -> None:
    """Give the C library's free heap pages back (glibc; elsewhere nothing happens).

    Buffers of a few MB are freed in another order than they were made, once a block; without
    this the heap grew by 10 MB a block on SmolLM2-135M.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor lies in a mapping of a safetensors file that is still there."""
    start = tensor.data_ptr()
    return _is_file_mapping(start, start + tensor.numel() * tensor.element_size())


def _is_file_mapping(start: int, stop: int) -> bool:
    """Whether one mapping of a safetensors file holds this whole address range."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        span, _, rest = line.partition(" ")
        low, _, high = span.partition("-")
        if int(low, 16) <= start and stop <= int(high, 16):
            return rest.endswith(".safetensors")
    return False
