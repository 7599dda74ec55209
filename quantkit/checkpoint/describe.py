"""What a checkpoint folder holds: its manifest, or what its files tell."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from quantkit.checkpoint.opened import open_checkpoint
from quantkit.checkpoint.write import MANIFEST, read_manifest


def describe(folder: Path) -> dict[str, Any]:
    """The manifest; for another program's checkpoint, the same keys as far as files tell.

    Without a manifest there are ``format``, ``layers`` (errors and solver None), ``kept``,
    ``size_bytes``, ``source_bytes`` (of 16 bits a weight) and ``bits_per_weight``.

    Raises:
        UsageError: no such folder, not quantized, or a format that quantkit does not read.
        QuantkitError: a damaged file.
    """
    if (folder / MANIFEST).is_file():
        return read_manifest(folder)
    with open_checkpoint(folder) as source:
        stored = dict.fromkeys(source.schemes, 0)
        size = 0
        for key in source.files.names:
            size += source.files.size(key)
            module = key.rpartition(".")[0]
            if module in stored:
                stored[module] += source.files.size(key)
    layers = {
        name: {
            "scheme": scheme.name,
            "weight": scheme.weight.label(),
            "input": scheme.input.label() if scheme.input else None,
            "solver": None,
            "shape": list(source.shapes[name]),
            "bits": round(8 * stored[name] / math.prod(source.shapes[name]), 6),
            "weight_error": None,
            "output_error": None,
        }
        for name, scheme in source.schemes.items()
    }
    weights = sum(math.prod(source.shapes[name]) for name in layers)
    return {
        "format": source.reader.name,
        "layers": layers,
        "kept": [name for name in source.shapes if name not in layers],
        "size_bytes": size,
        "source_bytes": 2 * source.parameters,
        "bits_per_weight": round(8 * sum(stored.values()) / weights, 6),
    }
