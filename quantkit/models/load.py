"""Loading what will be scored or served: a quantized checkpoint or an original model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkit import memory, ops
from quantkit import model as models
from quantkit.checkpoint.formats import Reader, open_format
from quantkit.checkpoint.read import (
    TensorFiles,
    build_empty,
    original_hash,
    read_quantization_config,
    stored_linears,
)
from quantkit.checkpoint.write import manifest_if_any
from quantkit.errors import KernelMissingError, QuantkitError, UsageError
from quantkit.kv_cache import SIDES, CacheEntry, find_attentions, install_entry
from quantkit.layers import QuantLinear
from quantkit.models.llama_family import build_decoder, why_not
from quantkit.models.runtime import Runtime
from quantkit.models.streamed import StreamedLinear
from quantkit.ops.page_store import CacheScales
from quantkit.schemes import DType, QuantSpec, Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CAUSAL = models.FAMILIES["causal"]

#: How a model computes; what came of it is part of every results file's fingerprint.
KERNELS: Mapping[str, str] = MappingProxyType(
    {
        "native": "the native decoder where the architecture has one, else native layers in "
        "transformers' modules; 4- and 8-bit weights meet int8 activations",
        "native-float": "the same with activations as the checkpoint's scheme says",
        "modules": "native layers in transformers' modules",
        "reference": "plain torch: the oracle",
    }
)


#: Bytes of the smallest buffer that is mapped by itself: glibc's own, before it rises.
_MAPPED = 128 << 10


def load_runtime(
    source: str | Path,
    *,
    kernels: str = "native",
    device: str = "cpu",
    dtype: torch.dtype | str = "auto",
    streamed: bool = False,
) -> Runtime:
    """Load a quantized checkpoint, or an original model as the reference.

    Args:
        source: a quantized checkpoint, quantkit's own or one of another program in a format of
            `quantkit.checkpoint.formats.READERS`, or an original model; as a local folder, a hub
            id or, dequantized, a `.gguf` file.
        kernels: a key of `KERNELS`.
        device: ``cpu`` or ``cuda``.
        dtype: of activations and of what is not quantized; the checkpoint's by default.
        streamed: quantized layers stay on disk and are read whenever they run
            (`quantkit.models.streamed`); they compute in the reference kernels only.

    Raises:
        UsageError: no such model, a format quantkit does not run, or layers that are to stay on
            disk in other kernels than the reference's.
        QuantkitError: a missing or damaged tensor.
        KernelMissingError: the native library is not built, or has no kernel for a layer there.
    """
    check_target(kernels, device)
    with memory.bounded_heap(_MAPPED):
        runtime = _load(source, kernels, device, dtype, streamed=streamed)
    memory.trim_heap()
    return runtime


def _load(
    source: str | Path, kernels: str, device: str, dtype: torch.dtype | str, *, streamed: bool
) -> Runtime:
    """See `load_runtime`, whose arguments these are, but for a target that was checked."""
    if streamed and kernels != "reference":
        raise UsageError(
            f"kernels {kernels!r}: layers that stay on disk compute in the reference kernels only",
            remedy="take kernels='reference', or streamed=False",
        )
    path = Path(source)
    raw: Mapping[str, Any] | None = None
    if path.suffix != ".gguf" or path.is_dir():
        path = path if path.is_dir() else models.resolve(str(source))
        raw = read_quantization_config(path)
    layers = "reference" if kernels == "reference" else "native"
    if raw is None:
        runtime = _load_original(str(source), device, dtype)
    else:
        runtime = _load_quantized(
            path, str(source), open_format(raw), layers, device, dtype, streamed=streamed
        )
    if kernels in ("modules", "reference"):
        return _in_modules(runtime, f"--kernels {kernels} was asked for")
    family = models.family_of(runtime.model.config)
    reason = f"the native decoder runs no {family.title}" if family is not CAUSAL else None
    reason = reason or why_not(runtime.model)
    if reason is not None:
        return _in_modules(runtime, reason)
    decoder = build_decoder(
        runtime.model,
        activations="float" if kernels == "native-float" else "auto",
        cache_scales=_cache_scales(runtime),
    )
    # All parallel work is the decoder's: its own pool has the shorter barrier.
    ops.set_thread_pool("own")
    fingerprint = {**runtime.fingerprint, "kernels": f"decoder/{decoder.numerics}"}
    return replace(runtime, decoder=decoder, fingerprint=fingerprint)


def check_target(kernels: str, device: str) -> None:
    """Raise UsageError for kernels that are no key of `KERNELS`, or a device that is not there."""
    if kernels not in KERNELS:
        raise UsageError(f"kernels {kernels!r}: one of {', '.join(KERNELS)}")
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if found is None:
        raise UsageError(
            f"device {device}: not one that quantkit runs on", remedy="use cpu, cuda or cuda:1"
        )
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise UsageError(f"device {device}: torch sees no CUDA device", remedy="use --device cpu")
    if int(found[1] or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {device}: torch sees {torch.cuda.device_count()} CUDA devices",
            remedy="they are numbered from 0",
        )


def _in_modules(runtime: Runtime, reason: str) -> Runtime:
    """A runtime that goes through transformers' modules, and says why."""
    if any(isinstance(m, QuantLinear) and m.kernels == "native" for m in runtime.model.modules()):
        # The modules around our layers are torch's, whose threads spin for a while after each
        # operation on the cores that a pool of our own would need: one pool is 1.4× faster.
        ops.set_thread_pool("torch")
    return replace(runtime, fallback=reason)


