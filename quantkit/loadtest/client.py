"""One streamed completion over HTTP, timed and counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import httpx
import orjson

from quantkit.errors import QuantkitError
from quantkit.loadtest.answer import Answer, Fate
from quantkit.loadtest.ask import Ask
from quantkit.loadtest.plain_http import PIECES, PlainTransport

#: Statuses of a server that refuses because of load.
SHED = (429, 503)

#: Servers close connections that were idle for seconds, or that carried some number of requests.
#: One that is used at that moment breaks, which would count as a failure of the server's. So plain
#: connections are new for each request; encrypted ones, whose start costs a round trip more and a
#: handshake, are kept while they are in use.
KEEP_ALIVE_SECONDS = 2.0

#: Lines of an answer that are looked at in a row: about a millisecond, in which pieces of others
#: are not noted.
LINES_TOGETHER = 256

#: Of what a refusal says, so much is kept.
SHOWN_CHARACTERS = 200


#: An ask and the model's name → what is sent.
Body = Callable[[Ask, str], dict[str, Any]]


class CountError(QuantkitError):
    """A server read or wrote another number of tokens than it was asked for."""


class Client:
    """Sends asks to ``/v1/completions``. Use it as an async context.

    Args:
        base: address without ``/v1``.
        model: name of the model there.
        keys: tier → bearer token; a tier without one sends none.
        timeout: seconds that one answer may take, from its due time on.
        body: what is sent, for a server that refuses `token_body`.
    """

    def __init__(
        self,
        base: str,
        model: str,
        keys: Mapping[str, str] | None = None,
        timeout: float = 300.0,
        body: Body | None = None,
    ) -> None:
        self.model = model
        self.timeout = timeout
        self._body = body or token_body
        self._headers = {t: {"Authorization": f"Bearer {key}"} for t, key in (keys or {}).items()}
        self._http = httpx.AsyncClient(
            base_url=base,
            headers={"Accept-Encoding": "identity"},  # pieces are read as they come
            transport=None if base.startswith("https:") else PlainTransport(),
            timeout=timeout,
            # How many are under way is the test's business; a pool would queue them unseen.
            limits=httpx.Limits(
                max_connections=None,
                max_keepalive_connections=None,
                keepalive_expiry=KEEP_ALIVE_SECONDS,
            ),
            trust_env=False,
            follow_redirects=False,
        )
        self._start = time.perf_counter()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    def restart(self) -> None:
        """Set the clock to 0."""
        self._start = time.perf_counter()

    @property
    def now(self) -> float:
        """Seconds since the clock was 0."""
        return time.perf_counter() - self._start

    async def send(self, ask: Ask, due: float) -> Answer:
        """Send an ask and read its answer to the end.

        Args:
            ask: what to send, now.
            due: when it should have been sent.

        Raises:
            CountError: the answer is done, and not of the asked length or prompt.
            QuantkitError: a status that says the ask itself is wrong.
        """
        answer = Answer(ask, due, self.now)
        body = self._body(ask, self.model)
        headers = self._headers.get(ask.tier)
        try:
            async with (
                asyncio.timeout(max(0.0, due + self.timeout - answer.sent)),
                self._http.stream(
                    "POST", "/v1/completions", json=body, headers=headers
                ) as response,
            ):
                if response.status_code == 200:
                    await self._read(response, answer)
                else:
                    text = (await response.aread()).decode("utf-8", "replace")
                    _refused(answer, response.status_code, text)
        except TimeoutError:
            _end(answer, "failed", f"no end after {self.timeout:g} s")
        except httpx.HTTPError as error:
            _end(answer, "failed", f"{type(error).__name__}: {error}")
        answer.over = self.now
        return answer

    async def _read(self, response: httpx.Response, answer: Answer) -> None:
        """Read an answer to its end, and look at it then: the server needs the cores until then."""
        usage: dict[str, Any] | None = None
        finished = named = False
        for i, (when, line) in enumerate(_lines(await _pieces(response)), 1):
            if i % LINES_TOGETHER == 0:
                await asyncio.sleep(0)
            if not line.startswith(b"data:"):
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                continue
            doc = _parse(data)
            if doc.get("error"):
                _end(answer, "failed", _short(str(doc["error"])))
                return
            for choice in _choices(doc):
                # Where tokens are named, text without one is what an earlier one held back.
                named = named or "token_ids" in choice
                if choice.get("token_ids") if named else choice.get("text"):
                    answer.chunks.append(when - self._start)
                finished = finished or choice.get("finish_reason") is not None
            usage = _usage(doc) or usage
        if not finished or not answer.chunks:
            _end(answer, "failed", "the stream ended before the answer did")
            return
        _check_counts(answer.ask, usage)


def token_body(ask: Ask, model: str) -> dict[str, Any]:
    """A prompt of token ids, and an answer of exactly the asked length."""
    return {
        "model": model,
        "prompt": list(ask.prompt_ids),
        "max_tokens": ask.output_tokens,
        # Of these two a server knows at least one; an answer is as long as asked, or refused.
        "min_tokens": ask.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        # Names each token, and so tells of those whose text is not complete yet.
        "return_token_ids": True,
    }


async def _pieces(response: httpx.Response) -> list[tuple[float, bytes]]:
    """All of the body, with the times (``time.perf_counter``) when it came."""
    if (noted := response.extensions.get(PIECES)) is None:
        return [(time.perf_counter(), piece) async for piece in response.aiter_bytes()]
    await response.aread()
    return list(noted)


def _lines(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Each line of a body and when its end came; the last may lack its end."""
    rest, when = b"", 0.0
    for when, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield when, line
    yield when, rest


