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


def argmax(blocks: Sequence[Tensor]) -> tuple[list[int], list[float]]:
    """Where each row's first largest value is, or its first NaN, and that value; block after block.

    One call for all of them, on the threads of the forward pass. torch's own wakes its threads,
    which then spin for milliseconds on the cores that the next pass needs.

    Args:
        blocks: contiguous fp32 ``[rows, n]`` on the CPU, all of the same n.

    Raises:
        ValueError: a block is something else.
    """
    width = blocks[0].shape[-1] if blocks else 0
    rows = array("q")
    for block in blocks:
        fits = block.dtype == torch.float32 and block.is_cpu and block.is_contiguous()
        if not fits or block.dim() != 2 or block.shape[1] != width or not width:
            raise ValueError("argmax takes contiguous fp32 [rows, n] on the CPU")
        first = block.data_ptr()
        rows.extend(range(first, first + 4 * block.numel(), 4 * width))
    places, values = array("q", bytes(8 * len(rows))), array("f", bytes(4 * len(rows)))
    _argmax_rows()(
        rows.buffer_info()[0],
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
