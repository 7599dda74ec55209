"""``POST /v1/responses``: items in, items out, as one document or as typed events.

Nothing is stored: ``previous_response_id`` and ``background`` are refused, and the answer says
``"store": false``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from dataclasses import dataclass, field

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from quantkit.serve.api.conversation import Conversation, begin
from quantkit.serve.api.errors import GenerationError, failed_body
from quantkit.serve.api.generation import (
    CLIENT_CLOSED_REQUEST,
    UNTIL_THE_END,
    Json,
    Service,
    begun,
    chain,
    head,
)
from quantkit.serve.api.items import Items, NamedEvent
from quantkit.serve.api.messages import CalledFunction, Message, ToolCall, check_results
from quantkit.serve.api.response_schemas import (
    InputCall,
    InputMessage,
    InputReasoning,
    ResponsesRequest,
    joined,
)
from quantkit.serve.api.sse import ClientGone, EventStreamResponse, encode, until_disconnect
from quantkit.serve.api.tools import FlatFunctionChoice
from quantkit.serve.events import Event, Failed, Finished, TokenEvent
from quantkit.serve.request import Request, RequestError


async def create(service: Service, body: ResponsesRequest, http: HttpRequest) -> Response:
    """Answer one request."""
    service.check_model(body.model)
    service.knock(http)
    conversation = await begin(service, messages(body), body.offered(), body.structured())
    prompt_ids = conversation.prompt_ids
    fields = head(service, "resp")
    left = max(1, service.engine.capacity.max_context - len(prompt_ids))
    asked = body.sampling(max_tokens=body.max_output_tokens or left, logprobs=None)
    request = Request(fields["id"], prompt_ids, conversation.sampling(asked))
    writer = Writer(body, fields, conversation)
    stream = await service.open(http, [request], [conversation.said])
    try:
        if not body.stream:
            document = await until_disconnect(
                http.receive, writer.whole(stream.every(UNTIL_THE_END))
            )
            stream.close()
            return JSONResponse(document)
        first = await until_disconnect(http.receive, begun(stream))
    except ClientGone:
        stream.close()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except BaseException:
        stream.close()
        raise
    rest = stream.every(service.stream_interval)
    return EventStreamResponse(writer.stream(chain(first, rest)), stream.close)


def messages(body: ResponsesRequest) -> list[Message]:
    """``instructions`` and ``input`` as chat messages: what an assistant thought, said and called
    one after the other is one of them.

    Raises:
        RequestError: a result stands in front of its call, or without one.
    """
    given: list[Message] = []
    if body.instructions:
        given.append(Message(role="system", content=body.instructions))
    if isinstance(body.input, str):
        return [*given, Message(role="user", content=body.input)]
    for item in body.input:
        if isinstance(item, InputReasoning):
            if thought := joined(item.content):  # others hold a summary, or what only OpenAI reads
                given.append(Message(role="assistant", reasoning_content=thought))
        elif isinstance(item, InputCall):
            function = CalledFunction(name=item.name, arguments=item.arguments)
            call = ToolCall(id=item.call_id, type="function", function=function)
            turn = _assistants_turn(given)
            turn.tool_calls = [*(turn.tool_calls or ()), call]
        elif isinstance(item, InputMessage) and item.role == "assistant":
            if not _only_thought(given):
                given.append(Message(role="assistant"))
            given[-1].content = joined(item.content)
        elif isinstance(item, InputMessage):
            given.append(Message(role=item.role, content=joined(item.content)))
        else:
            result = joined(item.output)
            given.append(Message(role="tool", tool_call_id=item.call_id, content=result))
    try:
        check_results(given)
    except ValueError as error:
        raise RequestError(f"input: {error}", param="input") from error
    return given


def _assistants_turn(given: list[Message]) -> Message:
    """The last message if it is the assistant's, or a new one of its."""
    if not given or given[-1].role != "assistant":
        given.append(Message(role="assistant"))
    return given[-1]


def _only_thought(given: list[Message]) -> bool:
    last = given[-1] if given else None
    return last is not None and last.reasoning_content is not None and last.content is None


@dataclass
class Writer:
    """Writes one response. Events are numbered as they go out."""

    body: ResponsesRequest
    head: Json
    conversation: Conversation
    items: Items = field(default_factory=Items)
    _number: int = 0

    async def whole(self, events: AsyncIterable[tuple[int, Event]]) -> Json:
        """The document at the end.

        Raises:
            GenerationError: the engine failed the request.
        """
        document: Json = {}
        async for _, fields in self.events(events):
            document = fields.get("response", document)
        return document

    async def stream(self, events: AsyncIterable[tuple[int, Event]]) -> AsyncGenerator[bytes, None]:
        """Typed events as bytes."""
        try:
            async for kind, fields in self.events(events):
                yield self._encode(kind, fields)
        except GenerationError as error:
            failed = self._document("failed")
            message = failed_body(error.event)["error"]["message"]
            failed["error"] = {"code": "server_error", "message": message}
            yield self._encode("response.failed", {"response": failed})

    async def events(self, events: AsyncIterable[tuple[int, Event]]) -> AsyncIterator[NamedEvent]:
        """The response grows item by item and part by part; the last event holds all of it.

        Raises:
            GenerationError: the engine failed the request.
        """
        parser, thought = self.conversation.parser(), 0
        yield "response.created", {"response": self._document("in_progress")}
        yield "response.in_progress", {"response": self._document("in_progress")}
        async for _, event in events:
            if isinstance(event, Failed):
                raise GenerationError(event)
            parts = parser.push(event.text) if isinstance(event, TokenEvent | Finished) else []
            thought += isinstance(event, TokenEvent) and parser.reasoning
            if isinstance(event, Finished):
                parts += parser.finish(event.reason)
            for part in parts:
                for item in self.items.push(part):
                    yield item
            if isinstance(event, Finished):
                status = "incomplete" if event.reason == "length" else "completed"
                for item in self.items.finish(status):
                    yield item
                yield f"response.{status}", {"response": self._finished(status, event, thought)}

    def _finished(self, status: str, event: Finished, thought: int) -> Json:
        document = self._document(status)
        if status == "incomplete":
            document["incomplete_details"] = {"reason": "max_output_tokens"}
        document["usage"] = {
            "input_tokens": event.prompt_tokens,
            "input_tokens_details": {"cached_tokens": event.cached_tokens},
            "output_tokens": event.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": event.prompt_tokens + event.completion_tokens,
        }
        return document

    def _encode(self, kind: str, fields: Json) -> bytes:
        body = {"type": kind, "sequence_number": self._number} | fields
        self._number += 1
        return b"event: " + kind.encode() + b"\n" + encode(body)

    def _format(self) -> Json:
        asked = self.body.text and self.body.text.format
        if not asked:
            return {"type": "text"}
        return asked.model_dump(by_alias=True, exclude_none=True)

    def _choice(self) -> str | Json:
        chosen = self.body.tool_choice
        if isinstance(chosen, FlatFunctionChoice):
            return chosen.model_dump()
        return chosen or ("auto" if self.body.tools else "none")

    def _document(self, status: str) -> Json:
        body, tools = self.body, self.conversation.tools
        return {
            "id": self.head["id"],
            "object": "response",
            "created_at": self.head["created"],
            "status": status,
            "model": self.head["model"],
            "output": list(self.items.done),
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": tools is not None and tools.parallel,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": self._format()},
            "tool_choice": self._choice(),
            "tools": [
                tool.model_dump() | {"strict": bool(tool.strict)} for tool in body.tools or ()
            ],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
        }
