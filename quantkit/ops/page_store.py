"""Memory of a key-value cache in pages, and the scales it may round by.

Pages are those of ``qk_kv_cache`` in ``csrc/include/quantkit/decoder.h``; which of them belong to
which sequence is the caller's business.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from quantkit.ops.memory import empty_in_huge_pages

#: Tokens of a page of the key-value cache.
PAGE_TOKENS = 64

KV_DTYPES: Mapping[str, int] = MappingProxyType({"fp32": 0, "bf16": 1, "int8": 2, "fp8": 3})


class CCache(ctypes.Structure):
    """``qk_kv_cache``."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("pages", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("fixed", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class CacheScales:
    """Calibrated scales of a key-value cache.

    Attributes:
        dtype: ``int8`` or ``fp8``.
        fixed: fp32 ``[layers, 2]``, above zero: of each layer's keys and values.
    """

    dtype: str
    fixed: Tensor


class PageStore:
    """Memory of a key-value cache: pages of `PAGE_TOKENS` tokens; see ``qk_kv_cache``.

    It is not initialized, so that the system provides it page by page as it is written.

    Attributes:
        data: uint8 ``[layers, pages, kv_heads, 2, page bytes]``.
        scale: fp32 ``[layers, pages, kv_heads, 2, PAGE_TOKENS]`` of 8-bit caches, or None.
        dtype: a key of `KV_DTYPES`.
        fixed: fp32 ``[layers, 2]``, calibrated scales of keys and values; None gives each token
            its own.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        kv_heads: int,
        page_bytes: int,
        dtype: str,
        fixed: Tensor | None = None,
    ) -> None:
        self.pages = pages
        self.dtype = dtype
        if fixed is not None and fixed.shape != (layers, 2):
            raise ValueError(f"cache scales {tuple(fixed.shape)} where {(layers, 2)} are needed")
        self.fixed = None if fixed is None else fixed.float().contiguous()
        shape = (layers, pages, kv_heads, 2, page_bytes)
        self.data = empty_in_huge_pages(math.prod(shape)).view(shape)
        self.scale = (
            torch.empty(layers, pages, kv_heads, 2, PAGE_TOKENS, dtype=torch.float32)
            if dtype in ("int8", "fp8")
            else None
        )
        self._struct = CCache(
            dtype=KV_DTYPES[dtype],
            pages=pages,
            data=self.data.data_ptr(),
            scale=None if self.scale is None else self.scale.data_ptr(),
            fixed=None if self.fixed is None else self.fixed.data_ptr(),
        )
        self.pointer = ctypes.pointer(self._struct)

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page over all layers and heads."""
        tensors = (self.data,) if self.scale is None else (self.data, self.scale)
        return sum(t.nbytes for t in tensors) // max(1, self.pages)

    def copy_page(self, source: int, target: int) -> None:
        """Make page ``target`` a copy of page ``source``, in every layer."""
        self.data[:, target] = self.data[:, source]
        if self.scale is not None:
            self.scale[:, target] = self.scale[:, source]
