"""The likeliest tokens of rows of logits, without torch's threads."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantkit.ops.library import CPU


def argmax(block: Tensor, rows: Sequence[int] | None = None) -> tuple[list[int], list[float]]:
    """Where each row's first largest value is, or its first NaN, and that value.

    On the threads of the forward pass. torch's own wakes its threads, which then spin for
    milliseconds on the cores that the next pass needs.

    Args:
        block: contiguous fp32 ``[rows, n]`` on the CPU.
        rows: which of them, in this order; by default all.

    Raises:
        ValueError: the block is something else, or has no such row.
    """
    fits = block.dtype == torch.float32 and block.is_cpu and block.is_contiguous()
    if not fits or block.dim() != 2 or not block.shape[1]:
        raise ValueError("argmax takes contiguous fp32 [rows, n] on the CPU")
    height, width = block.shape
    if rows is None:
        rows = range(height)
    if rows and not 0 <= min(rows) <= max(rows) < height:
        raise ValueError(f"a block of {height} rows has no row {min(rows)} or {max(rows)}")
    first, stride = block.data_ptr(), 4 * width
    addresses = array("q", [first + stride * row for row in rows])
    places, values = array("q", bytes(8 * len(rows))), array("f", bytes(4 * len(rows)))
    _argmax_rows()(
        addresses.buffer_info()[0],
        len(rows),
        width,
        places.buffer_info()[0],
        values.buffer_info()[0],
    )
    return places.tolist(), values.tolist()


@cache
def _argmax_rows() -> Any:
    function = CPU.require().qk_argmax_rows
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes, function.restype = (pointer, count, count, pointer, pointer), None
    return function
