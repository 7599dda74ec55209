"""Another OpenAI-compatible server, whose answers the web page shows beside ours.

The browser never talks to it: this server passes requests on, to the one address that its operator
named. So the page need not connect anywhere else, the other server needs no CORS headers, and
neither server's key reaches the other.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx

from quantkit.errors import QuantkitError

CONNECT_SECONDS = 5.0
#: A list of models is there at once.
LIST_SECONDS = 10.0
#: Of a prompt that is read, or between two pieces of an answer.
SILENT_SECONDS = 120.0
#: Of anything that is not streamed.
MAX_BYTES = 256 * 1024
#: Of what an unexpected answer said, so much is shown.
SHOWN_CHARACTERS = 300
_JSON = {"Content-Type": "application/json"}


class PeerError(QuantkitError):
    """The other server does not answer, or not as the API says."""


class Peer:
    """Where it is, and how to ask it.

    Args:
        url: its address, http or https, with or without ``/v1``.
        key: bearer token; None sends none.
        model: the name it serves the model by; None where it serves one.
    """

    def __init__(self, url: str, key: str | None = None, model: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key = key
        self._model = model
        # Once: reading the certificates takes longer than a small model's first token.
        self._tls = httpx.create_ssl_context(trust_env=False)

    async def name(self) -> str:
        """The model's name there.

        Raises:
            PeerError: it does not answer, or serves not one model or not the one asked for.
        """
        try:
            async with (
                asyncio.timeout(LIST_SECONDS),
                self._client() as client,
                client.stream("GET", "/v1/models") as response,
            ):
                body = await _read(response)
                self._expect(response, "application/json", body)
        except (TimeoutError, httpx.HTTPError) as error:
            raise self._silent(error) from error
        listed = _object(body).get("data")
        cards = listed if isinstance(listed, list) else []
        names = [str(card["id"]) for card in cards if isinstance(card, dict) and "id" in card]
        if self._model is not None and self._model not in names:
            raise PeerError(f"{self.url} does not serve {self._model!r}; it has {names[:10]}")
        if self._model is None and len(names) != 1:
            raise PeerError(
                f"{self.url} serves {len(names)} models: {names[:10]}",
                remedy="name one with --compare-model",
            )
        return self._model or names[0]

    async def chat(self, body: bytes) -> AsyncGenerator[bytes, None]:
        """The server-sent events of a chat request with ``"stream": true``, as they come.

        Args:
            body: the request, as JSON.

        Raises:
            PeerError: it does not answer, refuses, sends no events, or falls silent among them.
        """
        try:
            async with (
                self._client() as client,
                client.stream(
                    "POST", "/v1/chat/completions", content=body, headers=_JSON
                ) as response,
            ):
                refusal = b"" if response.status_code == 200 else await _read(response)
                self._expect(response, "text/event-stream", refusal)
                async for chunk in response.aiter_bytes():
                    yield chunk
        except httpx.HTTPError as error:
            raise self._silent(error) from error

    def _client(self) -> httpx.AsyncClient:
        # A client a request, as no event loop is there to close a longer one at the end.
        return httpx.AsyncClient(
            base_url=self.url,
            headers={} if self._key is None else {"Authorization": f"Bearer {self._key}"},
            timeout=httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS),
            verify=self._tls,
            # Neither proxies of the environment nor a redirect may see the prompts or the key.
            trust_env=False,
            follow_redirects=False,
        )

    def _expect(self, response: httpx.Response, media_type: str, body: bytes) -> None:
        if response.status_code != 200:
            said = _message(body)[:SHOWN_CHARACTERS]
            raise PeerError(f"{self.url} answered with status {response.status_code}: {said}")
        found = response.headers.get("content-type", "")
        if found.partition(";")[0].strip().lower() != media_type:
            raise PeerError(f"{self.url} answered with {found!r} where {media_type} was due")

    def _silent(self, error: Exception) -> PeerError:
        return PeerError(f"{self.url} does not answer: {str(error) or type(error).__name__}")


async def _read(response: httpx.Response) -> bytes:
    """The body, as far as it is kept."""
    body = b""
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > MAX_BYTES:
            raise PeerError(f"{response.url} answered with more than {MAX_BYTES} bytes")
    return body


def _object(body: bytes) -> dict[str, Any]:
    """A JSON object; an empty one for anything else."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _message(body: bytes) -> str:
    """What an error body says: OpenAI's message, or its text."""
    error = _object(body).get("error")
    if isinstance(error, dict) and "message" in error:
        return str(error["message"])
    return body.decode("utf-8", "replace")
