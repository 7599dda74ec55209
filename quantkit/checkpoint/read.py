"""The files of a checkpoint folder: what its config says, and its tensors by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from quantkit import model as models
from quantkit.checkpoint.fields import as_object, read_object
from quantkit.errors import QuantkitError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


def read_quantization_config(folder: Path) -> Mapping[str, Any] | None:
    """How a folder's model is quantized, or None where it is not.

    config.json's ``quantization_config``; or, in folders of older AutoGPTQ, a
    ``quantize_config.json`` beside it.

    Raises:
        UsageError: no config.json, one that is no JSON object, or AutoAWQ's older
            ``quant_config.json`` alone.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise UsageError(f"{folder}: no config.json in this folder")
    found = read_object(config).get("quantization_config")
    if found is not None:
        return as_object(found, f"{config}: quantization_config")
    if (folder / "quantize_config.json").is_file():
        return {"quant_method": "gptq", **read_object(folder / "quantize_config.json")}
    if (folder / "quant_config.json").is_file():
        raise UsageError(
            f"{folder}: quant_config.json without a quantization_config in config.json",
            remedy="save the model again with AutoAWQ 0.2 or newer",
        )
    return None


def original_hash(manifest: Mapping[str, Any]) -> str | None:
    """The hash of the weights that a checkpoint was made from; None where none is noted."""
    source = manifest.get("source")
    found = source.get("hash") if isinstance(source, Mapping) else None
    return found if isinstance(found, str) else None


def build_empty(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config without its weights: parameters on the meta device, buffers real.

    Args:
        config: a transformers config; its ``quantization_config`` is taken off.
        dtype: of the parameters.
    """
    from accelerate import init_empty_weights

    if hasattr(config, "quantization_config"):
        del config.quantization_config  # or transformers would replace layers by its own
    with models.quiet_transformers(), init_empty_weights(include_buffers=False):
        auto = models.auto_class(config)
        model: PreTrainedModel = auto.from_config(config, dtype=dtype, trust_remote_code=False)
        models.linearize(model)
    return model


def stored_linears(model: PreTrainedModel, names: Iterable[str]) -> dict[str, nn.Linear]:
    """The linear layers that a checkpoint may hold quantized: all but a tied head without tensors
    of its own. AutoRound names it among those that it quantized, and stores the embedding alone.

    Args:
        model: its config's.
        names: of the checkpoint's tensors, as the model has them.
    """
    linears = models.linear_layers(model)
    # Without weights both are tensors of their own whatever the config says.
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    head = models.head_name(model) if tied else None
    if head is not None and not any(name.rpartition(".")[0] == head for name in names):
        linears.pop(head, None)
    return linears


#: Beside several files: which of them holds a tensor.
INDEX = "model.safetensors.index.json"


class TensorFiles:
    """A folder's safetensors as one mapping of names; a context manager.

    Args:
        folder: with one or more ``.safetensors``.

    Raises:
        QuantkitError: no such file, a file that is cut short, a tensor in two files, or one that
            the index names and no file holds.
        UsageError: an index that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}  # by name
        self._stored: dict[str, str] = {}  # the name in its file
        self._stack = ExitStack()
        try:
            self._open()
            self._check_index()
        except BaseException:
            self._stack.close()
            raise
        self._stored = {name: name for name in self._files}
        self._modules: dict[str, list[str]] = {}
        self._group()

    def _open(self) -> None:
        from safetensors import SafetensorError, safe_open

        paths = sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise QuantkitError(
                f"{self.folder}: no .safetensors files",
                remedy="quantkit does not read pickled weights",
            )
        for path in paths:
            try:
                file = self._stack.enter_context(safe_open(path, "pt"))
            except (SafetensorError, OSError) as e:
                raise QuantkitError(
                    f"{path}: truncated or not a safetensors file ({e})",
                    remedy="copy it again; `quantkit verify` compares hashes",
                ) from e
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name in self._files:
                    raise QuantkitError(
                        f"{path}: {name} is in another file of the folder, too",
                        remedy="keep the files of one checkpoint in the folder",
                    )
                self._files[name] = file

    def _check_index(self) -> None:
        index = self.folder / INDEX
        if not index.is_file():
            return
        listed = as_object(read_object(index).get("weight_map"), f"{index}: weight_map")
        missing = [name for name in listed if name not in self._files]
        if missing:
            raise QuantkitError(
                f"{self.folder}: {missing[0]} is missing, which the index places in "
                f"{listed[missing[0]]} ({len(missing)} tensors in all)",
                remedy="the folder is incomplete; copy it again",
            )

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def rename(self, names: Mapping[str, str]) -> None:
        """Call tensors by other names, such as those of the model in memory: old to new.

        Raises:
            QuantkitError: two tensors would have the same name.
        """
        taken: dict[str, str] = {}
        for old, stored in self._stored.items():
            other = taken.setdefault(names[old], stored)
            if other != stored:
                raise QuantkitError(
                    f"{self.folder}: {other} and {stored} are both {names[old]} in the model",
                    remedy="the files hold tensors of two checkpoints; copy one of them anew",
                )
        self._files = {names[old]: file for old, file in self._files.items()}
        self._stored = {names[old]: stored for old, stored in self._stored.items()}
        self._group()

    def _group(self) -> None:
        self._modules = {}
        for name in self._files:
            self._modules.setdefault(name.rpartition(".")[0], []).append(name)

    @property
    def names(self) -> list[str]:
        """Of every tensor, file by file."""
        return list(self._files)

    def stored_name(self, name: str) -> str:
        """A tensor's name in its file."""
        return self._stored[name]

    def stored_module(self, name: str) -> str:
        """The name that a module's tensors have in their file."""
        return self._stored[self._modules[name][0]].rpartition(".")[0]

    def tensor(self, name: str) -> Tensor:
        """One tensor. Raises QuantkitError when it is not there, or of a type that torch lacks."""
        if name not in self._files:
            raise QuantkitError(
                f"{name}: missing from the checkpoint",
                remedy="the file is incomplete; copy it again",
            )
        try:
            found: Tensor = self._files[name].get_tensor(self._stored[name])
        except Exception as e:  # safetensors' own, or whatever torch makes of a type it lacks
            raise QuantkitError(
                f"{self.folder}: {name}: cannot be read ({models.first_line(e)})",
                remedy="the file is damaged, or holds a type of numbers that torch lacks",
            ) from e
        return found

    def size(self, name: str) -> int:
        """Bytes of one tensor, from its file's header."""
        view = self._files[name].get_slice(self._stored[name])
        bits = re.search(r"\d+", view.get_dtype())  # such as F4, F8_E4M3 or I64; BOOL has a byte
        return math.prod(view.get_shape()) * (int(bits[0]) if bits else 8) // 8

    def layer(self, name: str) -> dict[str, Tensor]:
        """A module's tensors by local name."""
        return {key.rpartition(".")[2]: self.tensor(key) for key in self._modules.get(name, ())}
