"""uvicorn around the app, with a drain that keeps its promises.

First SIGINT or SIGTERM: the listener closes, running requests finish, the process exits with 0.
Past ``drain_seconds`` the rest is failed with an error event, and what the engine does not run,
such as another server's answer, is broken off (exit 4). A second signal ends it all (exit 130).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from quantkit.errors import EXIT_INTERRUPTED, EXIT_PASS, EXIT_RUNTIME, UsageError
from quantkit.serve.api.protocol import Protocol
from quantkit.serve.engine import Engine

#: After the engine has failed what was left, the answers still have to reach the sockets.
FLUSH_SECONDS = 2.0


def bind(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Done early, so that a taken port fails fast."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            remedy="choose another --port, or 0 for a free one",
        ) from error
    return sock


def url(sock: socket.socket) -> str:
    """The address of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server with our meaning of signals."""

    def __init__(
        self,
        app: FastAPI,
        engine: Engine,
        *,
        drain_seconds: float,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        # The timeout is a net under ours: uvicorn cancels tasks where the engine ends requests.
        config = uvicorn.Config(
            app,
            http=Protocol,
            log_level="warning",
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=int(drain_seconds + FLUSH_SECONDS) + 1,
        )
        super().__init__(config)
        self.engine = engine
        self.drain_seconds = drain_seconds
        self.on_ready = on_ready
        self.cut = 0
        self.interrupted = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn would keep the signal and raise it again after the shutdown, which turns a
        # clean drain into a KeyboardInterrupt.
        if self.should_exit:
            self.interrupted = self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.close_intake()
        watch = asyncio.create_task(self._watch_drain())
        try:
            await super().shutdown(sockets)
            # What uvicorn has just cancelled is no longer the engine's, or never was.
            self.cut = self.cut or len(self.server_state.tasks)
        finally:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch

    async def _watch_drain(self) -> None:
        """End what is left when the time is up or the user insists."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.drain_seconds
        while self.engine.live:
            if self.interrupted or loop.time() >= deadline:
                self.cut = self.engine.live
                self.engine.abort()
                return
            await asyncio.sleep(0.05)


def serve(
    app: FastAPI,
    engine: Engine,
    sock: socket.socket,
    *,
    drain_seconds: float = 30.0,
    on_ready: Callable[[], None] = lambda: None,
) -> int:
    """Serve until a signal; returns the exit code. The engine has stopped when it returns."""
    server = Server(app, engine, drain_seconds=drain_seconds, on_ready=on_ready)
    try:
        server.run(sockets=[sock])
    finally:
        engine.stop(timeout=FLUSH_SECONDS)
    if server.interrupted:
        return EXIT_INTERRUPTED
    return EXIT_RUNTIME if server.cut else EXIT_PASS
