"""Giving memory back: what Python and torch free is not always what the system gets."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

_MADV_DONTNEED = 4  # sys/mman.h
_PAGE = 4096
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

#: Bytes of a tensor from which it pays to look up its mapping, a few milliseconds, and drop its
#: pages, where many are read.
FORGOTTEN = 1 << 20

#: Bytes of the smallest buffer that is mapped by itself, and of free heap behind the last one that
#: go back to the system: hidden states of a batch stay on the heap, where they are recycled.
_BOUNDED = (8 << 20, 32 << 20)

#: What glibc raises the first to by itself, as buffers of up to that size are freed, and the second
#: to twice as much (mallopt(3)). Larger ones are always mapped.
MAPPED_AT_LAST = 32 << 20
_GROWN = (MAPPED_AT_LAST, 2 * MAPPED_AT_LAST)


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


@contextmanager
def bounded_heap(mapped: int = _BOUNDED[0]) -> Iterator[None]:
    """While active, large buffers leave memory when they are freed, and what was free before has
    left (glibc; elsewhere nothing happens).

    glibc maps a large buffer by itself, and takes what is freed for large no longer: its threshold
    rises to 32 MB. From then on buffers of 10 MB lie on the heap between hidden states that stay,
    and the holes that they leave are resident and fit nothing: 150 MB under GPTQ on SmolLM2-135M.
    A threshold that is set does not rise. glibc tells nobody what it was: behind this it is where
    it would have risen to.

    For forward passes that pause, and for loading: unpacking a layer frees several times what stays
    of it, and 8 billion weights of 4 bits took 8.3 GB instead of 4.1. Training frees and asks for
    the same large buffers in every step: to map each anew cost distillation 60 % more processor
    time, training blocks 30 % and Fisher's pass 20 %.

    Args:
        mapped: bytes of the smallest buffer that is mapped by itself.
    """
    trim_heap()
    _set_thresholds(mapped, _BOUNDED[1])
    try:
        yield
    finally:
        _set_thresholds(*_GROWN)


def _set_thresholds(mapped: int, trimmed: int) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, mapped)
    mallopt(_M_TRIM_THRESHOLD, trimmed)


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
