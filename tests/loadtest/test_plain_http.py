"""HTTP answers however the network cuts them, and servers that break off."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import httpx
import pytest

from quantkit.loadtest.plain_http import PIECES, PlainTransport

HEAD = b"HTTP/1.1 200 OK\r\nX-Told: yes\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n4\r\nab\nc\r\n2\r\nd\n\r\n0\r\n\r\n"


def ask(pieces: Sequence[bytes]) -> tuple[httpx.Response, bytes]:
    """The answer of a server that sends so many bytes at a time, and what it was asked."""
    asked = b""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked = await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(7)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    async def run() -> httpx.Response:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        base = f"http://127.0.0.1:{port}"
        async with server, httpx.AsyncClient(base_url=base, transport=PlainTransport()) as client:
            return await client.post("/v1/completions?a=b", json={"a": 1})

    return asyncio.run(run()), asked


@pytest.mark.parametrize(
    "pieces", [[CHUNKED], [bytes([byte]) for byte in CHUNKED]], ids=["whole", "bytes"]
)
def test_a_chunked_answer(pieces: list[bytes]) -> None:
    response, asked = ask(pieces)
    assert (response.status_code, response.headers["x-told"]) == (200, "yes")
    assert response.content == b"ab\ncd\n"
    assert asked.startswith(b"POST /v1/completions?a=b HTTP/1.1\r\n")
    assert asked.endswith(b'{"a":1}')


def test_an_answer_that_ends_with_its_connection() -> None:
    response, _ = ask([HEAD + b"\r\n", b"ab", b"c"])
    assert response.content == b"abc"


def test_what_comes_before_an_answer_is_passed_over() -> None:
    response, _ = ask([b"HTTP/1.1 103 Early Hints\r\n\r\n", CHUNKED])
    assert response.content == b"ab\ncd\n"


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 20", CHUNKED[:-9], b"no HTTP\r\n\r\n"])
def test_an_answer_that_breaks_off_is_a_protocol_error(sent: bytes) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        ask([sent])


def test_pieces_have_their_times() -> None:
    response, _ = ask([bytes([byte]) for byte in CHUNKED])
    times = [when for when, _ in response.extensions[PIECES]]
    assert times == sorted(times)
    assert b"".join(piece for _, piece in response.extensions[PIECES]) == b"ab\ncd\n"


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
@pytest.mark.parametrize("behind", [b"", b"HTTP/1.1 400 Bad"])
def test_what_follows_an_answer_is_nobodys(close: bytes, behind: bytes) -> None:
    """Also where it comes before anybody has looked at the answer."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(CHUNKED.replace(b"X-Told: yes\r\n", b"X-Told: yes\r\n" + close) + behind)
        writer.close()

    async def run() -> bytes:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with (
            server,
            httpx.AsyncClient(transport=PlainTransport()) as client,
            client.stream("GET", f"http://127.0.0.1:{port}") as response,
        ):
            await asyncio.sleep(0.1)
            return await response.aread()

    assert asyncio.run(asyncio.wait_for(run(), 20)) == b"ab\ncd\n"


def test_a_request_that_cannot_be_written_is_an_error() -> None:
    async def run() -> None:
        async with httpx.AsyncClient(transport=PlainTransport()) as client:
            await client.get("http://127.0.0.1:1/", headers={"Authorization": "Bearer a\nb"})

    with pytest.raises(httpx.LocalProtocolError):
        asyncio.run(run())


def test_nobody_there() -> None:
    async def run() -> None:
        async with httpx.AsyncClient(transport=PlainTransport()) as client:
            await client.get("http://127.0.0.1:1/")

    with pytest.raises(httpx.ConnectError):
        asyncio.run(run())
