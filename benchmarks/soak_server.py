"""The server that `soak` breaks: what runs it, and what is known of it."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from quantkit.models.runtime import Runtime
from quantkit.serve.api.app import create_app
from quantkit.serve.api.server import Server, bind, url
from quantkit.serve.config import open_config
from quantkit.serve.engine import Engine, EngineConfig
from quantkit.serve.events import Event, Failed, Finished
from quantkit.serve.policy.tiered import Tiered
from quantkit.serve.request import Request, Sink

COMPLETIONS = "/v1/completions"
ANSWER_TOKENS = 24
STALL_SECONDS = 0.5

#: What a quiet server may hold beyond what it held after the first pass through all faults: the
#: allocator's own unevenness, workers of thread pools that start one by one, sockets that linger.
SPARE_MEMORY = 64 * 2**20
SPARE_THREADS = 2 * min(32, (os.cpu_count() or 1) + 4)
SPARE_FILES = 8


class BrokenError(Exception):
    """Something that must hold does not."""


def hold(condition: bool, what: str) -> None:
    if not condition:
        raise BrokenError(what)


@dataclass
class Ledger:
    """Every request's terminal events, as the engine emits them."""

    ended: Counter[str] = field(default_factory=Counter)
    open: set[str] = field(default_factory=set)
    late: list[str] = field(default_factory=list)

    def watch(self, engine: Engine) -> None:
        """Look at each event of each request from now on."""
        enqueue = engine.enqueue  # what every way into the engine ends in

        def watched(request: Request, sink: Sink) -> None:
            def see(event: Event) -> None:
                if self.ended[request.id]:
                    self.late.append(f"{request.id}: {event}")
                if isinstance(event, Finished | Failed):
                    self.ended[request.id] += 1
                    self.open.discard(request.id)
                sink(event)

            self.open.add(request.id)
            try:
                enqueue(request, see)
            except BaseException:
                self.open.discard(request.id)
                raise

        engine.enqueue = watched  # type: ignore[method-assign]


@dataclass(frozen=True)
class Footprint:
    """What the process holds: bytes of memory, threads, and open files, sockets among them."""

    memory: int
    threads: int
    files: int

    @staticmethod
    def now() -> Footprint:
        process = psutil.Process()
        with process.oneshot():
            return Footprint(process.memory_info().rss, process.num_threads(), process.num_fds())

    def exceeds(self, first: Footprint) -> str | None:
        """What has grown beyond what an earlier one leaves room for, or None."""
        if self.memory > first.memory + SPARE_MEMORY:
            return f"memory grew from {first.memory / 1e6:.0f} to {self.memory / 1e6:.0f} MB"
        if self.threads > first.threads + SPARE_THREADS:
            return f"threads grew from {first.threads} to {self.threads}"
        if self.files > first.files + SPARE_FILES:
            return f"open files grew from {first.files} to {self.files}"
        return None


@dataclass
class Soak:
    """A server under test, and what is known of it."""

    engine: Engine
    server: Server
    url: str
    thread: threading.Thread
    rng: random.Random
    ledger: Ledger = field(default_factory=Ledger)
    expected: dict[str, str] = field(default_factory=dict)
    answers: Counter[str] = field(default_factory=Counter)

    def client(self) -> httpx.AsyncClient:
        """Each request has a connection of its own: one that is used again just when the server
        closes it breaks, and nobody is to blame."""
        limits = httpx.Limits(max_keepalive_connections=0)
        return httpx.AsyncClient(base_url=self.url, timeout=120, trust_env=False, limits=limits)

    @property
    def address(self) -> tuple[str, int]:
        parsed = httpx.URL(self.url)
        return parsed.host, parsed.port or 80

    def raw(self, body: bytes) -> bytes:
        """A whole HTTP request."""
        head = (
            f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {self.address[0]}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


def body_of(prompt: str, *, stream: bool, tokens: int = ANSWER_TOKENS) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }


@contextmanager
def serving(runtime: Runtime, seed: int) -> Iterator[Soak]:
    """The server that `quantkit serve` runs, in a thread."""
    access = open_config()
    limits = EngineConfig(max_sequences=4, prefill_chunk=32, stall_seconds=STALL_SECONDS)
    engine = Engine(runtime, limits, Tiered(access.tiers)).start()
    sock, up = bind("127.0.0.1", 0), threading.Event()
    app = create_app(engine, access=access)
    server = Server(app, engine, drain_seconds=60, on_ready=up.set)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    soak = Soak(engine, server, url(sock), thread, random.Random(seed))
    soak.ledger.watch(engine)
    thread.start()
    up.wait(60)
    try:
        yield soak
    finally:
        server.should_exit = True
        thread.join(60)
        engine.stop()
        sock.close()


async def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        hold(time.monotonic() < deadline, "it did not happen in time")
        await asyncio.sleep(0.005)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """For as long as the block lasts, ``owner.name`` is ``value``."""
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
