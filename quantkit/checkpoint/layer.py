"""One quantized layer as a checkpoint holds it, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import QuantkitError, UsageError
from quantkit.numerics import QTensor


@dataclass(frozen=True)
class StoredLayer:
    """What a linear layer's tensors stand for.

    Attributes:
        weight: ``[N, K]``.
        input_scale: ``[1]``, for static activations.
        order: int64 ``[K]``: column j of ``weight`` multiplies input ``order[j]``. None where
            columns lie as the model has them.
        hadamard: order of the Hadamard matrix that multiplies its input, 0 for none.
    """

    weight: QTensor
    input_scale: Tensor | None = None
    order: Tensor | None = None
    hadamard: int = 0


class LayerTensors:
    """A layer's tensors by local name; every one of them must be read, and none may be missing.

    Args:
        name: of the layer, for messages.
        tensors: by local name, such as ``weight_packed``.
    """

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.name = name
        self._tensors = tensors
        self._unread = set(tensors)

    def find(self, key: str) -> Tensor | None:
        """The tensor, or None."""
        self._unread.discard(key)
        return self._tensors.get(key)

    def take(
        self, key: str, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The tensor.

        Raises:
            QuantkitError: it is missing, or of another shape or dtype.
        """
        tensor = self.find(key)
        if tensor is None:
            raise QuantkitError(
                f"{self.name}.{key}: missing from the checkpoint",
                remedy="the file is incomplete; copy it again",
            )
        if shape is not None and tuple(tensor.shape) != shape:
            raise QuantkitError(
                f"{self.name}.{key}: stored as {list(tensor.shape)} where the layer has "
                f"{list(shape)}"
            )
        if dtype is not None and tensor.dtype != dtype:
            raise QuantkitError(f"{self.name}.{key}: is {tensor.dtype}, not {dtype}")
        return tensor

    def take_scales(
        self, key: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        """The tensor in this shape; writers differ in the axes of one element.

        Raises:
            QuantkitError: it is missing, or of another shape or dtype.
        """
        tensor = self.take(key, dtype=dtype)
        if [d for d in tensor.shape if d != 1] == [d for d in shape if d != 1]:
            return tensor.reshape(shape)
        return self.take(key, shape)  # which says what it found

    def check_all_read(self) -> None:
        """Raise QuantkitError for a tensor that nobody took: it would change the layer's output."""
        if self._unread:
            key = min(self._unread)
            raise QuantkitError(
                f"{self.name}.{key}: a tensor that quantkit does not know in this format",
                remedy="the checkpoint is of a newer version of the format, or damaged",
            )


def column_order(groups_of_columns: Tensor, groups: int, name: str) -> Tensor | None:
    """The order that brings each group's columns together, groups ascending.

    GPTQ's activation order gives a group the columns that were rounded one after the other, which
    lie anywhere in the row. Within a group columns keep their order.

    Args:
        groups_of_columns: ``[K]`` integers, each column's group.
        groups: of a row.
        name: of the layer, for messages.

    Returns:
        int64 ``[K]``, or None where columns lie together already.

    Raises:
        UsageError: groups of different sizes.
    """
    found = groups_of_columns.long()
    size = len(found) // groups
    expected = torch.arange(len(found)) // size
    if torch.equal(found, expected):
        return None
    if not torch.equal(found.sort().values, expected):
        raise UsageError(
            f"{name}: the columns of its groups number "
            f"{found.clamp(min=0).bincount().tolist()[:4]}…, not {size} each",
            remedy="quantize again with static groups (desc_act: false)",
        )
    return torch.argsort(found, stable=True)
