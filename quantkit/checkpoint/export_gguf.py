"""Writing GGUF, which llama.cpp runs: one file of blocks, metadata and tokenizer.

Names and keys are those of the ``gguf`` library. Source for what llama.cpp expects of them:
llama.cpp, ``convert_hf_to_gguf.py`` and ``src/llama-model.cpp``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from quantkit.checkpoint.gguf_blocks import block_type, to_blocks
from quantkit.checkpoint.gguf_tokenizer import add_tokenizer
from quantkit.checkpoint.half import Rounding
from quantkit.checkpoint.opened import OpenCheckpoint
from quantkit.errors import UsageError
from quantkit.schemes import DType

if TYPE_CHECKING:
    import gguf


@dataclass(frozen=True)
class Architecture:
    """What a family is called in GGUF.

    Attributes:
        name: of the architecture.
        interleaved: rows of queries and keys are stored in pairs, as llama.cpp rotates them there.
    """

    name: str
    interleaved: bool = False


#: transformers' ``model_type`` → llama.cpp's architecture.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
}

_FILE_TYPES = {"Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0", "Q4_1": "MOSTLY_Q4_1"}
_FLOATS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class _Entry:
    """A tensor to write: its type, its bytes' shape, and what makes its bytes."""

    kind: str
    shape: tuple[int, ...]
    make: Callable[[], tuple[np.ndarray, Rounding]]


class _Written(np.ndarray[Any, np.dtype[Any]]):
    """An array that the gguf library writes to a file as Python does.

    numpy's own ``tofile`` raises errors without a number, and says nothing where the disk fills up
    as its buffer is written out.
    """

    def tofile(self, fid: Any, /, sep: str = "", format: str = "%s") -> None:
        """Write the bytes to a binary file."""
        fid.write(np.ascontiguousarray(self).data)


