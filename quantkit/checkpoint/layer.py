"""One quantized layer as a checkpoint holds it, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import QuantkitError, UsageError
from quantkit.numerics import QTensor, is_finite
from quantkit.schemes import QuantSpec

#: What scales may be stored in where the format leaves it to the model.
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


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
        """Scales in this shape; writers differ in the axes of one element.

        Args:
            key: local name.
            shape: of the result.
            dtype: what they are stored in; one of `FLOATS` by default.

        Raises:
            QuantkitError: they are missing, of another shape or dtype, or not all numbers.
        """
        tensor = self.take_shaped(key, shape)
        if tensor.dtype != dtype and (dtype is not None or tensor.dtype not in FLOATS):
            raise QuantkitError(
                f"{self.name}.{key}: is {tensor.dtype}, not {dtype or 'a float of 16 or 32 bits'}"
            )
        # E8M0 has one code for NaN (OCP MX specification v1.0, section 5.4.1).
        bad = bool((tensor == 255).any()) if dtype == torch.uint8 else not is_finite(tensor.float())
        if bad:
            raise QuantkitError(
                f"{self.name}.{key}: holds NaN or infinity where scales belong",
                remedy="the checkpoint is damaged; copy it again, or quantize anew",
            )
        return tensor

    def take_divisor(self, key: str) -> Tensor:
        """A scale ``[1]`` that something is divided by. Raises QuantkitError as `take_scales`, and
        where it is not above 0."""
        tensor = self.take_scales(key, (1,))
        if not float(tensor) > 0:
            raise QuantkitError(
                f"{self.name}.{key}: is {float(tensor):g}, which nothing can be divided by",
                remedy="the checkpoint is damaged; copy it again, or quantize anew",
            )
        return tensor

    def take_zero_points(self, key: str, shape: tuple[int, ...], spec: QuantSpec) -> Tensor:
        """Zero points int8 in this shape, one a byte or wider.

        Raises:
            QuantkitError: they are missing, of another shape, no integers, or out of the codes'
                range.
        """
        tensor = self.take_shaped(key, shape)
        if tensor.is_floating_point():
            raise QuantkitError(f"{self.name}.{key}: is {tensor.dtype}, not integers")
        self.check_codes(key, tensor, spec)
        return tensor.to(torch.int8)

    def take_shaped(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor in this shape, whatever its axes of one element are. Raises QuantkitError when
        it is missing or of another shape."""
        tensor = self.take(key)
        if [d for d in tensor.shape if d != 1] == [d for d in shape if d != 1]:
            return tensor.reshape(shape)
        return self.take(key, shape)  # which says what it found

    def check_codes(self, key: str, codes: Tensor, spec: QuantSpec) -> None:
        """Raise QuantkitError for integers that are no codes of this width."""
        low, high = int(spec.qmin), int(spec.qmax)
        if codes.numel() and not low <= int(codes.min()) <= int(codes.max()) <= high:
            raise QuantkitError(
                f"{self.name}.{key}: holds {int(codes.min())} to {int(codes.max())}, where "
                f"{spec.bits} bits are {low} to {high}",
                remedy="the config does not belong to these tensors",
            )

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
            f"{found.clamp(0, groups).bincount().tolist()[:4]}…, not {size} each",
            remedy="quantize again with static groups (desc_act: false)",
        )
    return torch.argsort(found, stable=True)
