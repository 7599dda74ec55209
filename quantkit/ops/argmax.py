"""The likeliest token of a row of logits, without waking a thread."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantkit.ops.library import CPU


def argmax(row: Tensor) -> int:
    """Index of the first largest of fp32 ``[n]`` on the CPU, or of the first NaN.

    One thread is enough for a row of logits. torch's own wakes its threads, which then spin for
    milliseconds on the cores that the next forward pass needs.
    """
    if row.dtype != torch.float32 or row.device.type != "cpu" or not row.is_contiguous():
        raise ValueError("argmax takes contiguous fp32 on the CPU")
    return int(_argmax()(row.data_ptr(), row.numel()))


@cache
def _argmax() -> Any:
    function = CPU.require().qk_argmax
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_int64
    return function
