"""Systems under test: their engines, files, and bytes of weights."""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Size:
    """Bytes of weights: in the file, and read to decode a token."""

    stored: int
    read: int


@dataclass(frozen=True)
class System:
    """A row: a name, the engine that runs it, its file or folder."""

    engine: str
    name: str
    path: Path
    size: Size


def named(text: str) -> tuple[str, str]:
    """``NAME=VALUE``."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def list_systems(args: argparse.Namespace) -> list[System]:
    """Peers first; quantkit's rows begin with the original."""
    peers = [System("llama.cpp", n, Path(p), gguf_size(Path(p))) for n, p in args.gguf]
    checkpoints = [("bf16", args.model), *args.ckpt]
    ours = [System("quantkit", n, Path(p), folder_size(Path(p))) for n, p in checkpoints]
    for kind in (peers, ours):
        names = [s.name for s in kind]
        if len(set(names)) < len(names):
            raise SystemExit(f"two systems of {kind[0].engine} have one name: {names}")
    for name, peer in args.pair:
        if name not in {s.name for s in ours} or peer not in {s.name for s in peers}:
            raise SystemExit(f"--pair {name}={peer}: name a checkpoint and a GGUF file given here")
    return peers + ours


def folder_size(folder: Path) -> Size:
    """Of the safetensors files of a folder."""
    sizes: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        header.pop("__metadata__", None)
        sizes |= {k: v["data_offsets"][1] - v["data_offsets"][0] for k, v in header.items()}
    if not sizes:
        raise SystemExit(f"{folder}: no safetensors file")
    return count(sizes, embedding="embed_tokens.weight", head="lm_head.")


def gguf_size(path: Path) -> Size:
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    return count(sizes, embedding="token_embd.weight", head="output.")


def gguf_types(path: Path) -> str:
    """Types of its matrices, of the most weights first: ``Q4_0, Q6_K``."""
    from gguf import GGUFReader

    weights: Counter[str] = Counter()
    for tensor in GGUFReader(path).tensors:
        if len(tensor.shape) > 1:
            weights[tensor.tensor_type.name] += int(tensor.n_elements)
    return ", ".join(name for name, _ in weights.most_common())


def count(sizes: dict[str, int], *, embedding: str, head: str) -> Size:
    """The input embedding is read only where the head has no tensors of its own."""
    stored = sum(sizes.values())
    untied = any(name.startswith(head) for name in sizes)
    skipped = sum(n for name, n in sizes.items() if untied and name.endswith(embedding))
    return Size(stored, stored - skipped)


def count_parameters(model: Path) -> int:
    """Of the original, a tied embedding counted once."""
    total = 0
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        total += sum(math.prod(v["shape"]) for k, v in header.items() if k != "__metadata__")
    return total
