"""Hidden states on disk between blocks, where they would not fit in memory.

What is written is mapped back, so that the rest of calibration reads it as any tensor: the system
brings in the pages that a batch touches and may take them back at any time.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit import memory
from quantkit.errors import QuantkitError, UsageError

_REMEDY = "free disk space there, or raise --activation-memory"


class HiddenFiles:
    """Tensors by name, each in a file of its own.

    Args:
        folder: theirs; made if it does not exist.

    Raises:
        QuantkitError: the disk is full.
        UsageError: the folder cannot be created for another reason.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(exist_ok=True)
        except OSError as e:
            message = f"{folder}: cannot be created ({e.strerror})"
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise QuantkitError(message, remedy=_REMEDY) from e
            raise UsageError(message) from e

    def keep(self, name: str, x: Tensor) -> Tensor:
        """Write a tensor in place of the last one of this name; the same values, mapped from disk.

        A mapping of the last one stays whole for as long as it is used.

        Raises:
            QuantkitError: it cannot be written, a full disk as a rule, or not be mapped.
        """
        path = self._folder / f"{name}.safetensors"
        staging = path.with_suffix(".tmp")
        try:
            save_file({"x": x.detach().cpu().contiguous()}, staging)
            os.replace(staging, path)
            mapped = load_file(path)["x"]
        except (OSError, SafetensorError) as e:
            # safetensors has errors of its own, a full disk among them.
            with suppress(OSError):
                staging.unlink(missing_ok=True)
            reason = getattr(e, "strerror", None) or e
            raise QuantkitError(
                f"{path}: cannot be written or mapped ({reason})", remedy=_REMEDY
            ) from e
        memory.forget_pages(mapped)
        return mapped
