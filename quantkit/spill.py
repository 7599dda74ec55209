"""Hidden states on disk between blocks, where they would not fit in memory.

What is written is mapped back, so that the rest of calibration reads it as any tensor: the system
brings in the pages that a batch touches and may take them back at any time.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit import memory
from quantkit.errors import QuantkitError, UsageError


class HiddenFiles:
    """Tensors by name, each in a file of its own.

    Args:
        folder: theirs; made if it does not exist.

    Raises:
        UsageError: the folder cannot be created.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(exist_ok=True)
        except OSError as e:
            raise UsageError(f"{folder}: cannot be created ({e.strerror})") from e

    def keep(self, name: str, x: Tensor) -> Tensor:
        """Write a tensor in place of the last one of this name; the same values, mapped from disk.

        A mapping of the last one stays whole for as long as it is used.

        Raises:
            QuantkitError: it cannot be written: a full disk as a rule.
        """
        path = self._folder / f"{name}.safetensors"
        staging = path.with_suffix(".tmp")
        try:
            save_file({"x": x.detach().cpu().contiguous()}, staging)
            os.replace(staging, path)
        except (OSError, SafetensorError) as e:
            # safetensors has errors of its own, a full disk among them.
            with suppress(OSError):
                staging.unlink(missing_ok=True)
            reason = getattr(e, "strerror", None) or e
            raise QuantkitError(
                f"{path}: cannot be written ({reason})",
                remedy="free disk space there, or raise --activation-memory",
            ) from e
        mapped = load_file(path)["x"]
        memory.forget_pages(mapped)
        return mapped
