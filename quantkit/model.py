"""Loading a causal language model, and finding the parts that quantization works on."""

from __future__ import annotations

import atexit
import hashlib
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.errors import QuantkitError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Where converted `.gguf` files are kept, by content hash.
CACHE = Path.home() / ".cache" / "quantkit"


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
    """Load an original model.

    Weights are memory-mapped and read on first touch, so a model costs what is used of it.
    One larger than ``max_memory`` keeps its blocks on disk through accelerate's offload
    hooks and brings each in when it runs.

    Args:
        source: a hub id, a local folder, or a `.gguf` file (dequantized to bf16).
        device: ``cpu`` or ``cuda``.
        dtype: of the weights; ``auto`` keeps the checkpoint's.
        max_memory: bytes of weights to hold at most; 80 % of what is free by default.

    Raises:
        UsageError: no such file or hub id, an unknown architecture, a model that is
            quantized already.
        QuantkitError: a truncated or damaged file.
    """
    import psutil
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, trust_remote_code=False, local_files_only=True, **placement
            )
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as e:
            raise QuantkitError(f"{source}: cannot be loaded ({_first_line(e)})") from e
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return SourceModel(model, tokenizer, source, folder, files)


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
        return _convert_gguf(path)
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
    """The model's config. Raises UsageError for an architecture transformers does not know."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    except (ValueError, OSError, KeyError) as e:
        raise UsageError(
            f"{source}: unknown architecture or damaged config.json ({_first_line(e)})",
            remedy="quantkit runs what transformers runs without remote code",
        ) from e
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(
            f"{source}: architecture {config.model_type!r} is not a causal language model"
        )
    return config


def _convert_gguf(path: Path) -> Path:
    """Dequantize a GGUF file to a bf16 folder, once; in a process of its own, so that the
    fp32 copies it makes never count against this one's memory."""
    digest = hash_file(path)
    import transformers

    folder = CACHE / "gguf" / f"{digest[:20]}-{transformers.__version__}"
    if folder.is_dir():
        return folder
    staging = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
    except OSError as e:
        raise UsageError(f"{staging}: cannot be created ({e.strerror})") from e
    child = multiprocessing.get_context("spawn").Process(
        target=_write_dequantized, args=(str(path), str(staging))
    )
    child.start()
    try:
        child.join()
    except BaseException:
        child.terminate()
        shutil.rmtree(staging, ignore_errors=True)
        raise
    report = staging / "error.txt"
    if child.exitcode != 0 or report.exists():
        reason = report.read_text() if report.exists() else f"exit code {child.exitcode}"
        shutil.rmtree(staging, ignore_errors=True)
        raise QuantkitError(f"{path}: cannot be dequantized ({reason})")
    try:
        os.replace(staging, folder)
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)
        if not folder.is_dir():  # else another process finished first
            raise
    return folder


def _write_dequantized(path: str, folder: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where, name = os.path.split(os.path.abspath(path))
    try:
        # transformers draws a bar of its own here, whatever its logging level is.
        with open(os.devnull, "w") as null, redirect_stderr(null), quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                where,
                gguf_file=name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
            if getattr(model.config, "quantization_config", None) is not None:
                del model.config.quantization_config
            model.config._name_or_path = name
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(folder)
    except Exception as e:  # the parent turns it into a QuantkitError
        Path(folder, "error.txt").write_text(_first_line(e))


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's repeated blocks and their name, such as ``model.layers``.

    Chosen as the ModuleList with the most linear parameters whose children are all of one
    class.

    Raises:
        UsageError: there is none.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if len({type(child) for child in module}) != 1:
            continue
        size = sum(
            m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear)
        )
        if size and (best is None or size > best[0]):
            best = (size, name, module)
    if best is None:
        raise UsageError(f"{type(model).__name__}: no list of decoder blocks was found")
    return best[1], best[2]


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by name, in the model's order; the head included."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def head_name(model: PreTrainedModel) -> str | None:
    """The name of the output head, or None."""
    head = model.get_output_embeddings()
    return next((name for name, m in model.named_modules() if m is head), None)


def embedding_shape(model: PreTrainedModel) -> tuple[int, int]:
    """(vocabulary size, hidden size) of the input embedding."""
    weight: Any = model.get_input_embeddings().weight
    return int(weight.shape[0]), int(weight.shape[1])


def is_tied(model: PreTrainedModel) -> bool:
    """True when the head and the input embedding are one tensor."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", 0)


def untie(model: PreTrainedModel) -> None:
    """Give the head a weight of its own, so that it can be quantized alone."""
    if is_tied(model):
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def bring_in(module: nn.Module, *, skip: nn.Module | None = None) -> None:
    """Load what accelerate left on disk into memory, for good, and take its hooks off.

    Args:
        module: with its submodules.
        skip: a part that stays where it is.
    """
    from accelerate.hooks import remove_hook_from_module
    from accelerate.utils import set_module_tensor_to_device

    stays = set(skip.modules()) if skip is not None else set()
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        if hook is None or part in stays:
            continue
        # Several hooks in a row are kept as one that holds the others.
        maps = [h.weights_map for h in getattr(hook, "hooks", [hook]) if _holds_weights(h)]
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                set_module_tensor_to_device(part, name, "cpu", value=maps[0][name])
        remove_hook_from_module(part)


def _holds_weights(hook: Any) -> bool:
    return getattr(hook, "weights_map", None) is not None


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule of this dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def hash_file(path: Path) -> str:
    """sha256 of a file's content, hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hash_folder(folder: Path) -> dict[str, str]:
    """sha256 of every file that determines a model: weights, config, tokenizer."""
    names = sorted(
        p.name
        for p in folder.iterdir()
        if p.is_file() and p.suffix in (".safetensors", ".json", ".model", ".jinja", ".txt")
    )
    return {name: hash_file(folder / name) for name in names}


def combine_hashes(hashes: dict[str, str]) -> str:
    """One sha256 over names and hashes, in name order."""
    text = "".join(f"{name} {digest}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def weight_hash(files: dict[str, str]) -> str:
    """One sha256 over the weight files and config among the hashes of `hash_folder`."""
    return combine_hashes(
        {n: h for n, h in files.items() if n.endswith((".safetensors", "config.json"))}
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over the vocabulary, special tokens and added tokens.

    Independent of how the tokenizer was serialized, so that an export keeps its source's.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    special = repr(sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items()))
    return hashlib.sha256((text + special).encode()).hexdigest()


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the chat template, or ``none``."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(str(template).encode()).hexdigest() if template else "none"


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
                f"{path}: truncated or not a safetensors file ({_first_line(e)})",
                remedy="copy or download it again",
            ) from e


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and advice while it loads."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
