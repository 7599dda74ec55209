"""The files of a checkpoint folder: what its config says, and its tensors by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from quantkit import model as models
from quantkit.errors import QuantkitError, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def read_quantization_config(folder: Path) -> Mapping[str, Any] | None:
    """How a folder's model is quantized, or None where it is not.

    config.json's ``quantization_config``; or, in folders of older AutoGPTQ, a
    ``quantize_config.json`` beside it.

    Raises:
        UsageError: no config.json, or AutoAWQ's older ``quant_config.json`` alone.
        QuantkitError: not JSON.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise UsageError(f"{folder}: no config.json in this folder")
    found = _read(config).get("quantization_config")
    if found is not None:
        return found
    if (folder / "quantize_config.json").is_file():
        return {"quant_method": "gptq", **_read(folder / "quantize_config.json")}
    if (folder / "quant_config.json").is_file():
        raise UsageError(
            f"{folder}: quant_config.json without a quantization_config in config.json",
            remedy="save the model again with AutoAWQ 0.2 or newer",
        )
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise QuantkitError(f"{path}:{e.lineno}: not JSON ({e.msg})") from e


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


class TensorFiles:
    """A folder's safetensors as one mapping of names; a context manager.

    Args:
        folder: with one or more ``.safetensors``.

    Raises:
        QuantkitError: no such file, a file that is cut short, or a shard that the index names and
            the folder lacks.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self._files: dict[str, Any] = {}  # by name
        self._stored: dict[str, str] = {}  # the name in its file
        self._stack = ExitStack()
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise QuantkitError(
                f"{folder}: no .safetensors files", remedy="quantkit does not read pickled weights"
            )
        for path in paths:
            try:
                file = self._stack.enter_context(safe_open(path, "pt"))
            except (SafetensorError, OSError) as e:
                self._stack.close()
                raise QuantkitError(
                    f"{path}: truncated or not a safetensors file ({e})",
                    remedy="copy it again; `quantkit verify` compares hashes",
                ) from e
            self._files.update(dict.fromkeys(file.keys(), file))
        self._stored = {name: name for name in self._files}
        self._modules: dict[str, list[str]] = {}
        self._group()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def rename(self, names: Mapping[str, str]) -> None:
        """Call tensors by other names, such as those of the model in memory: old to new."""
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

    def tensor(self, name: str) -> Tensor:
        """One tensor. Raises QuantkitError when it is not there."""
        if name not in self._files:
            raise QuantkitError(
                f"{name}: missing from the checkpoint",
                remedy="the file is incomplete; copy it again",
            )
        return self._files[name].get_tensor(self._stored[name])

    def size(self, name: str) -> int:
        """Bytes of one tensor, from its file's header."""
        view = self._files[name].get_slice(self._stored[name])
        bits = re.search(r"\d+", view.get_dtype())  # such as F8_E4M3 or I64; BOOL has a byte
        return math.prod(view.get_shape()) * (int(bits[0]) // 8 if bits else 1)

    def layer(self, name: str) -> dict[str, Tensor]:
        """A module's tensors by local name."""
        return {key.rpartition(".")[2]: self.tensor(key) for key in self._modules.get(name, ())}
