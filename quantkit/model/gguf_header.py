"""The header of a `.gguf` file, walked with bounds before any library believes its numbers.

A length in it decides how often a reader loops and how much it keeps: one of 2⁶⁰ in a file of a
hundred bytes ends in no time here, and at the machine's last byte of memory elsewhere. Layout:
ggml's ``docs/gguf.md``, versions 2 and 3, in either byte order.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from quantkit.errors import QuantkitError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
#: Of arrays in arrays; ggml itself writes none.
MAX_DEPTH = 4

_STRING, _ARRAY = 8, 9
#: Value type → bytes.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class _BrokenError(Exception):
    """What is wrong, in words."""


def check_header(path: Path) -> None:
    """Raise if a header names anything that the file does not hold.

    Raises:
        QuantkitError: no GGUF file, one cut short, or one whose numbers do not fit it.
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise _BrokenError("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _Walk(data).run()
    except _BrokenError as e:
        raise QuantkitError(
            f"{path}: not a sound GGUF file ({e})", remedy="copy or download it again"
        ) from e


class _Walk:
    """A position in a file; every step is checked against the file's end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0
        self._order = "<"

    def run(self) -> None:
        """Walk all of the header."""
        if self._data[:4] != MAGIC:
            raise _BrokenError(f"it begins with {self._data[:4]!r}, not with {MAGIC!r}")
        self._at = 4
        version = self._number("I")
        if version >= 2**16:  # the other byte order
            self._order, self._at = ">", 4
            version = self._number("I")
        if version not in VERSIONS:
            raise _BrokenError(f"version {version} is not one of {VERSIONS}")
        tensors, fields = self._number("Q"), self._number("Q")
        for _ in range(fields):
            self._skip(self._number("Q"), "a key")
            self._value(self._number("I"), 0)
        ends = [self._tensor() for _ in range(tensors)]
        left = len(self._data) - self._at
        if ends and max(ends) > left:
            raise _BrokenError(f"tensors end at byte {max(ends)} of data where there are {left}")

    def _tensor(self) -> int:
        """Walk the description of a tensor; where its data ends, at least."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        self._skip(self._number("Q"), "a tensor's name")
        dimensions = self._number("I")
        if dimensions > MAX_DIMENSIONS:
            raise _BrokenError(f"a tensor of {dimensions} dimensions, above {MAX_DIMENSIONS}")
        shape = [self._number("Q") for _ in range(dimensions)]
        kind, offset = self._number("I"), self._number("Q")
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (KeyError, ValueError) as e:
            raise _BrokenError(f"a tensor of the unknown type {kind}") from e
        return offset + math.prod(shape) // block * size

    def _value(self, kind: int, depth: int) -> None:
        if kind == _STRING:
            self._skip(self._number("Q"), "a string")
        elif kind == _ARRAY:
            self._array(depth)
        elif kind in _SIZES:
            self._skip(_SIZES[kind], "a value")
        else:
            raise _BrokenError(f"a value of the unknown type {kind}")

    def _array(self, depth: int) -> None:
        if depth == MAX_DEPTH:
            raise _BrokenError(f"arrays nested more than {MAX_DEPTH} deep")
        kind, count = self._number("I"), self._number("Q")
        if kind in _SIZES:
            self._skip(count * _SIZES[kind], "an array")
            return
        for _ in range(count):  # each takes bytes, so the file's end bounds them
            self._value(kind, depth + 1)

    def _number(self, code: str) -> int:
        size = struct.calcsize(f"{self._order}{code}")
        begin = self._at
        self._skip(size, "a number")
        return int(struct.unpack_from(f"{self._order}{code}", self._data, begin)[0])

    def _skip(self, size: int, what: str) -> None:
        left = len(self._data) - self._at
        if size > left:
            raise _BrokenError(f"{what} of {size} bytes at byte {self._at}, where {left} are left")
        self._at += size
