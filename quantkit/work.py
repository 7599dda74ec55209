"""The work folder: finished blocks on disk, which a resumed run starts from.

::

    WORK/state.json               digests of what the run was begun with
    WORK/tokens.safetensors       what tokens' errors cost, where a solver asks (`quantkit.fisher`)
    WORK/outputs/NAME.safetensors  which outputs' errors belong together, where a solver asks
    WORK/targets.safetensors      what the original's head saw, for `quantkit.distill`
    WORK/distill.safetensors      the state of its training
    WORK/hidden/                  hidden states between blocks, where they are not held in memory
    WORK/blocks/0007.scales       what block 7's producers were divided by, if they were
                                  (safetensors)
    WORK/blocks/0007.norms        its norms' weights, if they were trained (safetensors)
    WORK/blocks/0007.cache.json   the ranges of its keys and values, if they are quantized
    WORK/blocks/0007.safetensors  codes, scales and zero points of block 7's layers
    WORK/blocks/0007.json         their errors, who rounded them, and the digest of the tensors;
                                  written last, so its presence means that the block is whole
    WORK/.quantkit.lock           the number of the process at work, held while it is
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.errors import QuantkitError, UsageError
from quantkit.input_range import InputRange
from quantkit.kv_cache import CacheRange
from quantkit.model import hash_file
from quantkit.numerics import QTensor
from quantkit.plan import PlannedLayer
from quantkit.quantize import QuantizedLayer, Reconstruction
from quantkit.results import read_json, write_json
from quantkit.rounding import Rounding
from quantkit.schemes import QuantSpec

#: Block index under which layers outside of the decoder (the head) are stored.
HEAD = -1

#: Held by the run at work. One that is killed leaves the file behind, but not its lock.
LOCK = ".quantkit.lock"

_AGAIN = "run again without --resume to start over"

#: Parts of a run's state that are digests: a message can only say that they changed.
_INPUTS = {
    "weights": "another model",
    "plan": "another recipe",
    "data": "other data",
    "documents": "other borders of documents",
    "answers": "other answers",
    "observer": "another observer",
}


class WorkFolder:
    """Finished blocks by index.

    Args:
        path: the folder; made if it does not exist.
        state: what the blocks depend on, as plain values.
        resume: keep the blocks that are there; otherwise the folder is emptied.

    Raises:
        UsageError: the blocks that are there were begun with another state, or the folder
            cannot be created.
    """

    def __init__(self, path: Path, state: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = path
        file = path / "state.json"
        if resume and file.exists():
            begun = read_json(file)
            if begun != state:
                raise UsageError(f"{path}: was begun with {_changes(begun, state)}", remedy=_AGAIN)
            return
        empty_work(path)
        try:
            (path / "blocks").mkdir(parents=True)
        except OSError as e:
            raise UsageError(f"{path}: cannot be created ({e.strerror})") from e
        write_json(file, state)

    def save(
        self,
        index: int,
        layers: Mapping[str, QuantizedLayer],
        planned: Mapping[str, PlannedLayer],
    ) -> dict[str, QuantizedLayer]:
        """Write a block: tensors first, then the JSON that makes it count, each by a rename.

        Returns:
            the block as it reads back: mapped from its file, so that finished blocks do not
            add up in memory.
        """
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        for name, layer in layers.items():
            for part, tensor in layer.qtensor.tensors().items():
                tensors[f"{name}:{part}"] = tensor.contiguous()
            if layer.input_scale is not None:
                tensors[f"{name}:input_scale"] = layer.input_scale
            facts[name] = {"weight_error": layer.weight_error, "output_error": layer.output_error}
            if layer.input_range is not None:
                facts[name]["input_range"] = asdict(layer.input_range)
            if layer.rounding is not None:
                facts[name]["rounding"] = asdict(layer.rounding)
            if layer.reconstruction is not None:
                facts[name]["reconstruction"] = asdict(layer.reconstruction)
        stem = self._stem(index)
        path = stem.with_suffix(".safetensors")
        _write_tensors(tensors, path)
        write_json(stem.with_suffix(".json"), {"sha256": hash_file(path), "layers": facts})
        return self._read(stem, facts, planned)

    def load(
        self, index: int, planned: Mapping[str, PlannedLayer]
    ) -> dict[str, QuantizedLayer] | None:
        """A finished block, or None.

        A block whose tensors are not the ones that were written, which a power cut may leave,
        does not count as finished: it is solved again, to the same bytes.

        Raises:
            QuantkitError: its layers are not the planned ones.
        """
        stem = self._stem(index)
        if not stem.with_suffix(".json").exists():
            return None
        document = read_json(stem.with_suffix(".json"))
        path = stem.with_suffix(".safetensors")
        if not path.exists() or hash_file(path) != document["sha256"]:
            return None
        return self._read(stem, document["layers"], planned)

    def _read(
        self, stem: Path, facts: Mapping[str, Any], planned: Mapping[str, PlannedLayer]
    ) -> dict[str, QuantizedLayer]:
        tensors = load_file(stem.with_suffix(".safetensors")) if facts else {}
        if set(facts) != set(planned):
            raise QuantkitError(
                f"{stem}: the finished layers are not the planned ones", remedy=_AGAIN
            )
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in planned}
        for key, tensor in tensors.items():
            name, part = key.rsplit(":", 1)
            parts[name][part] = tensor
        return {
            name: QuantizedLayer(
                QTensor.from_tensors(parts[name], layer.scheme.weight),
                parts[name].get("input_scale"),
                **{
                    **facts[name],
                    "input_range": _input_range(facts[name]),
                    "rounding": _rounding(facts[name]),
                    "reconstruction": _reconstruction(facts[name]),
                },
            )
            for name, layer in planned.items()
        }

    def save_caches(self, index: int, caches: Mapping[str, CacheRange]) -> None:
        """Write the ranges of a block's keys and values, by the attention module's name."""
        facts = {
            name: {"keys": asdict(found.keys), "values": asdict(found.values)}
            for name, found in caches.items()
        }
        write_json(self._stem(index).with_suffix(".cache.json"), facts)

    def load_caches(self, index: int, spec: QuantSpec) -> dict[str, CacheRange]:
        """What `save_caches` wrote before the block was finished."""
        facts = read_json(self._stem(index).with_suffix(".cache.json"))
        return {
            name: CacheRange(spec, InputRange(**x["keys"]), InputRange(**x["values"]))
            for name, x in facts.items()
        }

    def save_scales(self, index: int, scales: Mapping[str, Tensor]) -> None:
        """Write what a block's producers are divided by, fp32 ``[P]`` by name.

        The folded weights follow from these and the original ones, to the bit.
        """
        contiguous = {name: t.contiguous() for name, t in scales.items()}
        _write_tensors(contiguous, self._stem(index).with_suffix(".scales"))

    def load_scales(self, index: int) -> dict[str, Tensor] | None:
        """What `save_scales` wrote, or None."""
        path = self._stem(index).with_suffix(".scales")
        return _load_tensors(path) if path.exists() else None

    def save_norms(self, index: int, norms: Mapping[str, Tensor]) -> None:
        """Write the trained weights of a block's norms, by name, before the block is finished."""
        _write_tensors(dict(norms), self._stem(index).with_suffix(".norms"))

    def load_norms(self, index: int) -> dict[str, Tensor]:
        """What `save_norms` wrote; empty where no norms were trained."""
        path = self._stem(index).with_suffix(".norms")
        return _load_tensors(path) if path.exists() else {}

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write what belongs to the whole model, under a name of its own."""
        path = self.path / f"{name}.safetensors"
        _write_tensors(dict(tensors), path)

    def load_tensors(self, name: str) -> dict[str, Tensor] | None:
        """What `save_tensors` wrote, or None."""
        path = self.path / f"{name}.safetensors"
        return _load_tensors(path) if path.exists() else None

    def _stem(self, index: int) -> Path:
        return self.path / "blocks" / f"{index:04d}"


def _input_range(facts: Mapping[str, Any]) -> InputRange | None:
    found = facts.get("input_range")
    return None if found is None else InputRange(**found)


def _rounding(facts: Mapping[str, Any]) -> Rounding | None:
    found = facts.get("rounding")
    return None if found is None else Rounding(**found)


def _reconstruction(facts: Mapping[str, Any]) -> Reconstruction | None:
    found = facts.get("reconstruction")
    return None if found is None else Reconstruction(**found)


def _changes(begun: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """What a resumed run has otherwise than the one that began, for a message."""
    keys = [key for key in begun.keys() | state.keys() if begun.get(key) != state.get(key)]
    words = [words for key, words in _INPUTS.items() if key in keys]
    facts = sorted(set(keys) - _INPUTS.keys())
    return ", ".join([*words, *(f"{k} {begun.get(k)} (now {state.get(k)})" for k in facts)])


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise QuantkitError(f"{path}: is damaged ({e})", remedy=_AGAIN) from e


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file, there as a whole or not at all."""
    staging = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, staging)
        # A rename may reach the disk before what it names does.
        with staging.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(staging, path)
    except (OSError, SafetensorError) as e:
        # safetensors has errors of its own, a full disk among them.
        with suppress(OSError):
            staging.unlink(missing_ok=True)
        reason = getattr(e, "strerror", None) or e
        raise QuantkitError(
            f"{path}: cannot be written ({reason})", remedy="free some space, then --resume"
        ) from e