def _load_original(source: str, device: str, dtype: torch.dtype | str) -> Runtime:
    loaded = models.load_source(source, device=device, dtype=dtype)
    size = sum(p.stat().st_size for p in loaded.folder.glob("*.safetensors"))
    bits = torch.finfo(loaded.model.dtype).bits
    return Runtime(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        name=source,
        fingerprint=_fingerprint(loaded, "torch", device),
        size_bytes=size,
        bits_per_weight=float(bits),
    )


def _load_quantized(
    folder: Path,
    source: str,
    reader: Reader,
    kernels: str,
    device: str,
    dtype: torch.dtype | str,
    *,
    streamed: bool,
) -> Runtime:
    config = models.load_config(folder, str(folder))
    wanted = config.dtype if dtype == "auto" else dtype
    wanted = getattr(torch, wanted) if isinstance(wanted, str) else wanted or torch.float32
    model = build_empty(config, wanted)
    cache_spec = reader.cache_spec()
    attentions = find_attentions(model, models.find_blocks(model)[0]) if cache_spec else {}
    with ExitStack() as opened:
        files = TensorFiles(folder)
        if not streamed:  # else its layers keep it open
            opened.enter_context(files)
        files.rename(models.memory_names(model, files.names))
        size, bits, scales = _fill(
            model, files, reader, attentions, kernels, wanted, streamed=streamed
        )
    if device != "cpu":
        _check_kernels(model, folder)
    caches = {}
    for name, found in scales.items():
        assert cache_spec is not None
        caches[name] = CacheEntry(cache_spec, found)
        install_entry(attentions[name], caches[name])
    _set_generation(model, folder)
    tokenizer = models.read_tokenizer(folder, source)
    model.eval().to(device)
    manifest = manifest_if_any(folder)
    made_from = original_hash(manifest)
    hashes = models.hash_folder(folder)
    loaded = models.SourceModel(model, tokenizer, source, folder, hashes)
    kinds = sorted({m.kind for m in model.modules() if isinstance(m, QuantLinear)})
    numerics = f"{kernels}/{'+'.join(kinds)}" if kernels == "native" else kernels
    if reader.hadamards():
        numerics += "+rotated"
    if cache_spec is not None:
        numerics += f"+kv-{_cache_dtype(cache_spec)}-static"
    return Runtime(
        model=model,
        tokenizer=tokenizer,
        name=source,
        fingerprint={
            **_fingerprint(loaded, numerics, device),
            **({} if made_from is None else {"original": made_from}),
        },
        size_bytes=size,
        bits_per_weight=bits,
        manifest=manifest,
        caches=caches,
    )


