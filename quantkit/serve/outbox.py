"""Events on their way to event loops, a step's worth in one hand-over.

Each hand-over wakes the loop's thread, which then takes the interpreter away from the engine's. So
events wait until the engine is about to leave the interpreter for a native call: answers are
written while the next tokens are computed.
"""

from __future__ import annotations

import logging
from asyncio import AbstractEventLoop
from typing import Protocol

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

    def post(self, loop: AbstractEventLoop, reader: Reader, index: int, event: Event) -> None:
        """Queue an event for the next `flush`."""
        self._waiting.setdefault(loop, []).append((reader, index, event))

    def flush(self) -> None:
        """Hand over all that waits. A reader whose loop has closed is closed, too."""
        waiting, self._waiting = self._waiting, {}
        for loop, events in waiting.items():
            try:
                loop.call_soon_threadsafe(_deliver, events)
            except RuntimeError:  # the loop has closed: nobody is left to tell
                logger.warning("%d events have no reader any more", len(events))
                for reader in {id(reader): reader for reader, _, _ in events}.values():
                    reader.close()


def _deliver(events: list[tuple[Reader, int, Event]]) -> None:
    for reader, index, event in events:
        try:
            reader.arrived(index, event)
        except Exception:  # one reader's fault is not the next one's
            logger.exception("an event was not taken")
