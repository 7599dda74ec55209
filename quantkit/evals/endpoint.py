"""An OpenAI-compatible server as something to ask: bounded, patient, and trusting nothing.

Requests run at most ``concurrency`` at a time. 429 and 503 are tried again, after the time that
the server's ``Retry-After`` names (RFC 9110 §10.2.3); everything else that is not an answer ends
the evaluation, because a missing item must never be scored as wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx

from quantkit.errors import QuantkitError, UsageError

T = TypeVar("T")
Json = dict[str, Any]

#: Statuses that mean "not now".
BUSY = (429, 503)

#: How often one request is sent, all in all.
ATTEMPTS = 8

#: A server that wants a longer pause than this is not waited for.
MAX_PAUSE_SECONDS = 60.0

#: Of what an unexpected answer said, so much is shown.
SHOWN_CHARACTERS = 300


@dataclass(frozen=True)
class EndpointConfig:
    """Where a server is, and how to ask it.

    Attributes:
        url: its address, with or without ``/v1``.
        model: the name it serves the model by; None where it serves one.
        key: bearer token.
        concurrency: requests under way at once.
        timeout: seconds that one answer may take.

    Raises:
        UsageError: a URL that is not plain http or https.
    """

    url: str
    model: str | None = None
    key: str | None = field(default=None, repr=False)
    concurrency: int = 8
    timeout: float = 300.0

    def __post_init__(self) -> None:
        check_address(self.url, "endpoint", "--endpoint-key-file")

    @property
    def base(self) -> str:
        """The URL without ``/v1``."""
        return self.url.rstrip("/").removesuffix("/v1")


def check_address(address: str, role: str, key_option: str) -> None:
    """Refuse what is no plain address of a server.

    Args:
        address: a URL.
        role: what the server is here, for the message.
        key_option: where its key belongs.

    Raises:
        UsageError: not http or https, or a URL that holds a password, a query or a fragment.
    """
    try:
        url = httpx.URL(address)
    except (httpx.InvalidURL, TypeError) as e:
        raise UsageError(f"{role} {address!r}: not a URL ({e})") from e
    # Any number passes for a port until a socket is asked for it.
    is_port = url.port is None or 0 < url.port < 1 << 16
    if url.scheme not in ("http", "https") or not url.host or not is_port:
        raise UsageError(
            f"{role} {address!r}: not an http or https address",
            remedy="such as http://127.0.0.1:8000",
        )
    if url.userinfo or url.query or url.fragment:
        raise UsageError(
            f"{role}: the URL holds a password, a query or a fragment",
            remedy=f"give the plain address, and a key by {key_option}",
        )


def read_key(path: Path) -> str:
    """The first line of a file that is neither blank nor a comment.

    Raises:
        UsageError: there is none, or the file cannot be read.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: cannot be read ({e})") from e
    for line in lines:
        if line and not line.startswith("#"):
            if not line.isascii() or not line.isprintable():
                raise UsageError(f"{path}: the key holds characters that no header may")
            return line
    raise UsageError(f"{path}: holds no key", remedy="write the key on a line of its own")


@dataclass(frozen=True)
class Endpoint:
    """A server that answered.

    Attributes:
        config: how it is asked.
        model: the name of the model there.
        max_length: longest prompt and answer together, in tokens; None where it does not say.
        server: its name and version as far as it says, such as ``vllm 0.32.0``.
        fingerprint: what the server itself says of the model, empty for most.
    """

    config: EndpointConfig
    model: str
    max_length: int | None
    server: str
    fingerprint: Mapping[str, Any] = field(default_factory=dict)

    def complete(
        self, bodies: Sequence[Json], read: Callable[[int, Json], T], done: Callable[[int], None]
    ) -> list[T]:
        """``POST /v1/completions`` for each body.

        Args:
            bodies: without ``model``.
            read: (index, the answer) → what is kept of it; raises where it is no answer.
            done: told how many are finished.

        Raises:
            QuantkitError: the first request that failed; the others are cancelled.
        """
        named = [{"model": self.model, **body} for body in bodies]
        return asyncio.run(_complete(self.config, named, read, done))


def connect(config: EndpointConfig) -> Endpoint:
    """Ask a server what it is.

    Raises:
        UsageError: it serves several models and none was named, or not the one that was.
        QuantkitError: it cannot be reached, or is no OpenAI-compatible server.
    """
    return asyncio.run(_connect(config))


async def _connect(config: EndpointConfig) -> Endpoint:
    async with _client(config) as client:
        listed = await _send(client, config, "GET", "/v1/models")
        cards = listed.get("data")
        if not isinstance(cards, list) or not all(isinstance(c, dict) and "id" in c for c in cards):
            raise QuantkitError(
                f"{config.base}/v1/models: {_short(listed)} is no list of models",
                remedy="give the address of an OpenAI-compatible server",
            )
        card = _choose(config, cards)
        version = None
        with contextlib.suppress(QuantkitError):  # few servers have it
            version = (await _send(client, config, "GET", "/version")).get("version")
    limit, told = card.get("max_model_len"), card.get("fingerprint")
    owner = str(card.get("owned_by") or "unknown")
    return Endpoint(
        config=config,
        model=str(card["id"]),
        max_length=limit if isinstance(limit, int) and limit > 0 else None,
        server=owner if version is None else f"{owner} {version}",
        fingerprint=told if isinstance(told, dict) else {},
    )