def _parse(data: bytes) -> dict[str, Any]:
    try:
        doc = orjson.loads(data)
    except ValueError as error:
        raise QuantkitError(f"the server sent {_said(data)!r}, which is not JSON") from error
    if not isinstance(doc, dict):
        raise QuantkitError(f"the server sent {_said(data)!r}, which is not a JSON object")
    return doc


def _said(data: bytes) -> str:
    return _short(data.decode("utf-8", "replace"))


def _choices(doc: dict[str, Any]) -> list[dict[str, Any]]:
    choices = doc.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise QuantkitError(
            f"the server sent choices {_short(str(choices))}, which is not a list of objects"
        )
    return choices


def _usage(doc: dict[str, Any]) -> dict[str, Any] | None:
    usage = doc.get("usage")
    if not isinstance(usage, dict | None):
        raise QuantkitError(f"the server sent usage {_short(str(usage))}, which is not an object")
    return usage


def _refused(answer: Answer, status: int, text: str) -> None:
    reason = f"status {status}: {_short(text)}"
    if status in SHED:
        _end(answer, "shed", reason)
    elif status >= 500:
        _end(answer, "failed", reason)
    else:
        raise QuantkitError(
            f"the server refuses a request as such: {reason}",
            remedy="lengths must fit its context, token ids its vocabulary, keys its tenants",
        )


def _end(answer: Answer, fate: Fate, reason: str) -> None:
    answer.fate, answer.reason = fate, reason


def _check_counts(ask: Ask, usage: dict[str, Any] | None) -> None:
    if usage is None:
        raise CountError(
            "the server told no token counts, so that nobody knows what was measured",
            remedy="it must understand stream_options.include_usage",
        )
    told = usage.get("prompt_tokens"), usage.get("completion_tokens")
    asked = len(ask.prompt_ids), ask.output_tokens
    if told != asked:
        raise CountError(
            f"the server read {told[0]} and wrote {told[1]} tokens where {asked[0]} and {asked[1]} "
            "were asked",
            remedy="it must take prompts of token ids, and ignore_eos or min_tokens",
        )


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
