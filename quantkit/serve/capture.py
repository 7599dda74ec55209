"""A sample of the traffic, redacted, in the JSONL that ``quantkit calibrate`` reads.

One line an answer: ``{"messages": [...]}`` of a chat, ``{"prompt": ..., "completion": ...}`` of a
raw prompt. Lines are only ever appended, whole; a file that is full becomes ``NAME.1.jsonl``, the
one before it ``NAME.2.jsonl``, and so on.

Serving never waits for it: a thread of its own redacts and writes, from a queue that drops what
does not fit. A disk that is full, or gone, costs the rows of that time, a warning in the log and a
count in the metrics.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.errors import UsageError
from quantkit.serve.redaction import PATTERNS, redact

logger = logging.getLogger(__name__)

#: Rows that wait to be written. Beyond them the disk does not keep up.
QUEUE_ROWS = 1000
#: Longer rows are not kept: redacting them would hold up the interpreter, and so the server.
MAX_ROW_BYTES = 256 * 1024


@dataclass(frozen=True)
class CaptureConfig:
    """What to keep, and where.

    Attributes:
        path: file to append to; it ends with ``.jsonl``.
        rate: share of the requests, above 0 and up to 1.
        max_bytes: a file that would grow beyond is put aside.
        keep: files put aside that are kept.
        patterns: what is redacted, name → pattern.

    Raises:
        UsageError: a value that breaks one of these rules.
    """

    path: Path
    rate: float = 0.01
    max_bytes: int = 256 * 1024 * 1024
    keep: int = 4
    patterns: Mapping[str, re.Pattern[str]] = field(default_factory=lambda: PATTERNS)

    def __post_init__(self) -> None:
        if self.path.suffix != ".jsonl":
            raise UsageError(f"--capture {self.path} does not end with .jsonl")
        if not self.path.parent.is_dir():
            raise UsageError(f"--capture {self.path}: there is no folder {self.path.parent}")
        if self.path.exists() and not self.path.is_file():
            raise UsageError(f"--capture {self.path} is not a file")
        # The folder as well: a file that is full is renamed.
        for place in (self.path, self.path.parent):
            if place.exists() and not os.access(place, os.W_OK):
                raise UsageError(f"--capture {self.path}: {place} cannot be written to")
        if not 0 < self.rate <= 1:
            raise UsageError(f"--capture-rate {self.rate} is not above 0 and up to 1")


class Capture:
    """Writes a sample. `wants` and `offer` never block; `close` writes what is queued, in time.

    Attributes:
        written, failed: rows on disk, rows that the disk did not take.
    """

    def __init__(self, config: CaptureConfig, chance: Callable[[], float] = random.random) -> None:
        self.config = config
        self.written = self.failed = 0
        self._queued = self._refused = 0  # the event loop counts these, the thread the others
        self._too_long = 0
        self._chance = chance
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE_ROWS)
        self._broken = False
        self._thread = threading.Thread(target=self._work, name="quantkit-capture", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Rows too long, or that found the queue full."""
        return self._refused + self._too_long

    def wants(self) -> bool:
        """Draw whether a request is part of the sample."""
        return self._chance() < self.config.rate

    def offer(self, row: dict[str, Any]) -> None:
        """Queue a row, or drop it if the disk does not keep up."""
        try:
            self._queue.put_nowait(row)
            self._queued += 1
        except queue.Full:
            self._refused += 1

    def close(self, timeout: float = 5.0) -> None:
        """Write what is queued and end the thread; after ``timeout`` seconds the rest is lost."""
        deadline = time.monotonic() + timeout
        with contextlib.suppress(queue.Full):  # the disk hangs, and so does the thread
            self._queue.put(None, timeout=timeout)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if lost := self._queued - self.written - self.failed - self._too_long:
            logger.warning("capture: %s took too long; %d rows are lost", self.config.path, lost)

    def _work(self) -> None:
        while (row := self._queue.get()) is not None:
            try:
                if len(_encoded(row)) > MAX_ROW_BYTES:
                    self._too_long += 1
                    continue
                self._append(_encoded(self._redacted(row)) + b"\n")
            except OSError as error:
                self.failed += 1
                if not self._broken:  # once, or a full disk would fill the log as well
                    logger.warning("capture: %s; rows are lost until it takes them", error)
                self._broken = True
            except Exception:
                self.failed += 1
                logger.exception("capture: a row was not written")
            else:
                self.written += 1
                if self._broken:
                    logger.warning("capture: %s takes rows again", self.config.path)
                self._broken = False

    def _redacted(self, value: Any) -> Any:
        """Every text in a row; keys and roles are ours."""
        if isinstance(value, str):
            return redact(value, self.config.patterns)
        if isinstance(value, list):
            return [self._redacted(item) for item in value]
        if isinstance(value, dict):
            return {
                key: item if key == "role" else self._redacted(item) for key, item in value.items()
            }
        return value

    def _append(self, data: bytes) -> None:
        # Opened for each row: the file may have been moved away by somebody else.
        handle = os.open(self.config.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(handle).st_size
            if size and size + len(data) > self.config.max_bytes:
                self._rotate()
                os.close(handle)
                handle = os.open(self.config.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                size = 0
            self._write(handle, data, size)
        finally:
            os.close(handle)

    def _write(self, handle: int, data: bytes, size: int) -> None:
        written = 0
        try:
            while written < len(data):
                written += os.write(handle, data[written:])
        except OSError:
            os.ftruncate(handle, size)  # half a line would make the whole file unreadable
            raise

    def _rotate(self) -> None:
        path = self.config.path
        aside = [path, *(path.with_suffix(f".{i}.jsonl") for i in range(1, self.config.keep + 1))]
        for older, newer in zip(reversed(aside), reversed(aside[:-1]), strict=False):
            if newer.exists():
                os.replace(newer, older)
        if self.config.keep == 0:
            path.unlink()


def _encoded(row: Any) -> bytes:
    """Half a surrogate, which JSON can bring in, becomes a question mark."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")
