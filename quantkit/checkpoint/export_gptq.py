"""Writing GPTQ's format; see `quantkit.checkpoint.gptq` for what it is."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit import __version__, packing
from quantkit import model as models
from quantkit.checkpoint.fields import read_object
from quantkit.checkpoint.half import Rounding, to_half
from quantkit.checkpoint.layer import StoredLayer
from quantkit.checkpoint.opened import OpenCheckpoint
from quantkit.checkpoint.options import BITS
from quantkit.checkpoint.read import INDEX
from quantkit.checkpoint.shards import write_tensors
from quantkit.checkpoint.write import MANIFEST
from quantkit.errors import UsageError
from quantkit.schemes import DType, Granularity, QuantSpec, Scheme

#: Files beside the weights that are written anew or belong to the old format.
_NOT_COPIED = ("config.json", "quantize_config.json", "quant_config.json", MANIFEST, INDEX)


def write_gptq(source: OpenCheckpoint, folder: Path) -> tuple[dict[str, int], Rounding, list[str]]:
    """Write a folder in GPTQ's format, its tensors named as in the files they came from.

    Zero points are in version 1 wherever it can hold them, else the whole checkpoint is in
    version 2.

    Args:
        source: the checkpoint.
        folder: to be made.

    Returns:
        tensors by storage type, the rounding of scales to fp16, and notes.

    Raises:
        UsageError: a scheme that the format cannot hold.
    """
    for name, scheme in source.schemes.items():
        _check(name, scheme, source.shapes[name])
    # Layers are read twice, so that one at a time is in memory.
    version, ordered = 1, False
    for name in source.schemes:
        layer = source.layer(name)
        version = version if _fits_version_1(layer) else 2
        ordered |= layer.order is not None
    files = source.files
    counts: Counter[str] = Counter()
    rounding = Rounding()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal rounding
        for key, tensor in source.plain():
            counts[str(tensor.dtype).removeprefix("torch.")] += 1
            yield files.stored_name(key), tensor.contiguous()
        for name in source.schemes:
            layer = source.layer(name)
            packed, cost = to_gptq(layer, version, name)
            rounding += cost
            counts[f"int{layer.weight.spec.bits}"] += 1
            stem = files.stored_module(name)
            yield from ((f"{stem}.{key}", tensor) for key, tensor in packed.items())

    folder.mkdir()
    write_tensors(folder, tensors())
    config = read_object(source.folder / "config.json")
    config["quantization_config"] = _config(source, version, ordered)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in models.hash_folder(source.folder):
        if file not in _NOT_COPIED and not file.endswith(".safetensors"):
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(source.folder / file, folder / file)
    notes = []
    if version == 2:
        notes.append("zero points of 0: written as gptq_v2, which AutoGPTQ itself does not read")
    return dict(counts), rounding, notes


def to_gptq(layer: StoredLayer, version: int, name: str) -> tuple[dict[str, Tensor], Rounding]:
    """A layer's tensors by local name, and what its scales lost in fp16.

    Args:
        layer: integer codes of a width in `BITS`, in groups or a group a row.
        version: 1 stores zero points less one, 2 as they are.
        name: of the layer, for messages.
    """
    q, (n, k) = layer.weight, layer.weight.shape
    scale, rounding = to_half(q.scale.reshape(n, -1), name)
    groups = scale.shape[1]
    codes = q.codes
    columns = torch.arange(k, dtype=torch.int32) // (k // groups)
    if layer.order is not None:
        codes, of_columns = torch.empty_like(q.codes), torch.empty_like(columns)
        codes[:, layer.order] = q.codes
        of_columns[layer.order] = columns
        columns = of_columns
    zero = torch.zeros(n, groups, dtype=torch.int8) if q.zero is None else q.zero.reshape(n, -1)
    stored = zero - (2 - version)
    tensors = {
        "qweight": packing.pack_int(codes.t().contiguous(), q.spec.bits, dim=0),
        "qzeros": packing.pack_int(stored.t().contiguous(), q.spec.bits),
        "scales": scale.t().contiguous(),
        "g_idx": columns,
    }
    return tensors, rounding


def _fits_version_1(layer: StoredLayer) -> bool:
    """No zero point is the lowest code, which less one has no code."""
    zero, spec = layer.weight.zero, layer.weight.spec
    return zero is None or not bool((zero == int(spec.qmin)).any())


def _check(name: str, scheme: Scheme, shape: tuple[int, int]) -> None:
    spec = scheme.weight
    grouped = spec.granularity in (Granularity.GROUP, Granularity.CHANNEL)
    if spec.dtype is not DType.INT or spec.bits not in BITS or not grouped:
        raise UsageError(
            f"{name}: {spec.label()}, and GPTQ's format holds integers of "
            f"{', '.join(map(str, BITS))} bits in groups or channels",
            remedy="calibrate with a scheme such as w4a16-g128 or w8a16",
        )
    if scheme.input is not None:
        raise UsageError(
            f"{name}: {scheme.input.label()} activations, and GPTQ's format holds weights only",
            remedy="calibrate with the weight-only scheme, such as w8a16",
        )
    if shape[0] % 32 or shape[1] % 32:
        raise UsageError(
            f"{name}: {list(shape)}, and GPTQ's format packs 32 outputs and 32 inputs at a time",
            remedy="keep the layer in 16 bits (keep: in the recipe)",
        )


def _config(source: OpenCheckpoint, version: int, ordered: bool) -> dict[str, Any]:
    """``quantization_config``: the commonest spec for all, ``dynamic`` rules for the others.

    A layer whose name in memory is not the one on disk has a rule for each: transformers looks for
    the first, vLLM for the second.
    """
    schemes = source.schemes
    specs = Counter(scheme.weight for scheme in schemes.values())
    usual = specs.most_common(1)[0][0]
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "pack_dtype": "int32",
        **_values(usual),
        "desc_act": ordered,
        "lm_head": "lm_head" in schemes,
        "meta": {"quantizer": [f"quantkit:{__version__}"]},
    }
    others = {n: s.weight for n, s in schemes.items() if s.weight != usual}
    if others:
        config["dynamic"] = {
            f"+:{re.escape(both)}$": _values(spec)
            for name, spec in others.items()
            for both in (name, source.files.stored_module(name))
        }
    return config


def _values(spec: QuantSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": spec.group_size or -1, "sym": spec.symmetric}
