"""Whoever reads a stream says how many tokens are worth being woken for."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from serve_helpers import Live, before_forward, request, serving, stepped

from quantkit.models.runtime import Runtime
from quantkit.serve.api.generation import UNTIL_THE_END
from quantkit.serve.engine import Engine
from quantkit.serve.events import Event, Finished, TokenEvent

TOKENS = 9


async def turn(engine: Engine) -> None:
    """A step, and what the event loop does with its tokens."""
    engine._take_orders()
    engine.step()
    engine.flush()
    for _ in range(4):
        await asyncio.sleep(0)


async def batches(engine: Engine, names: str, tokens: int) -> list[list[tuple[int, Event]]]:
    """What a reader gets who first waits for one token and then for ``tokens``."""
    found: list[list[tuple[int, Event]]] = []

    async def read() -> None:
        asked = 1
        while batch := await stream.batch(asked):
            found.append(batch)
            asked = tokens

    stream = engine.stream(
        *(request(name, [5, 6], max_tokens=TOKENS, ignore_eos=True) for name in names)
    )
    reading = asyncio.create_task(read())
    while engine.live:
        await turn(engine)
    await asyncio.wait_for(reading, 10)
    return found


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [(1, [1] * 8 + [2]), (3, [1, 3, 3, 3]), (4, [1, 4, 5]), (UNTIL_THE_END, [1, 9])],
)
def test_a_reader_is_woken_for_so_many_tokens_or_the_end(
    native: Runtime, tokens: int, sizes: list[int]
) -> None:
    found = asyncio.run(batches(stepped(native), "a", tokens))
    assert [len(batch) for batch in found] == sizes
    events = [event for batch in found for _, event in batch]
    assert [type(event) for event in events] == [TokenEvent] * TOKENS + [Finished]


def test_several_answers_are_waited_for_together(native: Runtime) -> None:
    """Four tokens of each of two; an end never waits, and the other answer goes on."""
    found = asyncio.run(batches(stepped(native), "ab", 4))
    assert [len(batch) for batch in found[1:-1]] == [8] * (len(found) - 2)
    for index in (0, 1):
        mine = [event for batch in found for i, event in batch if i == index]
        assert [type(event) for event in mine] == [TokenEvent] * TOKENS + [Finished]


# --- over HTTP -------------------------------------------------------------------------------


def pieces(server: Live, path: str, body: dict[str, Any]) -> list[bytes]:
    """The chunks of a chunked answer as the server wrote them."""
    address = urlsplit(server.url)
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall(head.encode() + payload)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    status, rest = answer.split(b"\r\n\r\n", 1)
    assert b" 200 " in status.split(b"\r\n")[0], answer
    found = []
    while rest:
        size, rest = rest.split(b"\r\n", 1)
        found.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    assert found.pop() == b"", "it ends as it should"
    return found


def events_of(piece: bytes) -> list[Any]:
    lines = [line for line in piece.split(b"\n") if line.startswith(b"data: ")]
    return [line if line == b"data: [DONE]" else json.loads(line[6:]) for line in lines]


def tokens_of(events: list[Any]) -> list[int]:
    choices = [choice for e in events if isinstance(e, dict) for choice in e["choices"]]
    return [i for choice in choices for i in choice.get("token_ids") or ()]


COMPLETION = {
    "prompt": [5, 6],
    "max_tokens": TOKENS,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
    "return_token_ids": True,
}


def test_events_are_the_same_and_written_together(native: Runtime) -> None:
    """One event a token either way: what changes is how often the server writes."""
    with serving(native) as usual:
        alone = pieces(usual, "/v1/completions", COMPLETION)
    with serving(native, stream_interval=4) as live:
        together = pieces(live, "/v1/completions", COMPLETION)
    expected = [event for piece in alone for event in events_of(piece)]
    found = [event for piece in together for event in events_of(piece)]
    for event in (*expected, *found):
        if isinstance(event, dict):
            event.pop("id"), event.pop("created")
    assert found == expected
    counts = [len(tokens_of(events_of(piece))) for piece in together]
    assert sum(counts) == TOKENS
    # However many steps have ended when the reader looks: four of them, but for first and last.
    assert all(n >= 4 for n in [n for n in counts if n][1:-1])
    assert len([n for n in counts if n]) <= 4


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_every_way_to_stream_says_the_same(native: Runtime, path: str) -> None:
    def said(server: Live) -> str:
        asked = {"temperature": 0, "stream": True}
        if path == "/v1/responses":
            asked |= {"input": "hello there", "max_output_tokens": TOKENS}
        else:
            asked |= {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 9}
        events = [event for piece in pieces(server, path, asked) for event in events_of(piece)]
        deltas = [e.get("delta") for e in events if isinstance(e, dict)]
        deltas += [
            choice["delta"].get("content")
            for e in events
            if isinstance(e, dict)
            for choice in e.get("choices", ())
        ]
        return "".join(text for text in deltas if isinstance(text, str))

    with serving(native) as usual:
        expected = said(usual)
    with serving(native, stream_interval=5) as live:
        assert said(live) == expected
    assert expected


def test_a_failure_goes_out_behind_what_came_before(
    native: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = count()

    def breaks(token_ids: list[int]) -> None:
        assert next(passes) < 6

    with serving(native, stream_interval=50) as live:
        before_forward(monkeypatch, live.engine.runner, breaks)
        body = COMPLETION | {"max_tokens": 40}
        events = [e for piece in pieces(live, "/v1/completions", body) for e in events_of(piece)]
    *given, failed, done = events
    assert len(tokens_of(given)) == 6
    assert "error" in failed
    assert done == b"data: [DONE]"


def test_a_client_that_leaves_is_noticed_while_tokens_wait(native: Runtime) -> None:
    with serving(native, stream_interval=UNTIL_THE_END) as live:
        body = COMPLETION | {"max_tokens": 400}
        with httpx.stream("POST", live.url + "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
        deadline = time.monotonic() + 20
        while live.engine.live and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not live.engine.live
