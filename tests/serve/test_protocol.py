"""Pieces of an answer reach the socket as uvicorn's own protocol would write them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import closing, contextmanager
from types import SimpleNamespace
from typing import Any

import h11
import pytest
from fastapi import FastAPI
from serve_helpers import wait_until
from uvicorn.protocols.http.h11_impl import H11Protocol

from quantkit.serve.api import protocol
from quantkit.serve.api import server as servers
from quantkit.serve.api.sse import EventStreamResponse

PIECES = [b"data: 1\n\n", b"", b"data: " + b"x" * 300_000 + b"\n\n", b"data: [DONE]\n\n"]


async def some() -> AsyncGenerator[bytes, None]:
    for piece in PIECES:
        yield piece


@contextmanager
def serving(chunks: Any = some) -> Iterator[tuple[str, int]]:
    app = FastAPI()

    @app.api_route("/", methods=["GET", "HEAD"], response_model=None)
    async def answer() -> EventStreamResponse:
        return EventStreamResponse(chunks(), lambda: None)

    engine: Any = SimpleNamespace(live=0, close_intake=lambda: None)
    sock, up = servers.bind("127.0.0.1", 0), threading.Event()
    server = servers.Server(app, engine, drain_seconds=5, on_ready=up.set)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    assert up.wait(10)
    try:
        yield sock.getsockname()
    finally:
        server.handle_exit(15, None)
        thread.join(20)
        assert not thread.is_alive()


def raw(address: tuple[str, int], method: str, version: str) -> bytes:
    """Everything that comes back."""
    head = f"{method} / HTTP/{version}\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with closing(socket.create_connection(address, timeout=20)) as sock:
        sock.sendall(head.encode())
        return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def read(method: str, answer: bytes) -> bytes:
    """The body, as a client understands it."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target="/", headers=[("host", "localhost")]))
    client.send(h11.EndOfMessage())
    client.receive_data(answer)
    client.receive_data(b"")
    body = b""
    while not isinstance(event := client.next_event(), h11.EndOfMessage):
        assert event is not h11.NEED_DATA, "the answer has no end"
        body += bytes(event.data) if isinstance(event, h11.Data) else b""
    return body


def without_date(answer: bytes) -> list[bytes]:
    head, body = answer.split(b"\r\n\r\n", 1)
    return [*(line for line in head.split(b"\r\n") if not line.startswith(b"date:")), body]


@pytest.mark.parametrize(
    ("method", "version"), [("GET", "1.1"), ("GET", "1.0"), ("HEAD", "1.1"), ("HEAD", "1.0")]
)
def test_an_answer_is_uvicorns(method: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, for clients that know chunks, those that do not, and those that want none."""
    written: list[bytes] = []
    write = protocol.Protocol._write_piece

    async def counted(self: protocol.Protocol, piece: bytes) -> None:
        written.append(piece)
        await write(self, piece)

    monkeypatch.setattr(protocol.Protocol, "_write_piece", counted)
    with serving() as address:
        mine = raw(address, method, version)
    assert written == (PIECES if (method, version) == ("GET", "1.1") else [])
    monkeypatch.setattr(servers, "Protocol", H11Protocol)
    with serving() as address:
        theirs = raw(address, method, version)
    assert without_date(mine) == without_date(theirs)
    assert read(method, mine) == (b"".join(PIECES) if method == "GET" else b"")


def test_a_client_that_does_not_read_stops_the_answer() -> None:
    """What is written waits in the kernel's buffers and a small one here, and nowhere else."""
    made = 0

    async def endless() -> AsyncGenerator[bytes, None]:
        nonlocal made
        try:
            while made < 1000:
                made += 1
                yield b"x" * 65536
        finally:
            made = -1 if made < 1000 else made

    with serving(endless) as address, closing(socket.create_connection(address)) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: made > 1)
        before = 0
        while before != made:  # until it stands still
            before = made
            time.sleep(0.3)
        assert 1 < made < 1000
        sock.close()
        wait_until(lambda: made == -1)
