"""``/compare``: what another server says to the same chat request.

For operators only, as it spends what the other server's key may spend, past every tenant's limits.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from quantkit.serve.api.documents import PeerDocument, relayed
from quantkit.serve.api.errors import error_body
from quantkit.serve.api.generation import CLIENT_CLOSED_REQUEST
from quantkit.serve.api.schemas import ChatRequest
from quantkit.serve.api.sse import ClientGone, EventStreamResponse, encode, until_disconnect
from quantkit.serve.api.strict_json import strict_json
from quantkit.serve.peer import Peer, PeerError
from quantkit.serve.request import RequestError


def install(app: FastAPI, peer: Peer, check_operator: Callable[[HttpRequest, str], None]) -> None:
    """Add the routes; ``check_operator`` raises for everybody else, told what they may not do."""
    what = "compare with another server"

    @app.get(
        "/compare",
        response_model=None,
        responses=relayed() | {200: {"model": PeerDocument, "description": "The answer."}},
    )
    async def describe_peer(http: HttpRequest) -> dict[str, str]:
        """Who is asked: its address and its model."""
        check_operator(http, what)
        return {"url": peer.url, "model": await peer.name()}

    @app.post(
        "/compare",
        status_code=200,
        response_model=None,
        response_class=EventStreamResponse,
        responses=relayed(),
    )
    async def create_comparison(body: ChatRequest, http: HttpRequest) -> Response:
        """Pass one request on; always streamed. Fields unknown here may be known there."""
        check_operator(http, what)
        return await _pass_on(peer, body, http)


async def _pass_on(peer: Peer, body: ChatRequest, http: HttpRequest) -> Response:
    chunks = peer.chat(_written(body))
    try:
        # The status line waits for the first event, so that a refusal gets one of its own.
        first = await until_disconnect(http.receive, _first(chunks))
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return EventStreamResponse(_relay(first, chunks), lambda: None)


def _written(body: ChatRequest) -> bytes:
    """A request as it goes out.

    Raises:
        RequestError: a field that nobody checked cannot be written.
    """
    try:
        asked = body.model_dump(by_alias=True, exclude_unset=True)
        return strict_json(asked | {"stream": True}).encode()
    except (ValueError, RecursionError) as error:
        raise RequestError(
            "the request holds NaN or half a surrogate pair, or is nested too deeply to pass on"
        ) from error


async def _first(chunks: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(chunks, b"")


async def _relay(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """All chunks; if they break off, the last event says so."""
    try:
        yield first
        async for chunk in rest:
            yield chunk
    except PeerError as error:
        yield b"\n\n" + encode(error_body(str(error), "bad_gateway"))
    finally:
        await rest.aclose()
