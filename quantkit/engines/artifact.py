"""What another engine has to know of a checkpoint, read from its config and manifest alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import model as models
from quantkit.checkpoint.config import read_cache_spec, read_hadamards, read_schemes
from quantkit.checkpoint.fields import as_integer, as_object, read_object
from quantkit.checkpoint.read import original_hash
from quantkit.checkpoint.write import manifest_if_any
from quantkit.schemes import QuantSpec, Scheme


@dataclass(frozen=True)
class Artifact:
    """A checkpoint that is to be served elsewhere.

    Attributes:
        folder: where it lies.
        schemes: distinct schemes of its linear layers; empty for an original model.
        kv: how it was calibrated to store keys and values, or None.
        dtype: of what is not quantized, such as ``bfloat16``; None where the config is silent.
        context: longest input in tokens, or None.
        size_bytes: of the weight files.
        bits_per_weight: by the manifest, or None.
        original: sha256 of the weights that it was made from, by the manifest, or None.
        rotated: whether inputs of layers are rotated at inference.
    """

    folder: Path
    schemes: tuple[Scheme, ...]
    kv: QuantSpec | None
    dtype: str | None
    context: int | None
    size_bytes: int
    bits_per_weight: float | None
    original: str | None = None
    rotated: bool = False

    @property
    def name(self) -> str:
        """The folder's own name, by which it is served."""
        return self.folder.resolve().name

    @property
    def quantized(self) -> bool:
        return bool(self.schemes)

    def weight_hash(self) -> str:
        """The sha256 that results files know the model by."""
        return models.weight_hash(models.hash_folder(self.folder))

    def cost(self) -> dict[str, Any]:
        """Size and bits per weight for a results file."""
        bits = {} if self.bits_per_weight is None else {"bits_per_weight": self.bits_per_weight}
        return {"size_bytes": self.size_bytes, **bits}


def read_artifact(source: str) -> Artifact:
    """Read a checkpoint folder, or whatever MODEL argument stands for one.

    Raises:
        UsageError: no such model, a config that is no JSON object, or a quantization that is not
            compressed-tensors.
        QuantkitError: a manifest that is none.
    """
    folder = models.resolve(source)
    config = read_object(folder / "config.json")
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config
    raw = as_object(config.get("quantization_config") or {}, "quantization_config")
    manifest = manifest_if_any(folder)
    context = text.get("max_position_embeddings")
    dtype = config.get("dtype") or config.get("torch_dtype") or text.get("dtype")
    return Artifact(
        folder=folder,
        schemes=tuple(read_schemes(raw)) if raw else (),
        kv=read_cache_spec(raw) if raw else None,
        dtype=dtype,
        context=None if context is None else as_integer(context, "max_position_embeddings"),
        size_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        bits_per_weight=manifest.get("bits_per_weight"),
        original=original_hash(manifest),
        rotated=bool(raw and read_hadamards(raw)),
    )
