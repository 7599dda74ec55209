"""Pure-ASGI middleware: who may call, from where, and how much they may send.

Pure ASGI because wrapping the request in another task (as Starlette's BaseHTTPMiddleware does)
hides the client's disconnect from the endpoint, and a disconnect must cancel the generation.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantkit.serve.api.errors import error_body
from quantkit.serve.config import ServeConfig
from quantkit.serve.keys import find_tenant
from quantkit.serve.policy.tiers import Tenant

MAX_BODY_BYTES = 4 * 1024 * 1024
#: A body that trickles in would hold its connection for ever.
BODY_SECONDS = 30.0
#: Probes carry no key: they say nothing but "yes" or "no".
OPEN_PATHS = frozenset({"/health", "/ready"})


class ApiKeys:
    """Refuses requests without one of the keys and says whose the others are.

    The tenant is left in ``request.state.tenant``; without keys everybody is the first one.
    ``more_open_paths`` need no key, beside `OPEN_PATHS`.
    """

    def __init__(
        self, app: ASGIApp, config: ServeConfig, more_open_paths: frozenset[str] = frozenset()
    ) -> None:
        self.app = app
        self.open_paths = OPEN_PATHS | more_open_paths
        self.keys = config.keys
        self.tenants = {tenant.name: tenant for tenant in config.tenants}
        self.anybody = config.tenants[0]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self.open_paths:
            tenant = self._tenant(Headers(scope=scope).get("authorization", ""))
            if tenant is None:
                body = error_body(
                    "missing or wrong API key; send 'Authorization: Bearer KEY'",
                    "authentication_error",
                    code="invalid_api_key",
                )
                response = JSONResponse(body, 401, headers={"WWW-Authenticate": "Bearer"})
                await response(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
        await self.app(scope, receive, send)

    def _tenant(self, authorization: str) -> Tenant | None:
        if not self.keys:
            return self.anybody
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return None
        name = find_tenant(self.keys, key.strip())
        return None if name is None else self.tenants[name]


class LocalOnly:
    """Refuses what a web page of another host sends to a server without keys.

    A page may let its own name resolve to 127.0.0.1 (DNS rebinding), which the Host header
    shows, or send a form across origins, which the Origin header shows.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            for name, address in (("Host", f"//{headers.get('host', '')}"), ("Origin", origin)):
                if address is not None and not is_loopback(_hostname(address)):
                    body = error_body(
                        f"{name} {headers.get(name)!r} is not this machine; a server without API "
                        "keys answers no other unless it runs with --allow-unauthenticated",
                        "permission_error",
                    )
                    await JSONResponse(body, 403)(scope, receive, send)
                    return
        await self.app(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Only this machine can reach it. A name other than localhost may resolve to anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hostname(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:  # brackets that do not close
        return ""


class BodyLimit:
    """Refuses bodies over ``limit`` bytes before they are held in memory, and slow ones.

    When the body was there is left in ``request.state.arrival``, on the monotonic clock.
    """

    def __init__(
        self, app: ASGIApp, limit: int = MAX_BODY_BYTES, seconds: float = BODY_SECONDS
    ) -> None:
        self.app = app
        self.limit = limit
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > self.limit:
            await self._refuse(413, f"the body is over {self.limit} bytes", scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.seconds):
                chunks = await self._read(receive)
        except TimeoutError:
            message = f"the body did not arrive within {self.seconds:g} s"
            await self._refuse(408, message, scope, receive, send)
            return
        if chunks is None:
            await self._refuse(413, f"the body is over {self.limit} bytes", scope, receive, send)
            return
        # A request has arrived when all of it is here: a slow client is not a slow server.
        scope.setdefault("state", {})["arrival"] = time.monotonic()
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

    async def _refuse(
        self, status: int, message: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        body = error_body(message, "invalid_request_error")
        # The rest of the body is never read, so the connection cannot be used again.
        response = JSONResponse(body, status, headers={"Connection": "close"})
        await response(scope, receive, send)


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """A ``receive`` that gives ``messages`` first and then goes on as before."""
    pending = iter(messages)

    async def replay() -> Message:
        for message in pending:
            return message
        return await receive()

    return replay
