"""One row of a data file → one `Document`: the shapes that are understood, and nothing else.

Shapes, in the order they are tried on a JSON object:

====================================  ===========================================================
keys                                  becomes
====================================  ===========================================================
``field:`` named by the source        that key: a string is text, a list is chat
``messages``                          chat: OpenAI ``role``/``content``/``tool_calls``, ``tools``
``conversations``                     chat: ShareGPT ``from``/``value``, ``system``, ``tools``
``prompt`` + ``completion``           text: the two joined as they stand; chat when they are lists
``instruction`` [``input``] ``output``  chat: one user turn, one assistant turn
``text``                              text
====================================  ===========================================================

``prompt``/``completion`` strings are what a completions endpoint logs: the prompt was sent as it
stands, so a chat template must not be wrapped around it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.errors import UsageError

Message = dict[str, Any]

SHAPES = (
    "`messages`, `conversations`, `prompt` with `completion`, "
    "`instruction` with `output`, or `text`"
)

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}


@dataclass(frozen=True, slots=True)
class Document:
    """One text, or one conversation.

    Exactly one of `text` and `messages` is set. In a message ``content`` is always a string and
    the arguments of a tool call are an object, because that is what chat templates expect.

    Attributes:
        where: ``file:line`` of the row, for error messages.
        text: raw text, character for character.
        messages: chat turns.
        tools: function schemas that the conversation could call, or None.
        answer: character of `text` that a completion begins at; None where text is no answer.
    """

    where: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    answer: int | None = None

    def plain(self) -> str:
        """The words of the document without any template: one line a turn for a chat."""
        if self.messages is None:
            return self.text or ""
        return "\n".join(message_text(message) for message in self.messages)


def message_text(message: Message) -> str:
    """Content of one turn; its tool calls follow as one JSON object a line."""
    calls = [
        json.dumps(call.get("function", call), ensure_ascii=False, default=str)
        for call in message.get("tool_calls") or ()
    ]
    return "\n".join([message["content"], *calls] if message["content"] else calls)


def to_document(row: object, where: str, *, field: str | None = None) -> Document | None:
    """Recognise the shape of one row.

    Args:
        row: a parsed JSON value.
        where: ``file:line``, the start of every error message.
        field: the key to read, instead of detecting one.

    Returns:
        The document, or None when the row is well formed but holds no words.

    Raises:
        UsageError: the row is not an object, fits no shape, or a part of it has a wrong type.
    """
    if not isinstance(row, Mapping):
        raise UsageError(
            f"{where} a row must be an object, not {_kind(row)}", remedy=f"give it {SHAPES}"
        )
    if field is not None:
        if field not in row:
            raise UsageError(
                f"{where} has no field '{field}'; keys seen: {_keys(row)}",
                remedy="correct `field` of this source, or leave it out",
            )
        return _from_value(row[field], row, f"{where} {field}").at(where)
    return _detect(row, where).at(where)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A document before it is known whether it holds any words."""

    text: str = ""
    messages: tuple[Message, ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    answer: int | None = None

    def at(self, where: str) -> Document | None:
        if self.messages is None:
            if not self.text.strip():
                return None
            return Document(where, text=self.text, answer=self.answer)
        if not any(message_text(message).strip() for message in self.messages):
            return None
        return Document(where, messages=self.messages, tools=self.tools)


def _detect(row: Mapping[str, Any], where: str) -> _Draft:
    # A dataset with several shapes in one table fills the missing ones with null, so a null
    # decides for a shape only when nothing else does.
    present = {key for key, value in row.items() if value is not None}
    for keys in (present, set(row)):
        if "messages" in keys:
            return _from_value(row["messages"], row, f"{where} messages")
        if "conversations" in keys:
            return _from_value(row["conversations"], row, f"{where} conversations")
        if {"prompt", "completion"} <= keys:
            return _prompt_completion(row, where)
        if {"instruction", "output"} <= keys:
            return _instruction(row, where)
        if "text" in keys:
            return _from_value(row["text"], row, f"{where} text")
    raise UsageError(
        f"{where} fits no known shape; keys seen: {_keys(row)}",
        remedy=f"give {SHAPES}, or name the key that holds the text with `field`",
    )


def _from_value(value: object, row: Mapping[str, Any], where: str) -> _Draft:
    if value is None:
        return _Draft()
    if isinstance(value, str):
        return _Draft(text=value)
    if isinstance(value, Sequence):
        return _chat(value, row, where)
    raise UsageError(
        f"{where} must be a string or a list of messages, not {_kind(value)}",
        remedy="correct the row, or name another key with `field`",
    )


def _prompt_completion(row: Mapping[str, Any], where: str) -> _Draft:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat([*prompt, *completion], row, f"{where} prompt + completion")
    asked = _string(row, "prompt", where)
    return _Draft(text=asked + _string(row, "completion", where), answer=len(asked))


def _instruction(row: Mapping[str, Any], where: str) -> _Draft:
    asked = [_string(row, "instruction", where), _string(row, "input", where)]
    user: Message = {"role": "user", "content": "\n\n".join(part for part in asked if part)}
    answer: Message = {"role": "assistant", "content": _string(row, "output", where)}
    return _Draft(messages=(*_system(row, where), user, answer))


def _chat(turns: Sequence[object], row: Mapping[str, Any], where: str) -> _Draft:
    messages = tuple(_message(turn, f"{where}[{i}]") for i, turn in enumerate(turns))
    if messages and messages[0]["role"] != "system":
        messages = (*_system(row, where), *messages)
    return _Draft(messages=messages, tools=_tools(row.get("tools"), where))


def _system(row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    prompt = _string(row, "system", where)
    return ({"role": "system", "content": prompt},) if prompt else ()


def _message(turn: object, where: str) -> Message:
    """One turn in either spelling → ``role``, string ``content`` and what else it carries."""
    if not isinstance(turn, Mapping):
        raise UsageError(
            f"{where} a message must be an object, not {_kind(turn)}",
            remedy="give it `role` and `content`",
        )
    if "from" in turn and "role" not in turn:
        return _sharegpt(turn, where)
    role = turn.get("role")
    if not isinstance(role, str) or not role:
        raise UsageError(
            f"{where} has no `role`; keys seen: {_keys(turn)}",
            remedy="give each message `role` and `content`, or `from` and `value`",
        )
    # Tables fill absent keys with null; templates ask whether a key exists.
    message = {key: value for key, value in turn.items() if value is not None}
    message["content"] = _content(turn.get("content"), where)
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
    return message


def _sharegpt(turn: Mapping[str, Any], where: str) -> Message:
    role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise UsageError(
            f"{where} unknown speaker {turn['from']!r}",
            remedy=f"use one of {', '.join(SHAREGPT_ROLES)}",
        )
    content = _content(turn.get("value"), where)
    if turn["from"] == "function_call" and (calls := _parse_calls(content)):
        return {"role": role, "content": "", "tool_calls": calls}
    return {"role": role, "content": content}


def _parse_calls(text: str) -> list[dict[str, Any]] | None:
    """``{"name": …, "arguments": …}``, or a list of them, as OpenAI tool calls."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        return None
    return [_call(call) for call in calls]


def _content(content: object, where: str) -> str:
    """String content; text parts are joined by newlines and null is empty, as servers do."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise UsageError(
            f"{where} content must be a string or a list of text parts, not {_kind(content)}",
            remedy="correct the message",
        )
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
        text = (part.get("text") or part.get("value") or "") if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise UsageError(
                f"{where} has a content part of type {kind!r}; only text parts can be tokenized",
                remedy="remove the part or the row",
            )
        texts.append(text)
    return "\n".join(texts)


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
        raise UsageError(f"{where} `tool_calls` must be a list of objects, not {_kind(calls)}")
    return [
        {**call, "function": _call(call["function"])["function"]}
        if isinstance(call.get("function"), Mapping)
        else _call(call)
        for call in calls
    ]


def _call(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        # The wire format carries arguments as a JSON string; templates print objects. Text that
        # is not JSON is what the model said, and stays as it is.
        try:
            arguments = json.loads(arguments) if arguments else {}
        except ValueError:
            arguments = function["arguments"]
    return {"type": "function", "function": {**function, "arguments": arguments}}


def _tools(tools: object, where: str) -> tuple[dict[str, Any], ...] | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise UsageError(
                f"{where} `tools` is not valid JSON: {error}", remedy="correct or remove it"
            ) from None
    if not tools:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UsageError(f"{where} `tools` must be a list of function schemas, not {_kind(tools)}")
    return tuple(
        dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}
        for tool in tools
    )


def _string(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UsageError(f"{where} {key} must be a string, not {_kind(value)}")
    return value


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(str(key) for key in row) or "none"


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
