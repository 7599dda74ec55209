"""The output items of the Responses API as they grow, and the events that say so."""

from __future__ import annotations

import uuid
from typing import Any

from quantkit.serve.api.message_parser import Call, Part, Text

Json = dict[str, Any]
NamedEvent = tuple[str, Json]


class Items:
    """Items of one answer. Every method returns the events of what it changed.

    Attributes:
        done: items that are complete, in order.
    """

    def __init__(self) -> None:
        self.done: list[Json] = []
        self._kind: str | None = None
        self._id = self._text = ""

    def push(self, part: Part) -> list[NamedEvent]:
        """The answer goes on with this."""
        if isinstance(part, Call):
            return [*self.close(), *self._call(part)]
        events = []
        if part.kind != self._kind:
            events = [*self.close(), *self._open(part)]
        self._text += part.text
        delta: Json = {"delta": part.text}
        if part.kind == "content":
            delta["logprobs"] = []
        return [*events, (f"response.{_name(part.kind)}.delta", self._part_place() | delta)]

    def close(self, status: str = "completed") -> list[NamedEvent]:
        """End the item that is open, if one is."""
        if self._kind is None:
            return []
        kind, text, place = self._kind, self._text, self._part_place()
        item = self._item(status, [_piece(kind, text)])
        logprobs: Json = {"logprobs": []} if kind == "content" else {}
        events = [
            (f"response.{_name(kind)}.done", place | {"text": text} | logprobs),
            ("response.content_part.done", place | {"part": _piece(kind, text)}),
            self._event("output_item.done", item=item),
        ]
        self.done.append(item)
        self._kind, self._text = None, ""
        return events

    def finish(self, status: str) -> list[NamedEvent]:
        """No more will come; an answer without a word is an empty message."""
        if self.done or self._kind is not None:
            return self.close(status)
        return [*self._open(Text("content", "")), *self.close(status)]

    def _open(self, part: Text) -> list[NamedEvent]:
        self._kind = part.kind
        self._id = f"{'msg' if part.kind == 'content' else 'rs'}_{uuid.uuid4().hex}"
        piece = {"part": _piece(part.kind, "")}
        return [
            self._event("output_item.added", item=self._item("in_progress", [])),
            ("response.content_part.added", self._part_place() | piece),
        ]

    def _call(self, call: Call) -> list[NamedEvent]:
        item: Json = {
            "type": "function_call",
            "id": f"fc_{uuid.uuid4().hex}",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
            "status": "completed",
        }
        place = {"item_id": item["id"], "output_index": len(self.done)}
        said = {"arguments": call.arguments, "name": call.name}
        begun = item | {"arguments": "", "status": "in_progress"}
        events = [
            self._event("output_item.added", item=begun),
            ("response.function_call_arguments.delta", place | {"delta": call.arguments}),
            ("response.function_call_arguments.done", place | said),
            self._event("output_item.done", item=item),
        ]
        self.done.append(item)
        return events

    def _event(self, name: str, **fields: Any) -> NamedEvent:
        return f"response.{name}", {"output_index": len(self.done)} | fields

    def _part_place(self) -> Json:
        return {"item_id": self._id, "output_index": len(self.done), "content_index": 0}

    def _item(self, status: str, content: list[Json]) -> Json:
        if self._kind == "content":
            fields: Json = {"type": "message", "role": "assistant"}
        else:
            fields = {"type": "reasoning", "summary": []}
        return fields | {"id": self._id, "status": status, "content": content}


def _name(kind: str) -> str:
    return "output_text" if kind == "content" else "reasoning_text"


def _piece(kind: str, text: str) -> Json:
    piece: Json = {"type": _name(kind), "text": text}
    return piece | {"annotations": [], "logprobs": []} if kind == "content" else piece
