"""Writing a checkpoint: everything into a staging folder, then one rename."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor

from quantkit import __version__, memory
from quantkit import model as models
from quantkit.checkpoint.config import build_config
from quantkit.checkpoint.shards import write_tensors
from quantkit.checkpoint.tensors import to_disk
from quantkit.data.card import read_card, source_name
from quantkit.errors import QuantkitError, UsageError
from quantkit.integrity import check_tensors
from quantkit.kv_cache import CacheRange
from quantkit.plan import Plan
from quantkit.quantize import QuantizedLayer
from quantkit.results import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MANIFEST = "quantkit.json"

#: What an original has beside weights and tokenizer: how images and audio are read, and how an
#: embedding model pools (sentence-transformers).
_BESIDE = (
    "*processor_config.json",
    "modules.json",
    "*sentence*.json",
    models.POOLING,
)


def write_checkpoint(
    folder: Path,
    source: models.SourceModel,
    plan: Plan,
    layers: Mapping[str, QuantizedLayer],
    provenance: Mapping[str, Any],
    caches: Mapping[str, CacheRange] | None = None,
) -> dict[str, Any]:
    """Write weights, config, tokenizer and manifest into a new folder.

    The bytes depend on the inputs alone: no dates, host names or paths of this machine. Layers are
    packed one after another as files are filled (`quantkit.checkpoint.shards`).

    Args:
        folder: the staging folder; must not exist.
        source: the model; only what is not quantized is read from it.
        plan: what was planned.
        layers: every planned layer's result.
        provenance: what goes into the manifest beside the files: recipe, data hash, seeds.
        caches: the ranges of keys and values by attention module, where they are quantized.

    Returns:
        the manifest.

    Raises:
        QuantkitError: NaN or infinity in any tensor, a size that is off its theory by more than
            1 %, a full disk, or one that takes no more for another reason.
        UsageError: the folder cannot be created.
    """
    missing = [layer.name for layer in plan.layers if layer.name not in layers]
    if missing:
        raise QuantkitError(f"{missing[0]}: planned, but not quantized ({len(missing)} layers)")
    caches = caches or {}
    if set(caches) != set(plan.caches):
        raise QuantkitError(
            f"{len(caches)} key-value caches have scales, {len(plan.caches)} planned"
        )
    sizes: dict[str, int] = {}
    with guarded_disk(folder):
        folder.mkdir(parents=True)
        size = write_tensors(folder, _checked(_parts(source.model, plan, layers, caches), sizes))
        _check_size(size, plan)
        config = source.model.config.to_dict()
        config["quantization_config"] = build_config(
            {layer.name: layer.scheme for layer in plan.layers},
            [*models.linear_layers(source.model), *models.routers(source.model)],
            plan.kv,
            on_disk=lambda name: models.disk_module(source.model, name),
            hadamards={layer.name: layer.hadamard for layer in plan.layers if layer.hadamard},
        )
        for part in (config, config.get("text_config", {})):
            if part is config or "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = models.is_tied(source.model)
        config["dtype"] = str(source.model.dtype).removeprefix("torch.")
        config.pop("_name_or_path", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        generation = getattr(source.model, "generation_config", None)  # encoders have none
        if generation is not None:
            generation.save_pretrained(folder)
        source.tokenizer.save_pretrained(folder)
        for pattern in _BESIDE:
            for path in source.folder.glob(pattern):
                (folder / path.relative_to(source.folder)).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, folder / path.relative_to(source.folder))
        manifest = {
            "schema": 1,
            "quantkit": __version__,
            "source": {
                "name": source_name(source.source),
                "files": source.files,
                "hash": source.weight_hash,
                **read_card(source.folder).to_json(),
            },
            **provenance,
            "size_bytes": size,
            "source_bytes": plan.source_bytes,
            "bits_per_weight": round(plan.bits_per_weight, 6),
            "rotation": asdict(plan.rotation) if plan.rotation else None,
            "layers": {
                layer.name: {
                    "scheme": layer.scheme.name,
                    "weight": layer.scheme.weight.label(),
                    "input": layer.scheme.input.label() if layer.scheme.input else None,
                    "solver": layer.solver,
                    "steps": layer.steps,
                    "shape": list(layer.shape),
                    "bits": round(8 * sizes[layer.name] / math.prod(layer.shape), 6),
                    "weight_error": layers[layer.name].weight_error,
                    "output_error": layers[layer.name].output_error,
                    **_range_facts(layers[layer.name]),
                    **_rounding_facts(layers[layer.name]),
                    **_reconstruction_facts(layers[layer.name]),
                }
                for layer in plan.layers
            },
            **_cache_facts(plan, caches),
            "kept": list(plan.kept),
            "files": models.hash_folder(folder),
        }
        write_manifest(folder, manifest)
    return manifest


def _range_facts(layer: QuantizedLayer) -> dict[str, Any]:
    """The range behind a static input scale, and the errors of all that were tried."""
    return {} if layer.input_range is None else {"input_range": asdict(layer.input_range)}


def _rounding_facts(layer: QuantizedLayer) -> dict[str, Any]:
    """Who rounded the layer, on how many tokens, and how far from round-to-nearest it ended."""
    return {} if layer.rounding is None else {"rounding": asdict(layer.rounding)}


def _reconstruction_facts(layer: QuantizedLayer) -> dict[str, Any]:
    """What training the layer's block came to."""
    found = layer.reconstruction
    return {} if found is None else {"reconstruction": asdict(found)}


