"""Make a checkpoint again from its manifest, and compare the two byte for byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from quantkit import __version__
from quantkit import model as models
from quantkit.algorithms import KNOWN
from quantkit.checkpoint.write import MANIFEST, read_manifest
from quantkit.data.sources import Corpus, Source
from quantkit.errors import NotComparableError, QuantkitError, UsageError
from quantkit.job import Job, prepare
from quantkit.machine import environment
from quantkit.observers import OBSERVER_OPTIONS
from quantkit.progress import Reporter, silent_reporter
from quantkit.recipe import Recipe, SourceSpec, load_recipe
from quantkit.results import read_json, write_text
from quantkit.run import execute

#: What a manifest says of the judgement and of names, which a rebuild need not repeat.
_NOT_BYTES = ("evals", "verdict", "files")
_NAMES = ("name", "id", "license", "license_from")


@dataclass(frozen=True)
class Difference:
    """A file that a rebuild made otherwise, and in what."""

    file: str
    detail: str


@dataclass(frozen=True)
class Comparison:
    """A checkpoint beside its rebuild.

    Attributes:
        files: how many were compared.
        differences: empty when the two are alike.
        environment: what is not as it was when the checkpoint was made: fact → (then, now).
    """

    files: int
    differences: tuple[Difference, ...]
    environment: Mapping[str, tuple[Any, Any]]

    def require_same(self, checkpoint: Path) -> None:
        """Raise when something differs.

        Raises:
            NotComparableError: libraries or the class of machine differ, too, which explains it.
            QuantkitError: nothing explains it.
        """
        if not self.differences:
            return
        first = self.differences[0]
        message = (
            f"{checkpoint}: {len(self.differences)} of {self.files} files differ from the rebuild "
            f"(first: {first.file}: {first.detail})"
        )
        if self.environment:
            changes = self.environment.items()
            other = ", ".join(f"{key} {was} (now {now})" for key, (was, now) in changes)
            raise NotComparableError(
                f"{message}; it was made with {other}", remedy="rebuild it where these are the same"
            )
        raise QuantkitError(
            message, remedy="it was not made from what its manifest says; do not rely on it"
        )


def rebuild(
    checkpoint: Path,
    folder: Path,
    *,
    model: str | None = None,
    data: Sequence[str] = (),
    reporter: Reporter = silent_reporter,
) -> Comparison:
    """Run the manifest's recipe on the manifest's inputs again.

    Args:
        checkpoint: its manifest says what to do.
        folder: an empty one to work in; needs room for the checkpoint twice.
        model: the original. By default where the run found it, as ``OUT.run`` says, else the
            hub id in the manifest.
        data: calibration files, in any order; each is known by its hash.
        reporter: told of the calibration.

    Raises:
        UsageError: an input is missing, or is not the one that the manifest names.
        QuantkitError: the manifest lacks what a rebuild needs.
    """
    manifest = read_manifest(checkpoint)
    paths = _paths(checkpoint)
    recipe = _recipe(manifest, folder)
    stored = manifest.get("data")
    if stored is not None:
        given = [*data, *paths.get("data", ())]
        calibration = replace(
            recipe.calibrate,
            data=tuple(_find(source, given) for source in stored["sources"]),
            samples=stored["samples_wanted"],
            seq_len=stored["seq_len"],
            seed=stored["seed"],
        )
        recipe = replace(recipe, calibrate=calibration)
    source = manifest["source"]
    job = Job(
        source=model or paths.get("model") or source["name"],
        recipe=recipe,
        out=folder / "rebuilt",
        gated=False,
        device=manifest["device"],
    )
    with _threads(manifest["machine"]["threads"]):
        prepared = prepare(job)
        if prepared.source.weight_hash != source["hash"]:
            raise UsageError(
                f"{job.source}: sha256 {prepared.source.weight_hash[:12]}…, and the checkpoint was "
                f"made from {source['hash'][:12]}…",
                remedy="name the original model by --model",
            )
        then = {
            "quantkit": manifest["quantkit"],
            **manifest["versions"],
            **manifest["machine"],
        }
        now = environment(prepared.source.model.device)
        outcomes = execute(prepared, reporter)
    changed = {k: (then.get(k), v) for k, v in now.items() if then.get(k) != v}
    files, differences = compare(checkpoint, outcomes.folder)
    return Comparison(files, tuple(differences), changed)


def compare(checkpoint: Path, other: Path) -> tuple[int, list[Difference]]:
    """(files compared, those that differ). Of the manifest, what the bytes follow from."""
    ours, theirs = models.hash_folder(checkpoint), models.hash_folder(other)
    names = sorted(ours.keys() | theirs.keys())
    found = []
    for name in names:
        if name not in theirs:
            found.append(Difference(name, "the rebuild has no such file"))
        elif name not in ours:
            found.append(Difference(name, "only the rebuild has it"))
        elif name == MANIFEST:
            found += _compare_manifests(read_manifest(checkpoint), read_manifest(other))
        elif ours[name] != theirs[name]:
            found.append(Difference(name, _detail(checkpoint / name, other / name)))
    return len(names), found


def _compare_manifests(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Difference]:
    keys = [
        key
        for key in sorted(ours.keys() | theirs.keys())
        if key not in (*_NOT_BYTES, "machine", "versions", "quantkit")
        and _without_names(ours.get(key)) != _without_names(theirs.get(key))
    ]
    return [Difference(MANIFEST, f"{', '.join(keys)} differ")] if keys else []


def _without_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_names(v) for k, v in value.items() if k not in _NAMES}
    if isinstance(value, list):
        return [_without_names(item) for item in value]
    return value


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _detail(ours: Path, theirs: Path) -> str:
    """Which tensors of a weight file differ; of another file, the first byte that does."""
    if ours.suffix == ".safetensors":
        with safe_open(ours, "pt") as a, safe_open(theirs, "pt") as b:
            left, right = set(a.keys()), set(b.keys())
            other = sorted(left ^ right) or [
                name
                for name in sorted(left)
                if (x := a.get_tensor(name)).dtype != (y := b.get_tensor(name)).dtype
                or not torch.equal(_bytes(x), _bytes(y))
            ]
        return (
            f"{len(other)} of {len(left | right)} tensors, first {other[0]}" if other else "header"
        )
    a_bytes, b_bytes = ours.read_bytes(), theirs.read_bytes()
    pairs = zip(a_bytes, b_bytes, strict=False)
    at = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a_bytes), len(b_bytes)))
    return f"from byte {at:,} on"


def _recipe(manifest: Mapping[str, Any], folder: Path) -> Recipe:
    stored = manifest.get("recipe") or {}
    if not stored.get("text"):
        raise QuantkitError(
            f"{MANIFEST} holds no recipe", remedy="only what `quantkit calibrate` made is rebuilt"
        )
    for key in ("source", "machine", "versions", "device"):
        if key not in manifest:
            raise QuantkitError(
                f"{MANIFEST} of quantkit {manifest.get('quantkit')} lacks {key!r}",
                remedy=f"quantkit {__version__} rebuilds what it made",
            )
    file = folder / "recipe.yaml"  # its name in the manifest may be any path
    write_text(file, stored["text"])
    recipe = load_recipe(file, known_algorithms=KNOWN, known_observers=OBSERVER_OPTIONS)
    if recipe.sha256 != stored["sha256"]:
        raise QuantkitError(f"{MANIFEST}: the recipe's text is not the one that its hash names")
    return recipe


def _find(source: Mapping[str, Any], paths: Sequence[str]) -> SourceSpec:
    """Where a source of the manifest is now: among these paths by its hash, or at its id."""
    spec = SourceSpec("", source["weight"], source["field"], source["split"])
    for path in paths:
        if not Path(path).exists():
            continue
        try:
            found = Corpus(Source(path, split=spec.split, field=spec.field)).sha256
        except UsageError:
            continue  # another source's: it has no such split or field
        if found == source["sha256"]:
            return replace(spec, path=str(Path(path).resolve()))
    if source["id"] is not None:
        return replace(spec, path=source["id"])
    raise UsageError(
        f"calibration data {source['name']} (sha256 {source['sha256'][:12]}…) was not found",
        remedy="give it by --data FILE",
    )


def _paths(checkpoint: Path) -> Mapping[str, Any]:
    """Where the run that made a checkpoint found its inputs, if its ``OUT.run`` is still there."""
    name = checkpoint.resolve().name.removesuffix(".rejected")
    file = checkpoint.resolve().with_name(f"{name}.run") / "run.json"
    document = read_json(file) if file.is_file() else {}
    paths = document.get("paths") if isinstance(document, dict) else None
    return paths if isinstance(paths, dict) else {}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads as the checkpoint was made with: the bytes depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
