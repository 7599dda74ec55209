"""Events on their way to event loops, a step's worth in one hand-over.

Each hand-over wakes the loop's thread, which then takes the interpreter away from the engine's. So
events wait until the engine is about to leave the interpreter for a native call: answers are
written while the next tokens are computed. For the same reason a `Bell` wakes the loop and not
``call_soon_threadsafe``, whose system call lets go of the interpreter: the loop's thread would have
it at once, and the engine's begin its pass when some of the answers are written.
"""

from __future__ import annotations

import ctypes
import logging
import os
from asyncio import AbstractEventLoop
from collections import deque
from typing import Any, Protocol
from weakref import WeakKeyDictionary, finalize

from quantkit.serve.events import Event

logger = logging.getLogger(__name__)


class Reader(Protocol):
    """Whom events are for."""

    def arrived(self, index: int, event: Event) -> None:
        """An event of request ``index``; on the event loop."""
        ...

    def close(self) -> None:
        """Nobody will read more."""
        ...


class Outbox:
    """Only the engine thread calls it."""

    def __init__(self) -> None:
        self._waiting: dict[AbstractEventLoop, list[tuple[Reader, int, Event]]] = {}
        self._bells: WeakKeyDictionary[AbstractEventLoop, Bell] = WeakKeyDictionary()

    def post(self, loop: AbstractEventLoop, reader: Reader, index: int, event: Event) -> None:
        """Queue an event for the next `flush`."""
        self._waiting.setdefault(loop, []).append((reader, index, event))

    def flush(self) -> None:
        """Hand over all that waits. A reader whose loop has closed is closed, too."""
        waiting, self._waiting = self._waiting, {}
        for loop, events in waiting.items():
            try:
                if loop.is_closed():
                    raise RuntimeError("the event loop has closed")
                if loop not in self._bells:
                    self._bells[loop] = Bell(loop)
                self._bells[loop].ring(events)
            except RuntimeError:  # the loop has closed: nobody is left to tell
                logger.warning("%d events have no reader any more", len(events))
                for reader in {id(reader): reader for reader, _, _ in events}.values():
                    reader.close()


class Bell:
    """Wakes an event loop from another thread, which keeps the interpreter meanwhile.

    It does not keep the loop.

    Raises:
        RuntimeError: the loop has closed.
    """

    def __init__(self, loop: AbstractEventLoop) -> None:
        self._events: deque[list[tuple[Reader, int, Event]]] = deque()
        self._ear, self._rope = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for end in (self._ear, self._rope):
            finalize(loop, os.close, end)
        loop.call_soon_threadsafe(self._listen, loop)

    def ring(self, events: list[tuple[Reader, int, Event]]) -> None:
        """Have events delivered on the loop."""
        self._events.append(events)
        _write(self._rope, b"!", 1)  # a pipe that is full has rung already

    def _listen(self, loop: AbstractEventLoop) -> None:
        loop.add_reader(self._ear, self._hear)
        self._answer()

    def _hear(self) -> None:
        os.read(self._ear, 4096)
        self._answer()

    def _answer(self) -> None:
        while self._events:
            _deliver(self._events.popleft())


#: write(2) that keeps the interpreter: it never waits, and costs less than to get that back.
_write: Any = ctypes.PyDLL(None).write
_write.argtypes, _write.restype = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t), ctypes.c_ssize_t


def _deliver(events: list[tuple[Reader, int, Event]]) -> None:
    for reader, index, event in events:
        try:
            reader.arrived(index, event)
        except Exception:  # one reader's fault is not the next one's
            logger.exception("an event was not taken")