def _cache_facts(plan: Plan, caches: Mapping[str, CacheRange]) -> dict[str, Any]:
    if plan.kv is None:
        return {}
    ranges = {
        name: {"keys": asdict(found.keys), "values": asdict(found.values)}
        for name, found in caches.items()
    }
    return {"kv_cache": {"format": plan.kv.label(), "ranges": ranges}}


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write or replace ``quantkit.json``. Raises as `quantkit.results.write_json` does."""
    write_json(folder / MANIFEST, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's ``quantkit.json``.

    Raises:
        UsageError: there is none, or it may not be read.
        QuantkitError: it is something else.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    if not (folder / MANIFEST).is_file():
        raise UsageError(
            f"{folder}: has no {MANIFEST}", remedy="only checkpoints that quantkit wrote have one"
        )
    try:
        found = read_json(folder / MANIFEST)
    except UsageError as e:
        if isinstance(e.__cause__, OSError):  # who may not read it is no better off with a copy
            raise
        # The file is damaged, whatever was asked for.
        raise QuantkitError(e.message, remedy="copy the checkpoint again") from e
    if not (isinstance(found, dict) and isinstance(found.get("files"), dict)):
        raise QuantkitError(
            f"{folder / MANIFEST}: is no manifest", remedy="copy the checkpoint again"
        )
    return found


def manifest_if_any(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest; empty for a folder of another program, which has none.

    Raises:
        QuantkitError: the file is there and is no manifest.
    """
    return read_manifest(folder) if (folder / MANIFEST).exists() else {}


def promote(staging: Path, out: Path) -> None:
    """Give a finished folder its final name; one that is there already is replaced.

    Two renames, because no portable call swaps folders. Whatever stops the code between them,
    Ctrl-C included, the old folder comes back; after a kill, `recover` brings it back.

    Args:
        staging: the finished folder, on the same file system.
        out: its final name; not a symbolic link.

    Raises:
        UsageError: the place cannot be written.
    """
    try:
        recover(out)
        if out.exists():
            os.replace(out, _retired(out))
        os.replace(staging, out)
    except BaseException as e:
        recover(out)
        if isinstance(e, OSError):
            raise UsageError(f"{out}: cannot be written ({e.strerror or e})") from e
        raise
    shutil.rmtree(_retired(out), ignore_errors=True)