def _check_kernels(model: nn.Module, folder: Path) -> None:
    """Raise KernelMissingError for a layer that transformers' modules cannot run on a GPU."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and module.kind == "w8a8":
            raise KernelMissingError(
                f"{folder}: {name} multiplies int8 by int8, which has no CUDA kernel in "
                "transformers' modules",
                remedy="use --device cpu, or --kernels reference",
            )


def _set_generation(model: PreTrainedModel, folder: Path) -> None:
    """The folder's own settings of generation, such as the tokens that end a text, if it has any.

    Raises:
        QuantkitError: a file that transformers cannot read.
    """
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not path.exists():
        return
    try:
        with models.quiet_transformers():
            found = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # a damaged file raises whatever its first wrong value meets
        raise QuantkitError(
            f"{path}: cannot be loaded ({models.first_line(e)})",
            remedy="copy it from the original model, or remove it",
        ) from e
    model.generation_config = found


def _cache_dtype(spec: QuantSpec) -> str:
    """A key of `quantkit.ops.page_store.KV_DTYPES`."""
    return "fp8" if spec.dtype is DType.FLOAT else "int8"


def _cache_scales(runtime: Runtime) -> CacheScales | None:
    """The calibrated scales of keys and values as the native decoder takes them."""
    if not runtime.caches:
        return None
    entries = list(runtime.caches.values())
    sides = [[entry.keys.scale, entry.values.scale] for entry in entries]
    fixed = torch.tensor(
        [[float(x) for x in pair if x is not None] for pair in sides], dtype=torch.float32
    )
    return CacheScales(_cache_dtype(entries[0].keys.spec), fixed)


def _fill(
    model: PreTrainedModel,
    files: TensorFiles,
    reader: Reader,
    attentions: Mapping[str, nn.Module],
    kernels: str,
    dtype: torch.dtype,
    *,
    streamed: bool,
) -> tuple[int, float, dict[str, dict[str, Tensor]]]:
    """Replace layers and fill parameters.

    Returns:
        bytes, bits a quantized weight, and the cache scales of each attention module.
    """
    linears = stored_linears(model, files.names)
    schemes = reader.schemes(list(linears), set(files.names))
    if not schemes:
        raise QuantkitError(
            f"{files.folder}: the quantization_config ({reader.name}) matches no layer of the model"
        )
    plain = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    scales: dict[str, dict[str, Tensor]] = {name: {} for name in attentions}
    size = 0
    for key in files.names:
        module, _, leaf = key.rpartition(".")
        if module in schemes:
            continue
        tensor = files.tensor(key)
        size += tensor.numel() * tensor.element_size()
        if module in scales and leaf in SIDES:
            scales[module][leaf] = _cache_scale(key, tensor)
        elif key in plain:
            _assign(model, key, tensor.to(dtype) if tensor.is_floating_point() else tensor)
        else:
            raise QuantkitError(f"{files.folder}: tensor {key} belongs to no layer of the model")
    for name, sides in scales.items():
        for side in SIDES:
            if side not in sides:
                raise QuantkitError(
                    f"{name}.{side}: missing from the checkpoint",
                    remedy="the file is incomplete; `quantkit verify` names all that is missing",
                )
    stored = 0
    for name, scheme in schemes.items():
        linear = linears[name]
        shape = (linear.out_features, linear.in_features)
        parts = files.layer(name)
        stored += sum(t.numel() * t.element_size() for t in parts.values())
        _check_bias(name, linear.bias, parts.get("bias"))
        read = partial(_read_layer, files, reader, name, scheme, shape, kernels, dtype)
        layer = StreamedLinear(read, shape) if streamed else read()
        models.set_submodule(model, name, layer)
    memory.trim_heap()  # of what unpacking left free between layers that stay
    model.tie_weights()
    empty = [n for n, p in model.named_parameters() if p.is_meta]
    if empty:
        raise QuantkitError(
            f"{empty[0]}: missing from the checkpoint ({len(empty)} tensors in all)",
            remedy="`quantkit verify` compares it with its manifest",
        )
    weights = sum(linears[n].out_features * linears[n].in_features for n in schemes)
    return size + stored, 8 * stored / weights, scales


def _check_bias(name: str, bias: Tensor | None, stored: Tensor | None) -> None:
    """Raise QuantkitError where a layer has a bias and the files have none, or the other way round:
    some writers store zeros for a bias that the model lacks."""
    if bias is not None and stored is None:
        raise QuantkitError(
            f"{name}.bias: missing from the checkpoint",
            remedy="the file is incomplete; copy it again",
        )
    if bias is None and stored is not None and stored.count_nonzero():
        raise QuantkitError(
            f"{name}.bias: stored, where the model has none",
            remedy="config.json does not belong to these tensors",
        )


def _read_layer(
    files: TensorFiles,
    reader: Reader,
    name: str,
    scheme: Scheme,
    shape: tuple[int, int],
    kernels: str,
    dtype: torch.dtype,
) -> QuantLinear:
    """One layer from the files, whose pages leave memory again."""
    parts = files.layer(name)
    stored = list(parts.values())
    bias = parts.pop("bias", None)
    if bias is not None and tuple(bias.shape) != shape[:1]:
        raise QuantkitError(
            f"{name}.bias: stored as {list(bias.shape)} where the layer has {[shape[0]]}"
        )
    found = reader.layer(parts, scheme, shape, name)
    layer = QuantLinear(
        found.weight,
        scheme,
        None if bias is None else bias.to(dtype),
        found.input_scale,
        kernels=kernels,
        order=found.order,
        hadamard=found.hadamard,
    )
    for tensor in stored:
        if tensor.numel() * tensor.element_size() >= memory.FORGOTTEN:
            memory.forget_pages(tensor)
    return layer


def _cache_scale(key: str, tensor: Tensor) -> Tensor:
    """A calibrated scale ``[1]``.

    Raises:
        QuantkitError: it is not one positive number.
    """
    if tensor.numel() != 1 or not 0 < float(tensor) < math.inf:
        raise QuantkitError(
            f"{key}: {tensor.flatten()[:4].tolist()} is not one positive scale",
            remedy="quantkit runs caches with one scale a layer: calibrate with kv_cache: fp8",
        )
    return tensor.reshape(1)


def _assign(model: nn.Module, key: str, tensor: Tensor) -> None:
    module, _, leaf = key.rpartition(".")
    owner = model.get_submodule(module)
    current = getattr(owner, leaf)
    if tuple(current.shape) != tuple(tensor.shape):
        raise QuantkitError(
            f"{key}: stored as {list(tensor.shape)} where the model has {list(current.shape)}"
        )
    if current.is_floating_point() and not tensor.is_floating_point():
        raise QuantkitError(f"{key}: is {tensor.dtype} where the model has {current.dtype}")
    if isinstance(current, nn.Parameter):
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        owner.register_buffer(
            leaf, tensor, persistent=leaf not in owner._non_persistent_buffers_set
        )


def _fingerprint(loaded: models.SourceModel, kernels: str, device: str) -> dict[str, Any]:
    return {
        **loaded.identity,
        "kernels": kernels,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": device,
    }
