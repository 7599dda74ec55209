"""The async side of the engine: events of one or several requests, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from quantkit.serve.events import Event, Failed, Finished, TokenEvent

if TYPE_CHECKING:
    from quantkit.serve.engine import Engine
    from quantkit.serve.request import Request


class EventStream:
    """``(index, event)`` one by one or, by `batch`, all that came since: index counts the requests.

    Ends after the terminal event of the last request. Whoever stops reading early must call
    `close`, which cancels what still runs; calling it at the end does nothing. One task reads.

    ``requests`` have passed `Engine.check` and have their grammars. ``observe`` sees each event
    when the event loop gets it, read or not, the terminal ones of closed streams included.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        observe: Callable[[int, Event], None] = lambda index, event: None,
    ) -> None:
        self._engine = engine
        self._observe = observe
        self._loop = asyncio.get_running_loop()
        self._arrived: list[tuple[int, Event]] = []
        self._reader: asyncio.Future[None] | None = None
        self._enough = 1
        self._urgent = False
        self._open: dict[int, str] = {}
        self._transcripts = [engine.transcript(request) for request in requests]
        try:
            for index, request in enumerate(requests):
                engine.enqueue(request, partial(self._post, index))
                self._open[index] = request.id
        except BaseException:
            self.close()  # all or none: a half-submitted batch would run for nobody
            raise

    def _post(self, index: int, event: Event) -> None:
        self._engine.outbox.post(self._loop, self, index, event)

    def arrived(self, index: int, event: Event) -> None:
        """The event loop has an event."""
        written = self._transcripts[index](event)
        if written is None:
            return
        event = written
        self._arrived.append((index, event))
        self._urgent = self._urgent or not isinstance(event, TokenEvent)
        if self._reader is not None and self._due and not self._reader.done():
            self._reader.set_result(None)
        self._observe(index, event)

    @property
    def _due(self) -> bool:
        return self._urgent or len(self._arrived) >= self._enough

    async def batch(self, tokens: int = 1) -> list[tuple[int, Event]]:
        """Wait for ``tokens`` of them a request that runs, or an event of another kind.

        Returns all that are there, and nothing after the last ones.
        """
        if not self._open:
            return []
        self._enough = tokens * len(self._open)
        while not self._due:
            # A queue does the same for any number of readers, at three times the price a token.
            self._reader = self._loop.create_future()
            await self._reader
        batch, self._arrived, self._urgent = self._arrived, [], False
        for index, event in batch:
            if isinstance(event, Finished | Failed):
                self._open.pop(index, None)
        return batch

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        async for item in self.every(1):
            yield item

    async def every(self, tokens: int) -> AsyncIterator[tuple[int, Event]]:
        """One by one what `batch` gives."""
        while batch := await self.batch(tokens):
            for item in batch:
                yield item

    def close(self) -> None:
        """Cancel whatever has not ended."""
        for request_id in self._open.values():
            self._engine.cancel(request_id)
        self._open.clear()