def recover(out: Path) -> None:
    """Undo, or finish, a `promote` that was cut short: the old folder returns where none is.

    Raises:
        UsageError: the place cannot be written.
    """
    retired = _retired(out)
    if out.exists():
        shutil.rmtree(retired, ignore_errors=True)
    elif retired.exists():
        try:
            os.replace(retired, out)
        except OSError as e:
            raise UsageError(
                f"{out}: cannot be written ({e.strerror or e})",
                remedy=f"what was there before is in {retired}",
            ) from e


def _retired(out: Path) -> Path:
    """Where the folder that `promote` replaces lies between its two renames."""
    return out.with_name(f".{out.name}.old")


@contextmanager
def guarded_disk(folder: Path) -> Iterator[None]:
    """Turn failures of the disk into readable errors; a half-written folder is removed.

    What is copied into the folder may fail to be read, too: the error names that file.
    """
    try:
        yield
    except BaseException as e:
        shutil.rmtree(folder, ignore_errors=True)
        number = e.errno if isinstance(e, OSError) else _rust_errno(e)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise QuantkitError(
                f"{folder}: the disk is full", remedy="free some space; nothing was left behind"
            ) from e
        others = not isinstance(e, OSError) and (number or isinstance(e, SafetensorError))
        if others or number == errno.EFBIG:
            raise QuantkitError(
                f"{folder}: cannot be written ({getattr(e, 'strerror', None) or e})",
                remedy="free some space, or choose another disk; nothing was left behind",
            ) from e
        if isinstance(e, OSError):
            place = Path(e.filename) if isinstance(e.filename, str | Path) else folder
            ours = place == folder or folder in place.parents or place in folder.parents
            raise UsageError(
                f"{folder if ours else place}: cannot be {'written' if ours else 'read'} "
                f"({e.strerror or e})"
            ) from e
        raise


def _rust_errno(error: BaseException) -> int | None:
    """The error number that safetensors and tokenizers, which raise no OSError, put in words."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _parts(
    model: PreTrainedModel,
    plan: Plan,
    layers: Mapping[str, QuantizedLayer],
    caches: Mapping[str, CacheRange],
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every tensor of the export by its name on disk, in the model's order; tied weights once.

    A quantized layer's come together, with its name; all others without one.
    """
    planned = {layer.name: layer for layer in plan.layers}
    for key, value in models.stored_tensors(model).items():
        module, _, leaf = key.rpartition(".")
        if module in planned and leaf == "weight":
            layer = layers[module]
            on_disk = to_disk(layer.qtensor, planned[module].scheme, layer.input_scale)
            stem = models.disk_module(model, module)
            yield module, {f"{stem}.{name}": t for name, t in on_disk.items()}
            memory.forget_pages(layer.qtensor.codes)
            memory.trim_heap()  # what packing took lies between packed layers
        else:
            # One matrix of fused experts is a view, and would be stored with all of them.
            whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
            kept = value.contiguous() if whole else value.clone()
            yield "", {models.disk_name(model, key): kept}
    for name, found in caches.items():
        scales = found.scales(model.dtype)
        stem = models.disk_module(model, name)
        yield "", {f"{stem}.{side}": scale for side, scale in scales.items()}


def _checked(
    parts: Iterable[tuple[str, dict[str, Tensor]]], sizes: dict[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all parts, each looked through for NaN; bytes of quantized layers by name."""
    for layer, tensors in parts:
        check_tensors(tensors)
        if layer:
            sizes[layer] = sum(t.numel() * t.element_size() for t in tensors.values())
        yield from tensors.items()


def _check_size(size: int, plan: Plan) -> None:
    # weight_shape tensors (16 bytes each) are bookkeeping that the theory leaves out.
    slack = 0.01 * plan.size_bytes + 16 * len(plan.layers)
    if abs(size - plan.size_bytes) > slack:
        raise QuantkitError(
            f"the export holds {size:,} bytes where theory says {plan.size_bytes:,}",
            remedy="this is a defect in quantkit; please report it with the recipe",
        )
