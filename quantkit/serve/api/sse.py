"""Server-sent events that notice when the client is gone.

Hand-written because sse-starlette replaces uvicorn's signal handler when it is imported and ends
streams at the first signal, where a graceful drain has to let them finish.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quantkit.serve.api.protocol import PIECES, WritePiece

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client closed the connection."""


def encode(body: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + _json(body) + b"\n\n"


class Encoder:
    """`encode` for events that differ in one choice: the rest of them is written once.

    ``head`` are the fields in front of ``choices``, ``tail`` those behind.
    """

    def __init__(self, head: dict[str, Any], tail: dict[str, Any]) -> None:
        fields = _json(head | {"choices": []} | tail)
        empty = len(_json(head | {"choices": []})) - len(b"]}")
        self._front, self._back = b"data: " + fields[:empty], fields[empty:] + b"\n\n"

    def __call__(self, choice: dict[str, Any]) -> bytes:
        return self._front + _json(choice) + self._back


def _json(value: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:
        # What JSON can say and orjson cannot: half of a surrogate pair, which a client may send and
        # have echoed, an integer beyond 64 bits or deep nesting, as in the schema of a tool.
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return text.encode("utf-8", "replace")


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``, but cancel it and raise `ClientGone` when the client disconnects.

    ``receive`` must have given out the body already, so that the next message is the disconnect.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStreamResponse(Response):
    """Sends ``chunks`` as they come; ends them and calls ``close``, whatever the end is."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        self.chunks = chunks
        self.close = close
        self.status_code = 200
        self.background = None
        # No buffering by proxies: an event is worth something only while it is fresh.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send(send, scope))
        except (ClientGone, OSError):
            pass
        finally:
            self.close()

    async def _send(self, send: Send, scope: Scope) -> None:
        async def usual(chunk: bytes) -> None:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})

        write: WritePiece = scope.get("extensions", {}).get(PIECES, usual)
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self.chunks) as chunks:
            async for chunk in chunks:
                await write(chunk)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
