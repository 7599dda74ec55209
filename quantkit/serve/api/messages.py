"""Messages of a conversation as requests bring them, calls of tools and their results included."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from quantkit.serve.api.tools import MAX_CALLS, CallId, FunctionName
from quantkit.serve.request import MAX_SCHEMA_DEPTH, is_deeper

MAX_MESSAGES = 2048
Text = Annotated[str, Field(max_length=4 * 1024 * 1024)]


class ContentPart(BaseModel):
    """A piece of a message. Text only: nothing is ever fetched from an address."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: Text


class CalledFunction(BaseModel):
    """What was called; ``arguments`` is the JSON text of an object, which templates take apart."""

    model_config = ConfigDict(strict=True)

    name: FunctionName
    arguments: Text

    @field_validator("arguments")
    @classmethod
    def _an_object(cls, text: str) -> str:
        try:
            value = json.loads(text)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if not isinstance(value, dict) or is_deeper(value, MAX_SCHEMA_DEPTH):
            raise ValueError(f"not a JSON object, or nested deeper than {MAX_SCHEMA_DEPTH}")
        return text


class ToolCall(BaseModel):
    """A call that the assistant made."""

    model_config = ConfigDict(strict=True)

    id: CallId
    type: Literal["function"]
    function: CalledFunction


class Message(BaseModel):
    """One message. Roles are a closed set because templates write them between control tokens."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[ContentPart], Field(max_length=MAX_MESSAGES)] | None = None
    reasoning_content: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS)] | None = None
    tool_call_id: CallId | None = None

    @model_validator(mode="after")
    def _fields_of_its_role(self) -> Message:
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("'tool_call_id' and the role 'tool' go together")
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content):
            raise ValueError("only an assistant has 'tool_calls' and 'reasoning_content'")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it: arguments are objects there."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": json.loads(call.function.arguments),
                    },
                }
                for call in self.tool_calls
            ]
        return message


def check_results(messages: Iterable[Message]) -> None:
    """Raise ValueError if a result stands in front of its call, or without one."""
    called: set[str] = set()
    for message in messages:
        called |= {call.id for call in message.tool_calls or ()}
        if message.tool_call_id is not None and message.tool_call_id not in called:
            raise ValueError(
                f"no call before it has the tool_call_id {message.tool_call_id[:64]!r}"
            )


def hold_calls(messages: Iterable[Message]) -> bool:
    """There are calls or results among them."""
    return any(message.tool_calls or message.role == "tool" for message in messages)


def hold_more_than_text(messages: Sequence[Message]) -> bool:
    """Roles and contents alone would not tell what was said: there are calls, or reasoning."""
    return hold_calls(messages) or any(message.reasoning_content for message in messages)
