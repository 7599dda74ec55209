"""``POST /v1/responses``: text in, text out, as one document or as typed events.

Nothing is stored: ``previous_response_id`` and ``background`` are refused, and the answer says
``"store": false``.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from quantkit.serve.api.errors import failed_body
from quantkit.serve.api.generation import (
    CLIENT_CLOSED_REQUEST,
    Choice,
    Json,
    Service,
    chain,
    collect,
    first_event,
    head,
)
from quantkit.serve.api.schemas import Message, ResponsesRequest
from quantkit.serve.api.sse import ClientGone, EventStreamResponse, until_disconnect
from quantkit.serve.events import Event, Failed, Finished, TokenEvent
from quantkit.serve.request import Request


async def create(service: Service, body: ResponsesRequest, http: HttpRequest) -> Response:
    """Answer one request."""
    service.check_model(body.model)
    service.knock(http)
    conversation = messages(body)
    prompt_ids = await service.encoder.chat(conversation)
    fields = head(service, "resp")
    left = max(1, service.engine.capacity.max_context - len(prompt_ids))
    sampling = body.sampling(max_tokens=body.max_output_tokens or left, logprobs=None)
    request = Request(id=fields["id"], prompt_ids=prompt_ids, sampling=sampling)
    writer = Writer(body, fields)
    said = [{"role": message.role, "content": message.text} for message in conversation]
    stream = await service.open(http, [request], [{"messages": said}])
    try:
        if not body.stream:
            [choice] = await until_disconnect(http.receive, collect(stream, 1))
            stream.close()
            return JSONResponse(writer.finished(choice))
        events = aiter(stream)
        first = await until_disconnect(http.receive, first_event(events))
    except ClientGone:
        stream.close()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except BaseException:
        stream.close()
        raise
    return EventStreamResponse(writer.stream(chain(first, events)), stream.close)


def messages(body: ResponsesRequest) -> list[Message]:
    """``instructions`` and ``input`` as chat messages."""
    given = (
        [Message(role="user", content=body.input)]
        if isinstance(body.input, str)
        else [Message(role=item.role, content=item.text) for item in body.input]
    )
    if body.instructions:
        given.insert(0, Message(role="system", content=body.instructions))
    return given


@dataclass
class Writer:
    """Writes one response. Events are numbered as they go out."""

    body: ResponsesRequest
    head: Json
    item_id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")
    _number: int = 0

    def finished(self, choice: Choice) -> Json:
        """The whole document."""
        status = "incomplete" if choice.finish_reason == "length" else "completed"
        document = self._document(status, [self._item(choice.text, status)])
        if status == "incomplete":
            document["incomplete_details"] = {"reason": "max_output_tokens"}
        document["usage"] = {
            "input_tokens": choice.prompt_tokens,
            "input_tokens_details": {"cached_tokens": choice.cached_tokens},
            "output_tokens": choice.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": choice.prompt_tokens + choice.completion_tokens,
        }
        return document

    async def stream(self, events: AsyncIterator[tuple[int, Event]]) -> AsyncIterator[bytes]:
        """The same as typed events: the document grows item by item and part by part."""
        place: Json = {"item_id": self.item_id, "output_index": 0}
        part = place | {"content_index": 0}
        yield self._event("response.created", response=self._document("in_progress", []))
        yield self._event("response.in_progress", response=self._document("in_progress", []))
        yield self._event(
            "response.output_item.added", output_index=0, item=self._item(None, "in_progress")
        )
        yield self._event("response.content_part.added", **part, part=_part(""))
        choice = Choice()
        async for _, event in events:
            if isinstance(event, Failed):
                error = failed_body(event)["error"]
                failed = self._document("failed", [])
                failed["error"] = {"code": "server_error", "message": error["message"]}
                yield self._event("response.failed", response=failed)
                return
            choice.add(event)
            if isinstance(event, TokenEvent | Finished) and event.text:
                yield self._event(
                    "response.output_text.delta", **part, delta=event.text, logprobs=[]
                )
        yield self._event("response.output_text.done", **part, text=choice.text, logprobs=[])
        yield self._event("response.content_part.done", **part, part=_part(choice.text))
        document = self.finished(choice)
        [item] = document["output"]
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{document['status']}", response=document)

    def _format(self) -> Json:
        asked = self.body.text and self.body.text.format
        if not asked:
            return {"type": "text"}
        return asked.model_dump(by_alias=True, exclude_none=True)

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = {"type": kind, "sequence_number": self._number} | fields
        self._number += 1
        text = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        return b"event: " + kind.encode() + b"\ndata: " + text + b"\n\n"

    def _item(self, text: str | None, status: str) -> Json:
        content = [] if text is None else [_part(text)]
        return {
            "type": "message",
            "id": self.item_id,
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _document(self, status: str, output: list[Json]) -> Json:
        body = self.body
        return {
            "id": self.head["id"],
            "object": "response",
            "created_at": self.head["created"],
            "status": status,
            "model": self.head["model"],
            "output": output,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": self._format()},
            "tool_choice": "none",
            "tools": [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
        }


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
