"""What completions and chat share: from engine events to an HTTP answer, streamed or whole."""

from __future__ import annotations

import time
import uuid
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Sequence,
)
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from quantkit.serve.api.chat_format import ChatFormat
from quantkit.serve.api.errors import GenerationError, ModelNotFoundError, failed_body
from quantkit.serve.api.prompts import PromptEncoder
from quantkit.serve.api.sse import (
    DONE,
    ClientGone,
    Encoder,
    EventStreamResponse,
    encode,
    until_disconnect,
)
from quantkit.serve.capture import Capture
from quantkit.serve.chat_formats import AUTO
from quantkit.serve.config import ServeConfig
from quantkit.serve.door import Door
from quantkit.serve.engine import Engine
from quantkit.serve.events import (
    Event,
    Failed,
    Finished,
    FinishReason,
    PromptScored,
    TokenEvent,
    TokenLogprob,
)
from quantkit.serve.request import Request
from quantkit.serve.stream import EventStream
from quantkit.serve.tracing import Tracing

Json = dict[str, Any]
#: Nobody reads it: the status that access logs show for a client that left.
CLIENT_CLOSED_REQUEST = 499
#: More tokens than an answer has: who waits for so many is woken by its end.
UNTIL_THE_END = 1 << 40


class Service:
    """The served model: its engine, the door to it, its encoder, the style of its answers, the
    tokens of an answer that are written together, and the names that clients may call it by."""

    def __init__(
        self,
        engine: Engine,
        config: ServeConfig,
        capture: Capture | None = None,
        tracing: Tracing | None = None,
        *,
        tool_parser: str = AUTO,
        reasoning_parser: str = AUTO,
        stream_interval: int = 1,
    ) -> None:
        self.engine = engine
        self.stream_interval = stream_interval
        self.tracing = tracing
        self.door = Door(engine, config, capture)
        self.encoder = PromptEncoder(engine.runtime.tokenizer)
        self.style = ChatFormat(engine.runtime.tokenizer, tool_parser, reasoning_parser)
        # A folder is served under its own name; its full path is understood as well.
        self.model = Path(engine.runtime.name).name if _is_path(engine) else engine.runtime.name
        self.names = {self.model, engine.runtime.name}
        self.created = int(time.time())

    def knock(self, http: HttpRequest, *, charge: bool = False) -> None:
        """Before a prompt is tokenized: as `door.Door.knock` does for the request's tenant."""
        self.door.knock(http.state.tenant, charge=charge)

    async def open(
        self,
        http: HttpRequest,
        requests: Sequence[Request],
        prompts: Sequence[Json | None],
    ) -> EventStream:
        """Let the requests of an HTTP request in, as `door.Door.open` does for its tenant."""
        trace = self.tracing.begin(http.url.path, http.headers) if self.tracing else None
        # Waiting to be tokenized is waiting, too.
        arrived = [replace(request, arrival=http.state.arrival) for request in requests]
        return await self.door.open(http.state.tenant, arrived, prompts, trace)

    def check_model(self, name: str | None) -> None:
        """Raise `ModelNotFoundError` unless ``name`` is served here; no name means the one."""
        if name is not None and name not in self.names:
            raise ModelNotFoundError(
                f"the model {name!r} does not exist; this server has {self.model!r}"
            )


def _is_path(engine: Engine) -> bool:
    return Path(engine.runtime.name).exists()


