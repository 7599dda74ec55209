"""An original model: found, loaded in its own dtype, and known by its hashes."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit.errors import QuantkitError, UsageError
from quantkit.model.experts import linearize
from quantkit.model.families import Family, auto_class, family_of
from quantkit.model.gguf import convert_gguf
from quantkit.model.hashes import hash_folder, template_hash, tokenizer_hash, weight_hash
from quantkit.model.names import check_layout
from quantkit.model.quiet import first_line, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class SourceModel:
    """An original model with its tokenizer.

    Attributes:
        model: in eval mode, in its own dtype unless another was asked for.
        tokenizer: with the chat template, if the source has one.
        source: what the user named.
        folder: the local folder of safetensors it was read from.
        files: name → sha256 of every file that determines the model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    folder: Path
    files: dict[str, str]

    @property
    def identity(self) -> dict[str, str]:
        """What a results file knows a model by: sha256 of weights, tokenizer, chat template."""
        return {
            "model": self.weight_hash,
            "tokenizer": tokenizer_hash(self.tokenizer),
            "chat_template": template_hash(self.tokenizer),
        }

    @property
    def family(self) -> Family:
        """What kind of model it is."""
        return family_of(self.model.config)

    @property
    def weight_hash(self) -> str:
        """One sha256 over the weight files and config."""
        return weight_hash(self.files)


def load_source(
    source: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype | str = "auto",
    max_memory: int | None = None,
) -> SourceModel:
    """Load an original model, its fused experts taken apart into linear layers.

    Weights are memory-mapped and read on first touch, so a model costs what is used of it.
    One larger than ``max_memory`` keeps its blocks on disk through accelerate's offload
    hooks and brings each in when it runs.

    Args:
        source: a hub id, a local folder, or a `.gguf` file (dequantized to bf16).
        device: ``cpu`` or ``cuda``.
        dtype: of the weights; ``auto`` keeps the checkpoint's.
        max_memory: bytes of weights to hold at most; 80 % of what is free by default.

    Raises:
        UsageError: no such file or hub id, an unknown architecture, experts of an unknown form,
            a model that is quantized already.
        QuantkitError: a truncated or damaged file.
    """
    import psutil

    folder = resolve(source)
    config = load_config(folder, source)
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(
            f"{source}: is quantized already "
            f"({config.quantization_config.get('quant_method', 'unknown method')})",
            remedy="start from the original model",
        )
    files = hash_folder(folder)
    _check_safetensors(folder)
    budget = max_memory or int(psutil.virtual_memory().available * 0.8)
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    placement: dict[str, Any] = {"device_map": {"": device}}
    if device == "cpu" and size > budget:
        # Safetensors are read where they lie; what has no file of its own goes here, and is
        # removed with the process.
        offload = tempfile.mkdtemp(prefix="quantkit-offload-")
        atexit.register(shutil.rmtree, offload, ignore_errors=True)
        placement = {
            "device_map": "auto",
            "max_memory": {"cpu": budget},
            "offload_folder": offload,
        }
    with quiet_transformers():
        try:
            model = auto_class(config).from_pretrained(
                folder, dtype=dtype, trust_remote_code=False, local_files_only=True, **placement
            )
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as e:
            raise QuantkitError(f"{source}: cannot be loaded ({first_line(e)})") from e
    tokenizer = read_tokenizer(folder, source)
    check_layout(model)
    linearize(model)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return SourceModel(model, tokenizer, source, folder, files)


def read_tokenizer(folder: Path, source: str) -> PreTrainedTokenizerBase:
    """A folder's tokenizer.

    Args:
        folder: with the tokenizer's files.
        source: what the user named, for messages.

    Raises:
        QuantkitError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    except Exception as e:  # the tokenizers library raises nothing narrower
        raise QuantkitError(
            f"{source}: has no tokenizer that can be loaded ({first_line(e)})",
            remedy="copy the tokenizer's files from the original model",
        ) from e


def resolve(source: str) -> Path:
    """The local folder of safetensors behind a MODEL argument.

    A `.gguf` file is converted once into the cache; a hub id is fetched through
    huggingface_hub's own cache.

    Raises:
        UsageError: there is no such thing.
    """
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"{source}: no such file")
        return convert_gguf(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(
                f"{source}: no config.json in this folder",
                remedy="name a folder that transformers can load",
            )
        return path
    if path.exists():
        raise UsageError(
            f"{source}: is a file", remedy="MODEL is a hub id, a local folder or a .gguf file"
        )
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UsageError(
            f"{source}: no such folder", remedy="MODEL is a hub id, a local folder or a .gguf file"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(source, ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.onnx*"])
        )
    except HFValidationError as e:
        raise UsageError(
            f"{source}: neither a local folder, a .gguf file nor a hub id",
            remedy="MODEL is a hub id, a local folder or a .gguf file",
        ) from e
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        raise UsageError(
            f"{source}: neither a local folder, a .gguf file nor a model that the hub gave "
            f"({type(e).__name__})",
            remedy="check the name, the network and your hub token",
        ) from e


def load_config(folder: Path, source: str) -> Any:
    """The model's config.

    Raises:
        UsageError: an architecture that transformers does not know, or of no family.
    """
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    except Exception as e:  # a damaged config raises whatever its first wrong value meets
        raise UsageError(
            f"{source}: unknown architecture or damaged config.json ({first_line(e)})",
            remedy="quantkit runs what transformers runs without remote code",
        ) from e
    try:
        family_of(config)
    except UsageError as e:
        raise UsageError(f"{source}: {e.message}", remedy=e.remedy) from e
    return config


def _check_safetensors(folder: Path) -> None:
    """Raise QuantkitError for a weight file that is cut short or not safetensors."""
    from safetensors import SafetensorError, safe_open

    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UsageError(
            f"{folder}: no .safetensors files", remedy="quantkit does not read pickled weights"
        )
    for path in paths:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as e:
            raise QuantkitError(
                f"{path}: truncated or not a safetensors file ({first_line(e)})",
                remedy="copy or download it again",
            ) from e