def write_gguf(source: OpenCheckpoint, path: Path) -> tuple[dict[str, int], Rounding, list[str]]:
    """Write a GGUF file: quantized layers as blocks of their own codes, norms and biases in fp32,
    all else in its own dtype.

    Args:
        source: the checkpoint; its tensors are read one at a time.
        path: of the file, which does not exist yet.

    Returns:
        tensors by GGUF type, the rounding of scales and offsets to fp16, and notes.

    Raises:
        UsageError: an architecture, layer or tokenizer that GGUF or llama.cpp cannot hold.
    """
    import gguf

    config = source.config
    if config.model_type not in ARCHITECTURES:
        raise UsageError(
            f"architecture {config.model_type!r}: quantkit writes GGUF for "
            f"{', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[config.model_type]
    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture.name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    entries = _entries(source, names, architecture)
    counts = Counter(entry.kind for entry in entries.values())
    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        notes = _add_metadata(writer, source, counts)
        add_tokenizer(writer, source.folder, config.vocab_size)
        for name, entry in entries.items():
            raw = None if entry.kind == "F32" else gguf.GGMLQuantizationType[entry.kind]
            dtype = np.dtype(np.float32 if raw is None else np.uint8)
            nbytes = math.prod(entry.shape) * dtype.itemsize
            writer.add_tensor_info(name, entry.shape, dtype, nbytes, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        rounding = Rounding()
        for entry in entries.values():
            data, cost = entry.make()
            assert data.shape == entry.shape
            writer.write_tensor_data(data.view(_Written))
            rounding += cost
    finally:
        writer.close()
    return dict(counts), rounding, notes


def _entries(
    source: OpenCheckpoint, names: gguf.TensorNameMap, architecture: Architecture
) -> dict[str, _Entry]:
    """Every tensor by its GGUF name."""
    import gguf

    found: dict[str, _Entry] = {}
    for layer, scheme in source.schemes.items():
        shape = source.shapes[layer]
        kind = block_type(scheme.weight, shape, layer)
        block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        rows = _row_order(f"{layer}.weight", source.config, architecture)
        found[_rename(f"{layer}.weight", names)] = _Entry(
            kind,
            (shape[0], shape[1] // block * width),
            partial(_blocks, source, layer, rows),
        )
    for key, tensor in source.plain():
        # llama.cpp adds and multiplies vectors in fp32.
        kind = "F32" if tensor.ndim == 1 else _FLOATS[tensor.dtype]
        size = tuple(tensor.shape)
        if kind != "F32":
            size = (*size[:-1], size[-1] * 2)
        rows = _row_order(key, source.config, architecture)
        found[_rename(key, names)] = _Entry(kind, size, partial(_floats, source, key, rows))
    factors = _rotary_factors(source.config)
    if factors is not None:
        data = factors.numpy()
        found["rope_freqs.weight"] = _Entry("F32", data.shape, lambda: (data, Rounding()))
    return found


def _blocks(source: OpenCheckpoint, layer: str, rows: Tensor | None) -> tuple[np.ndarray, Rounding]:
    stored = source.layer(layer)
    if stored.order is not None:
        raise UsageError(
            f"{layer}: its groups' columns are scattered (activation order), and a GGUF block is "
            "32 columns in a row",
            remedy="quantize again with static groups (desc_act: false)",
        )
    data, rounding = to_blocks(stored.weight, layer)
    return (data if rows is None else data[rows.numpy()]), rounding


def _floats(source: OpenCheckpoint, key: str, rows: Tensor | None) -> tuple[np.ndarray, Rounding]:
    tensor = source.files.tensor(key)
    if rows is not None:
        tensor = tensor[rows]
    if tensor.ndim == 1 or tensor.dtype == torch.float32:
        return tensor.float().numpy(), Rounding()
    return tensor.contiguous().view(torch.uint8).numpy(), Rounding()


def _rename(key: str, names: gguf.TensorNameMap) -> str:
    name = names.get_name(key, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise UsageError(f"{key}: has no name in this GGUF architecture")
    return name


def _row_order(key: str, config: Any, architecture: Architecture) -> Tensor | None:
    """Where llama.cpp's rotary embedding turns neighbours, not halves: each head's rows i and
    i + half side by side."""
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
    }.get(key.split(".")[-2])
    if not architecture.interleaved or heads is None:
        return None
    return torch.arange(heads * _head_dim(config)).reshape(heads, 2, -1).transpose(1, 2).flatten()


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _rotary_factors(config: Any) -> Tensor | None:
    """Llama 3's scaling as llama.cpp takes it: what divides each frequency, fp32 ``[head_dim/2]``.

    Raises:
        UsageError: another scaling that no key of GGUF says.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(
            f"rotary scaling {kind!r}: quantkit writes default, linear and llama3 to GGUF"
        )
    if kind != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = _head_dim(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return (plain / scaled).float()


def _context(config: Any) -> int:
    """Positions that llama.cpp's full attention computes as the model does."""
    length = int(config.max_position_embeddings)
    slides = config.model_type == "mistral" or "sliding_attention" in (
        getattr(config, "layer_types", None) or ()
    )
    window = getattr(config, "sliding_window", None)
    return min(length, int(window)) if slides and window else length


def _add_metadata(
    writer: gguf.GGUFWriter, source: OpenCheckpoint, counts: Mapping[str, int]
) -> list[str]:
    """Every key that llama.cpp needs. Returns what the file does not say."""
    import gguf

    config, rope = source.config, source.config.rope_parameters
    if config.hidden_act != "silu":
        raise UsageError(f"activation {config.hidden_act!r}: llama.cpp computes silu here")
    packed = Counter({k: v for k, v in counts.items() if k not in ("F32", "F16", "BF16")})
    commonest = packed.most_common(1)[0][0]
    file_type = _FILE_TYPES.get(commonest, "GUESSED")
    context = _context(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(source.folder.resolve().name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_vocab_size(config.vocab_size)
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    notes = []
    if any(scheme.input for scheme in source.schemes.values()):
        notes.append("weights only: llama.cpp rounds activations in its own way (Q8_0 blocks)")
    weights = [scheme.weight for scheme in source.schemes.values()]
    if any(spec.dtype is DType.INT and spec.bits < 4 for spec in weights):
        notes.append(
            "codes of fewer than 4 bits take 4: GGUF's own types of them round scales, too"
        )
    if context < config.max_position_embeddings:
        notes.append(
            f"context {context}: the model's sliding window, beyond which llama.cpp would attend"
        )
    return notes
