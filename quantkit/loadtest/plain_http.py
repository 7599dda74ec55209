"""HTTP/1.1 without encryption, a connection a request, and when each piece of an answer came.

httpx wakes a task through several layers for every piece. That is four times the time of a streamed
token, on the cores that a server on the same machine wants: here pieces are noted as the event loop
reads them, and nobody is woken before the answer is over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import h11
import httpx

#: Of `httpx.Response.extensions`: (``time.perf_counter``, bytes) of each piece of the body that has
#: come so far.
PIECES = "pieces"


class PlainTransport(httpx.AsyncBaseTransport):
    """For ``http:`` addresses. It knows no timeouts: whoever asks sets one around the whole."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url, loop = request.url, asyncio.get_running_loop()
        content = await request.aread()
        state = h11.Connection(h11.CLIENT)
        try:
            sent = _written(state, request, content)
        except h11.LocalProtocolError as error:
            raise httpx.LocalProtocolError(str(error), request=request) from error
        try:
            _, exchange = await loop.create_connection(
                lambda: _Exchange(request, state, sent), url.host, url.port or 80
            )
        except OSError as error:
            raise httpx.ConnectError(str(error), request=request) from error
        try:
            head = await exchange.head
        except BaseException:
            exchange.close()
            raise
        return httpx.Response(
            head.status_code,
            headers=head.headers.raw_items(),
            stream=_Body(exchange),
            extensions={PIECES: exchange.pieces},
        )


def _written(state: h11.Connection, request: httpx.Request, content: bytes) -> bytes:
    events: list[h11.Event] = [
        h11.Request(
            method=request.method, target=request.url.raw_path, headers=request.headers.raw
        ),
        *([h11.Data(data=content)] if content else []),
        h11.EndOfMessage(),
    ]
    return b"".join(state.send(event) or b"" for event in events)


class _Body(httpx.AsyncByteStream):
    """The body of an answer, when all of it is there."""

    def __init__(self, exchange: _Exchange) -> None:
        self._exchange = exchange

    async def __aiter__(self) -> AsyncIterator[bytes]:
        await self._exchange.over
        for _, piece in self._exchange.pieces:
            yield piece

    async def aclose(self) -> None:
        self._exchange.close()


class _Exchange(asyncio.Protocol):
    """Sends a request, which ``state`` has framed as ``sent``, and notes what comes back.

    Attributes:
        head: of the answer.
        pieces: of its body, with their times.
        over: the body is whole.
    """

    def __init__(self, request: httpx.Request, state: h11.Connection, sent: bytes) -> None:
        loop = asyncio.get_running_loop()
        self.head: asyncio.Future[h11.Response] = loop.create_future()
        self.over: asyncio.Future[None] = loop.create_future()
        self.pieces: list[tuple[float, bytes]] = []
        self._request = request
        self._state = state
        self._sent = sent
        self._transport: asyncio.WriteTransport | None = None

    def close(self) -> None:
        """Let go of the connection."""
        if self._transport is not None:
            self._transport.close()
        for future in (self.head, self.over):
            future.cancel()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        transport.write(self._sent)

    def data_received(self, data: bytes) -> None:
        self._receive(data)

    def eof_received(self) -> None:
        self._receive(b"")

    def connection_lost(self, exc: Exception | None) -> None:
        message = "the connection was closed" if exc is None else str(exc)
        self._fail(httpx.ReadError(message, request=self._request))

    def _receive(self, data: bytes) -> None:
        now = time.perf_counter()
        if self.over.done():  # what follows an answer, and one that nobody waits for any more
            return
        try:
            self._state.receive_data(data)
            while isinstance(
                event := self._state.next_event(),
                h11.InformationalResponse | h11.Response | h11.Data,
            ):
                if isinstance(event, h11.Data):
                    self.pieces.append((now, bytes(event.data)))
                elif isinstance(event, h11.Response) and not self.head.done():
                    self.head.set_result(event)
            if isinstance(event, h11.EndOfMessage):
                self.over.set_result(None)
            elif event is not h11.NEED_DATA:
                raise h11.RemoteProtocolError("the connection was closed before an answer")
        except h11.RemoteProtocolError as error:
            self._fail(httpx.RemoteProtocolError(str(error), request=self._request))

    def _fail(self, error: httpx.TransportError) -> None:
        """Whoever waits hears of it; what is over stays over."""
        for future in (self.head, self.over):
            if not future.done():
                future.set_exception(error)
                future.exception()  # looked at, also where nobody waits
