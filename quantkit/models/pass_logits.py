"""The logits of a forward pass over several sequences, as they lie in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import overload

from torch import Tensor


class PassLogits(Sequence[Tensor]):
    """fp32 ``[rows, vocab]`` of each work, cut out of one block when somebody asks.

    Greedy answers need no tensor of their own, and to make one for each of sixteen sequences takes
    as long as some layers.

    Attributes:
        block: ``[all rows, vocab]``, contiguous.
    """

    def __init__(self, block: Tensor, counts: Sequence[int]) -> None:
        self.block = block
        self._ends = [0, *accumulate(counts)]

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return self.block[self._ends[i] : self._ends[i + 1]]

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.__getitem__, range(len(self)))

    def last_rows(self, counts: Sequence[int]) -> list[int]:
        """Of the block: the last ``counts[i]`` rows of each work."""
        ends = zip(self._ends[1:], counts, strict=True)
        return list(chain.from_iterable(range(end - count, end) for end, count in ends))