@contextmanager
def locked_work(path: Path) -> Iterator[None]:
    """Hold a work folder, and with it everything beside OUT that a run replaces.

    The lock is flock(2)'s, which the kernel takes back from a process that dies. On the way out
    the lock file goes, and the folder with it if nothing else is in it.

    Args:
        path: the folder; made if it does not exist.

    Raises:
        UsageError: another run holds it, or it cannot be created.
    """
    try:
        file = _lock(path / LOCK)
    except BlockingIOError:
        raise UsageError(
            f"{path}: {_holder(path / LOCK)} is at work there",
            remedy="wait for it, or choose another -o",
        ) from None
    except OSError as e:
        raise UsageError(f"{path}: cannot be written ({e.strerror})") from e
    try:
        yield
    finally:
        # Removed before it is let go: who opened it meanwhile sees that it is no longer the one.
        with suppress(OSError):
            (path / LOCK).unlink()
            path.rmdir()
        os.close(file)


def empty_work(path: Path) -> None:
    """Remove everything in a work folder but its lock, as far as that is possible."""
    for entry in path.iterdir() if path.is_dir() else ():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != LOCK:
            with suppress(OSError):
                entry.unlink()


def _lock(path: Path) -> int:
    """A descriptor that holds the lock file of this name; commands that are run do not inherit it.

    Raises:
        BlockingIOError: another run holds it.
        OSError: it cannot be made, or the file system has no locks.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # its last holder has just removed the folder
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, file):
                os.ftruncate(file, 0)
                os.write(file, str(os.getpid()).encode())
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its last holder removed it before we had it: make another


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    """Who wrote the lock file, as far as it says."""
    try:
        return f"process {int(path.read_text())}"
    except (OSError, ValueError):
        return "another process"