@dataclass
class Choice:
    """One answer as it accumulates."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, event: Event) -> None:
        if isinstance(event, PromptScored):
            self.logprobs += event.logprobs
        elif isinstance(event, TokenEvent):
            self.text += event.text
            self.token_ids.append(event.token_id)
            if event.logprob is not None:
                self.logprobs.append(event.logprob)
        elif isinstance(event, Finished):
            self.text += event.text
            self.finish_reason = event.reason
            self.prompt_tokens = event.prompt_tokens
            self.cached_tokens = event.cached_tokens
            self.completion_tokens = event.completion_tokens
        else:
            raise GenerationError(event)


@dataclass(frozen=True)
class Generation:
    """One HTTP request's share of the engine.

    Attributes:
        http: the client's request, watched for its disconnect.
        service: the served model.
        requests: what to run; several prompts or ``n`` answers make several requests.
        prompts: for each, its prompt as `door.Door.open` captures it.
        prompt_tokens: for ``usage``; a prompt with several answers counts once.
        head: the fields that every body of this answer begins with.
    """

    http: HttpRequest
    service: Service
    requests: Sequence[Request]
    prompts: Sequence[Json | None]
    prompt_tokens: int
    head: Json

    async def whole(
        self, render: Callable[[int, Choice], Awaitable[Json]], object_name: str
    ) -> Response:
        """Wait for every answer, then send one JSON document."""
        stream = await self.service.open(self.http, self.requests, self.prompts)
        try:
            choices = await until_disconnect(self.http.receive, collect(stream, len(self.requests)))
        except ClientGone:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        finally:
            stream.close()
        rendered = [await render(index, choice) for index, choice in enumerate(choices)]
        completion_tokens = sum(choice.completion_tokens for choice in choices)
        cached_tokens = max(choice.cached_tokens for choice in choices)
        return JSONResponse(
            self.head
            | {
                "object": object_name,
                "choices": rendered,
                "usage": usage(self.prompt_tokens, completion_tokens, cached_tokens),
            }
        )

    async def streamed(
        self,
        render: Callable[[int, Event], Awaitable[Sequence[Json]]],
        object_name: str,
        *,
        include_usage: bool,
    ) -> Response:
        """Send what ``render`` makes of each event, those together that came together.

        The status line waits for the first event, so that a request which fails at once gets an
        honest 500 and not a 200 with an error inside.
        """
        stream = await self.service.open(self.http, self.requests, self.prompts)
        try:
            first = await until_disconnect(self.http.receive, begun(stream))
        except ClientGone:
            stream.close()
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except BaseException:
            stream.close()
            raise

        async def chunks() -> AsyncGenerator[bytes, None]:
            head = self.head | {"object": object_name}
            write = Encoder(head, {"usage": None} if include_usage else {})
            completion_tokens = cached_tokens = 0
            batch = first
            while batch:
                written: list[bytes] = []
                for index, event in batch:
                    if isinstance(event, Failed):
                        yield b"".join([*written, encode(failed_body(event)), DONE])
                        return
                    if isinstance(event, Finished):
                        completion_tokens += event.completion_tokens
                        cached_tokens = max(cached_tokens, event.cached_tokens)
                    for choice in await render(index, event):
                        written.append(write(choice | {"index": index}))
                if written:
                    yield b"".join(written)
                batch = await stream.batch(self.service.stream_interval)
            if include_usage:
                total = usage(self.prompt_tokens, completion_tokens, cached_tokens)
                yield encode(head | {"choices": [], "usage": total})
            yield DONE

        return EventStreamResponse(chunks(), stream.close)


def head(service: Service, prefix: str) -> Json:
    """``id``, ``created`` and ``model`` of a new answer."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": service.model,
    }


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Json:
    """What an answer cost; ``cached_tokens`` of the answer that found most in the prefix cache."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


async def collect(stream: EventStream, count: int) -> list[Choice]:
    """Every answer, when all are there."""
    choices = [Choice() for _ in range(count)]
    async for index, event in stream.every(UNTIL_THE_END):
        choices[index].add(event)
    return choices


async def begun(stream: EventStream) -> list[tuple[int, Event]]:
    """The first events, unless the very first is a failure: that gets a status of its own."""
    batch = await stream.batch()
    if isinstance(event := batch[0][1], Failed):
        raise GenerationError(event)
    return batch


async def chain(
    first: Sequence[tuple[int, Event]], rest: AsyncIterable[tuple[int, Event]]
) -> AsyncIterator[tuple[int, Event]]:
    for item in first:
        yield item
    async for item in rest:
        yield item
