"""Is a checkpoint whole and unchanged? Hashes, completeness, finite numbers and a reload."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit import model as models
from quantkit.batches import random_batch
from quantkit.checkpoint.read import TensorFiles, read_quantization_config
from quantkit.checkpoint.write import MANIFEST, read_manifest
from quantkit.errors import QuantkitError, UsageError
from quantkit.integrity import not_finite
from quantkit.paused import head_input


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, whether it holds, and what was found."""

    check: str
    ok: bool
    detail: str


def verify_files(folder: Path) -> list[Finding]:
    """Compare every file with the manifest's hashes; look for missing tensors, NaN and infinity.

    A checkpoint of another program has no manifest: there, the tensors are all there is to check.

    Raises:
        UsageError: the folder does not exist, or is no checkpoint.
        QuantkitError: its manifest is none.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    if not (folder / MANIFEST).is_file():
        if read_quantization_config(folder) is None:
            raise UsageError(
                f"{folder}: is not quantized", remedy="verify reads quantized checkpoints"
            )
        none = Finding(MANIFEST, True, "none: there are no hashes to compare with")
        return [none, *_verify_tensors(folder)]
    expected = {k: str(v) for k, v in read_manifest(folder)["files"].items()}
    found = models.hash_folder(folder)
    found.pop(MANIFEST, None)
    findings = []
    for name, digest in sorted(expected.items()):
        if name not in found:
            findings.append(Finding(name, False, "missing"))
        elif found[name] != digest:
            findings.append(Finding(name, False, f"sha256 {found[name][:12]}…, not {digest[:12]}…"))
        else:
            findings.append(Finding(name, True, f"sha256 {digest[:12]}…"))
    extra = sorted(set(found) - set(expected))
    findings.extend(Finding(name, False, "not in the manifest") for name in extra)
    return findings + _verify_tensors(folder)


def _verify_tensors(folder: Path) -> list[Finding]:
    """Every tensor that the index names is stored, once, and every number is one."""
    try:
        opened = TensorFiles(folder)
    except QuantkitError as e:
        return [Finding("tensors", False, e.message)]
    with opened as files:
        count = len(files.names)
        bad = list(not_finite((name, files.tensor(name)) for name in files.names))
    return [
        Finding("tensors", True, f"all {count} are stored"),
        Finding("numbers", not bad, f"NaN or infinity in {bad[0]}" if bad else "all finite"),
    ]


def verify_reload(folder: Path, *, kernels: str = "native") -> list[Finding]:
    """Load the checkpoint and run a few tokens through it."""
    from quantkit.layers import QuantLinear
    from quantkit.models.load import load_runtime

    runtime = load_runtime(folder, kernels=kernels)
    loaded = {n for n, m in runtime.model.named_modules() if isinstance(m, QuantLinear)}
    # Without a manifest, every layer that the config names was found, or loading had failed.
    planned = set(runtime.manifest.get("layers", loaded))
    findings = [
        Finding(
            "layers",
            planned == loaded,
            f"{len(loaded)} quantized layers"
            + ("" if planned == loaded else f", the manifest names {len(planned)}"),
        )
    ]
    if models.family_of(runtime.model.config).logits:
        what, out = "logits", runtime.logits(range(1, 9))
    else:
        with torch.no_grad():
            what, out = "hidden states", head_input(runtime.model, random_batch(runtime.model, 8))
    finite = bool(torch.isfinite(out).all())
    findings.append(Finding("forward", finite, f"finite {what}" if finite else "NaN or infinity"))
    wanted = runtime.manifest.get("bits_per_weight")
    if wanted is not None:
        close = math.isclose(runtime.bits_per_weight, wanted, rel_tol=0.01)
        findings.append(
            Finding(
                "size", close, f"{runtime.bits_per_weight:.3f} bits a weight, {wanted} by theory"
            )
        )
    return findings


def require_ok(findings: list[Finding], folder: Path) -> None:
    """Raise QuantkitError naming the first check that does not hold."""
    broken = [f for f in findings if not f.ok]
    if broken:
        raise QuantkitError(
            f"{folder}: {broken[0].check}: {broken[0].detail} ({len(broken)} of "
            f"{len(findings)} checks fail)",
            remedy="copy the checkpoint again, or make it anew from its recipe",
        )