def _choose(config: EndpointConfig, cards: list[Json]) -> Json:
    names = [str(card["id"]) for card in cards]
    if config.model is None:
        if len(cards) != 1:
            raise UsageError(
                f"{config.base} serves {len(cards)} models: {', '.join(names[:10])}",
                remedy="name one with --endpoint-model",
            )
        return cards[0]
    for card in cards:
        if card["id"] == config.model:
            return card
    raise UsageError(
        f"{config.base} does not serve {config.model!r}",
        remedy=f"it has {', '.join(names[:10])}" if names else "it has no model",
    )


# --- HTTP ------------------------------------------------------------------------------------


def _client(config: EndpointConfig) -> httpx.AsyncClient:
    headers = {} if config.key is None else {"Authorization": f"Bearer {config.key}"}
    return httpx.AsyncClient(
        base_url=config.base,
        headers=headers,
        timeout=config.timeout,
        limits=httpx.Limits(max_connections=config.concurrency),
        # Neither proxies of the environment nor a redirect may see the prompts or the key.
        trust_env=False,
        follow_redirects=False,
    )


async def _complete(
    config: EndpointConfig,
    bodies: Sequence[Json],
    read: Callable[[int, Json], T],
    done: Callable[[int], None],
) -> list[T]:
    slots = asyncio.Semaphore(config.concurrency)
    finished = 0

    async with _client(config) as client:

        async def one(index: int, body: Json) -> T:
            nonlocal finished
            async with slots:
                answer = read(index, await _send(client, config, "POST", "/v1/completions", body))
            finished += 1
            done(finished)
            return answer

        tasks = [asyncio.create_task(one(i, body)) for i, body in enumerate(bodies)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _send(
    client: httpx.AsyncClient,
    config: EndpointConfig,
    method: str,
    path: str,
    body: Json | None = None,
) -> Json:
    """One answer as JSON, after as many tries as a busy server needs.

    Raises:
        QuantkitError: no connection, no answer in time, a status that is no success, or a body
            that is not a JSON object.
    """
    where = f"{config.base}{path}"
    for attempt in range(ATTEMPTS):
        try:
            async with asyncio.timeout(config.timeout):
                response = await client.request(method, path, json=body)
        except (TimeoutError, httpx.TimeoutException):
            raise QuantkitError(
                f"{where}: no answer in {config.timeout:g} s",
                remedy="see the server's log, or raise --endpoint-timeout",
            ) from None
        except httpx.HTTPError as e:
            raise QuantkitError(
                f"{where}: {type(e).__name__}: {e or 'the connection broke'}",
                remedy="check that the server runs and that the address is right",
            ) from e
        if response.status_code not in BUSY:
            return _parse(where, response)
        pause = _pause(response, attempt)
        if pause > MAX_PAUSE_SECONDS:
            raise QuantkitError(
                f"{where}: busy (status {response.status_code}), wants a pause of {pause:.0f} s",
                remedy=f"more than {MAX_PAUSE_SECONDS:.0f} s are not waited; try again later",
            )
        if attempt + 1 < ATTEMPTS:
            await asyncio.sleep(pause)
    raise QuantkitError(
        f"{where}: still busy (status {response.status_code}) after {ATTEMPTS} tries",
        remedy="lower --concurrency, or try again later",
    )


def _parse(where: str, response: httpx.Response) -> Json:
    if response.status_code != 200:
        remedy = "see the server's log"
        if response.status_code in (401, 403):
            remedy = "give its key with --endpoint-key-file"
        raise QuantkitError(
            f"{where}: status {response.status_code}: {_message(response)}", remedy=remedy
        )
    try:
        answer = response.json()
    except (ValueError, RecursionError) as e:
        raise QuantkitError(f"{where}: {_short(response.text)} is not JSON ({e})") from e
    if not isinstance(answer, dict):
        raise QuantkitError(f"{where}: {_short(answer)} is not a JSON object")
    return answer


def _message(response: httpx.Response) -> str:
    """What an error's body says, in the shapes that servers use."""
    try:
        body = response.json()
        error = body.get("error", body)
        return _short(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError, RecursionError):
        return _short(response.text)


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def _pause(response: httpx.Response, attempt: int) -> float:
    """Seconds to wait: what the server asks for, else 0.5, 1, 2, …"""
    asked = response.headers.get("retry-after", "").strip()
    if asked.isascii() and asked.isdigit():  # "²" is a digit, too
        return float(asked)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    except (ValueError, OverflowError):
        return min(0.5 * 2**attempt, MAX_PAUSE_SECONDS)
