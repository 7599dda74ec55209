"""A quantized checkpoint on disk, open: its layers one by one, without a model in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit import model as models
from quantkit.checkpoint.formats import Reader, open_format
from quantkit.checkpoint.layer import StoredLayer
from quantkit.checkpoint.read import (
    TensorFiles,
    build_empty,
    read_quantization_config,
    stored_linears,
)
from quantkit.errors import QuantkitError, UsageError
from quantkit.schemes import Scheme


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint whose files are open.

    Attributes:
        folder: where it lies.
        config: transformers' config, without ``quantization_config``.
        reader: of its format.
        files: its tensors.
        schemes: of the quantized layers, by name.
        shapes: ``(out_features, in_features)`` of every linear layer, in the model's order.
        parameters: elements of the unquantized model, a tied head counted once.
    """

    folder: Path
    config: Any
    reader: Reader
    files: TensorFiles
    schemes: Mapping[str, Scheme]
    shapes: Mapping[str, tuple[int, int]]
    parameters: int

    def layer(self, name: str) -> StoredLayer:
        """A quantized layer's weight. Raises QuantkitError where it is damaged."""
        tensors = self.files.layer(name)
        tensors.pop("bias", None)
        return self.reader.layer(tensors, self.schemes[name], self.shapes[name], name)

    def plain(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that is not quantized, biases of quantized layers among them."""
        for key in self.files.names:
            module, _, leaf = key.rpartition(".")
            if module not in self.schemes or leaf == "bias":
                yield key, self.files.tensor(key)


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[OpenCheckpoint]:
    """Open a quantized checkpoint.

    Raises:
        UsageError: no such folder, not quantized, or a format that quantkit does not read.
        QuantkitError: a damaged file, or a config that matches no layer.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    raw = read_quantization_config(folder)
    if raw is None:
        raise UsageError(
            f"{folder}: is not quantized", remedy="quantize it with `quantkit calibrate`"
        )
    reader = open_format(raw)
    config = models.load_config(folder, str(folder))
    model = build_empty(config, torch.bfloat16)
    parameters = {id(p): p.numel() for p in model.parameters()}
    with TensorFiles(folder) as files:
        files.rename(models.memory_names(model, files.names))
        linears = stored_linears(model, files.names)
        schemes = reader.schemes(list(linears), set(files.names))
        if not schemes:
            raise QuantkitError(
                f"{folder}: the quantization_config ({reader.name}) matches no layer of the model"
            )
        yield OpenCheckpoint(
            folder=folder,
            config=config,
            reader=reader,
            files=files,
            schemes=schemes,
            shapes={
                name: (linear.out_features, linear.in_features)
                for name, linear in models.linear_layers(model).items()
            },
            parameters=sum(parameters.values()),
        )
