"""What `soak` does to a server. To add a fault, add a function and a row in `FAULTS`."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.soak_server import COMPLETIONS, Soak, body_of, hold, replaced, wait_for

BAD_BODIES: tuple[bytes, ...] = (
    b"",
    b"{",
    b'{"prompt": ""}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "n": 1000000000}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": [999999999]}',
    b'{"prompt": "a", "structured_outputs": {"regex": "(a"}}',
    b'{"prompt":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
)


async def disconnects(soak: Soak) -> None:
    """Half of them hang up before all is sent, the others while they wait or read."""
    whole = soak.raw(json.dumps(body_of("storm", stream=True, tokens=200)).encode())

    def one(i: int) -> None:
        with socket.create_connection(soak.address, timeout=30) as sock:
            sock.sendall(whole if i % 2 else whole[: -1 - i])
            if i % 4 == 1:
                sock.recv(64)

    await asyncio.gather(*(asyncio.to_thread(one, i) for i in range(24)))


async def stalled_readers(soak: Soak) -> None:
    """They ask for a stream and never read it."""
    whole = soak.raw(json.dumps(body_of("stall", stream=True, tokens=200)).encode())
    socks = []
    try:
        for _ in range(4):
            sock = socket.socket()
            socks.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            await asyncio.to_thread(sock.connect, soak.address)
            sock.sendall(whole)
        await asyncio.sleep(1.0)
    finally:
        for sock in socks:
            sock.close()


async def bad_requests(soak: Soak) -> None:
    """Each is refused as the client's fault."""
    async with soak.client() as client:
        for body in BAD_BODIES:
            headers = {"content-type": "application/json"}
            response = await client.post(COMPLETIONS, content=body, headers=headers)
            hold(400 <= response.status_code < 500, f"{body[:40]!r}: {response.status_code}")


async def cancellations(soak: Soak) -> None:
    """They read some tokens and leave."""

    async def one(chunks: int) -> None:
        async with (
            soak.client() as client,
            client.stream(
                "POST", COMPLETIONS, json=body_of("leave", stream=True, tokens=200)
            ) as response,
        ):
            async for _ in response.aiter_lines():
                chunks -= 1
                if chunks < 0:
                    return

    await asyncio.gather(*(one(i) for i in range(12)))


async def engine_exception(soak: Soak) -> None:
    """A step raises outside any request's work: all that are live fail, once."""
    broken = threading.Event()

    def schedule(now: float) -> Any:
        broken.set()
        raise RuntimeError("injected")

    with replaced(soak.engine.scheduler, "schedule", schedule):
        await wait_for(broken.is_set)


async def sequence_exception(soak: Soak) -> None:
    """One request's work raises: it fails, and nobody else."""
    run, broken = soak.engine.runner.run, threading.Event()

    def once(works: Any) -> Any:
        results = list(run(works))
        if not broken.is_set():
            broken.set()
            results[0] = MemoryError("injected")
        return results

    failed = soak.answers["failed"]
    with replaced(soak.engine.runner, "run", once):
        await wait_for(broken.is_set)
    await wait_for(lambda: soak.answers["failed"] > failed)
    hold(soak.answers["failed"] == failed + 1, "one broke, and others failed")


async def hang(soak: Soak) -> None:
    """A step does not end: not ready, but alive; and ready again when it does."""
    run, go_on = soak.engine.runner.run, threading.Event()

    def stuck(works: Any) -> Any:
        go_on.wait(60)
        return run(works)

    async with soak.client() as client:
        try:
            with replaced(soak.engine.runner, "run", stuck):
                await wait_for(lambda: not soak.engine.ready)
                hold((await client.get("/ready")).status_code == 503, "it hangs and says ready")
                hold((await client.get("/health")).status_code == 200, "it hangs and is not alive")
        finally:
            go_on.set()
        await wait_for(lambda: soak.engine.ready)
        hold((await client.get("/ready")).status_code == 200, "it goes on and is not ready")


async def nothing(soak: Soak) -> None:
    """Traffic alone."""
    await asyncio.sleep(0.5)


FAULTS: dict[str, Callable[[Soak], Awaitable[None]]] = {
    "nothing": nothing,
    "disconnects": disconnects,
    "stalled readers": stalled_readers,
    "bad requests": bad_requests,
    "cancellations": cancellations,
    "engine exception": engine_exception,
    "sequence exception": sequence_exception,
    "hang": hang,
}

#: Faults that may fail somebody else's request.
BREAKING = {"engine exception", "sequence exception"}
