"""Pure-ASGI middleware: who may call, and how much they may send.

Pure ASGI because wrapping the request in another task (as Starlette's BaseHTTPMiddleware does)
hides the client's disconnect from the endpoint, and a disconnect must cancel the generation.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantkit.errors import UsageError
from quantkit.serve.api.errors import error_body

MAX_BODY_BYTES = 4 * 1024 * 1024
#: Probes carry no key: they say nothing but "yes" or "no".
OPEN_PATHS = frozenset({"/health", "/ready"})


def read_api_keys(path: Path) -> tuple[str, ...]:
    """One key a line; blank lines and lines that begin with ``#`` are skipped."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"API keys file {path} cannot be read: {error}") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise UsageError(f"API keys file {path} holds no key", remedy="write one key a line")
    return keys


class ApiKeys:
    """Refuses requests without one of the keys; passes everything if there are none."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self.app = app
        # Digests have one length, so comparing them does not tell how long a key is.
        self.digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.digests and scope["path"] not in OPEN_PATHS:
            header = Headers(scope=scope).get("authorization", "")
            scheme, _, key = header.partition(" ")
            if scheme.lower() != "bearer" or not self._known(key.strip()):
                body = error_body(
                    "missing or wrong API key; send 'Authorization: Bearer KEY'",
                    "authentication_error",
                    code="invalid_api_key",
                )
                response = JSONResponse(body, 401, headers={"WWW-Authenticate": "Bearer"})
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _known(self, key: str) -> bool:
        digest = _digest(key)
        # Every key is compared, so the time does not tell which one came close.
        return sum(hmac.compare_digest(digest, known) for known in self.digests) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class BodyLimit:
    """Refuses bodies over ``limit`` bytes before they are held in memory."""

    def __init__(self, app: ASGIApp, limit: int = MAX_BODY_BYTES) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > self.limit:
            await self._refuse(scope, receive, send)
            return
        chunks = await self._read(receive)
        if chunks is None:
            await self._refuse(scope, receive, send)
            return
        await self.app(scope, _replay(chunks, receive), send)

    async def _read(self, receive: Receive) -> list[Message] | None:
        """The whole body, or None if it is too long. Chunked bodies declare no length."""
        messages: list[Message] = []
        size = 0
        while True:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if size > self.limit:
                return None
            if message["type"] != "http.request" or not message.get("more_body", False):
                return messages

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = error_body(f"the body is over {self.limit} bytes", "invalid_request_error")
        # The rest of the body is never read, so the connection cannot be used again.
        response = JSONResponse(body, 413, headers={"Connection": "close"})
        await response(scope, receive, send)


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """A ``receive`` that gives ``messages`` first and then goes on as before."""
    pending = iter(messages)

    async def replay() -> Message:
        for message in pending:
            return message
        return await receive()

    return replay
