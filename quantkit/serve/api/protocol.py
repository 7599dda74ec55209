"""HTTP/1.1 on a socket, with a limit on how long a request's head may take, and pieces of an answer
written as they are."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

#: A head that trickles in would hold its connection for ever.
HEAD_SECONDS = 10.0

#: Name of the ASGI extension: an async function that writes a piece of the body of an answer that
#: has begun and is not over. It does what ``send`` does, at a fifth of its price a token.
PIECES = "quantkit.pieces"

WritePiece = Callable[[bytes], Awaitable[None]]


class Protocol(H11Protocol):
    """uvicorn's, which waits without end for the head of a connection's first request."""

    _deadline: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._inner: Any = self.app
        self.app: Any = self._offering_pieces

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    async def _offering_pieces(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, which may write pieces where bodies are sent in chunks: h11 frames those
        of older clients by closing the connection, and those of HEAD not at all."""
        if scope["http_version"] == "1.1" and scope["method"] != "HEAD":
            scope.setdefault("extensions", {})[PIECES] = self._write_piece
        await self._inner(scope, receive, send)

    async def _write_piece(self, piece: bytes) -> None:
        """A chunk, as h11 would write it; its state is the same before and after one.

        Raises:
            ConnectionResetError: the client is gone.
        """
        cycle = self.cycle
        if self.flow.write_paused and not cycle.disconnected:
            await self.flow.drain()
        if cycle.disconnected:
            raise ConnectionResetError("the client has closed the connection")
        if piece:
            self.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_watching()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if self.conn.their_state is h11.IDLE:
            self.transport.close()
