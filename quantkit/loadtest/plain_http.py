"""HTTP/1.1 without encryption, a connection a request: httpx's own costs four times the time of a
streamed token, on the cores that a server on the same machine wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import h11
import httpx

#: Read at once at most.
READ_BYTES = 1 << 16


class PlainTransport(httpx.AsyncBaseTransport):
    """For ``http:`` addresses. It knows no timeouts: whoever asks sets one around the whole."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        try:
            reader, writer = await asyncio.open_connection(url.host, url.port or 80)
        except OSError as error:
            raise httpx.ConnectError(str(error), request=request) from error
        body = _Body(request, reader, writer)
        try:
            head = await body.send(await request.aread())
        except BaseException:
            writer.close()
            raise
        return httpx.Response(head.status_code, headers=head.headers.raw_items(), stream=body)


class _Body(httpx.AsyncByteStream):
    """One exchange: what is sent, and the answer's body as it comes."""

    def __init__(
        self, request: httpx.Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._request = request
        self._reader = reader
        self._writer = writer
        self._state = h11.Connection(h11.CLIENT)

    async def send(self, content: bytes) -> h11.Response:
        """Send the request; returns the head of the answer."""
        request = self._request
        events: list[h11.Event] = [
            h11.Request(
                method=request.method, target=request.url.raw_path, headers=request.headers.raw
            ),
            *([h11.Data(data=content)] if content else []),
            h11.EndOfMessage(),
        ]
        self._writer.write(b"".join(self._state.send(event) or b"" for event in events))
        while not isinstance(event := await self._next(), h11.Response):
            pass
        return event

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while isinstance(event := await self._next(), h11.Data):
            yield bytes(event.data)

    async def aclose(self) -> None:
        self._writer.close()

    async def _next(self) -> object:
        try:
            while (event := self._state.next_event()) is h11.NEED_DATA:
                self._state.receive_data(await self._reader.read(READ_BYTES))
        except OSError as error:
            raise httpx.ReadError(str(error), request=self._request) from error
        except h11.RemoteProtocolError as error:
            raise httpx.RemoteProtocolError(str(error), request=self._request) from error
        return event
