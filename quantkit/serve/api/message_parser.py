"""From an answer's text to what it means: content, reasoning and calls, as it comes.

transformers' response parser finds the regions; a call is parsed when all of it is there. What
looks like a call and is none (arguments that are no JSON object, a function that was not offered,
an end that is missing) stays text, word for word.
"""

from __future__ import annotations

import json
import re
import secrets
import string
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import regex
from transformers.utils.chat_parsing import ResponseParser, parse_response

from quantkit.serve.api.strict_json import strict_json
from quantkit.serve.events import FinishReason

_CALLS, _REASONING, _CONTENT = "tool_calls", "reasoning_content", "content"
_AS_IT_IS = {"content": "text", "content_args": {"strip": False}}
_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Text:
    """A piece of what is said, or thought."""

    kind: Literal["content", "reasoning"]
    text: str


@dataclass(frozen=True)
class Call:
    """A complete call; ``arguments`` is the JSON text of an object."""

    id: str
    name: str
    arguments: str


Part = Text | Call


@dataclass
class Message:
    """A whole answer, taken apart."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()

    def add(self, parts: Iterable[Part]) -> None:
        for part in parts:
            if isinstance(part, Call):
                self.calls += (part,)
            elif part.kind == "reasoning":
                self.reasoning += part.text
            else:
                self.content += part.text


class Reader:
    """Fields of a response template, arranged for reading answers piece by piece.

    Args:
        call: the field that reads calls; None leaves them in the text.
        reasoning: the field that reads reasoning; None if there is none.
        anchor: ``start_anchor`` or ``start_anchor_pattern``.

    Raises:
        ValueError, TypeError, regex.error: transformers does not read such fields.

    Attributes:
        template: the response template; None where there is nothing to find.
        hidden_ids: tokens whose text it must not see, as `SamplingParams` takes them.
    """

    hidden_ids: frozenset[int] | None = None

    def __init__(
        self,
        call: Mapping[str, Any] | None,
        reasoning: Mapping[str, Any] | None,
        anchor: Mapping[str, Any],
    ) -> None:
        self.call = call
        fields: dict[str, Any] = {_CONTENT: dict(_AS_IT_IS)}
        if reasoning is not None:
            fields[_REASONING] = _bounds(reasoning) | _AS_IT_IS
        if call is not None:
            fields[_CALLS] = _whole_region(call)
        self.template = {**anchor, "fields": fields} if len(fields) > 1 else None
        self._single = {**anchor, "fields": {_CALLS: dict(call)}} if call is not None else {}
        for template in filter(None, (self._single, self.template)):
            ResponseParser(template, prefix="")  # a broken one is known before any answer
        self._anchor = delimiter(anchor, "start_anchor")
        self._end = None if call is None or _is_ahead(call) else delimiter(call, "close")
        #: JSON that was cut off is none; elsewhere a call would just have fewer arguments.
        self._shows_cuts = (call or {}).get("content") == "json"
        tags = (call or {}).get("content_args", {}).get("tag_pattern")
        self._tags = None if tags is None else regex.compile(tags, regex.DOTALL)

    def begun(self, prompt: str) -> str:
        """What of the answer the end of a prompt has begun; nothing if no header is in sight."""
        found = list(self._anchor.finditer(prompt))
        return prompt[found[-1].start() :] if found else ""

    def closed(self, body: str) -> bool:
        """A call's body ends as the format wants it to; true where it wants nothing."""
        return self._end is None or any(m.end() == len(body) for m in self._end.finditer(body))

    def parse(
        self, opening: str, body: str, tools: Sequence[Mapping[str, Any]]
    ) -> list[tuple[str, str]]:
        """Names and arguments of a region's calls.

        Raises:
            ValueError, KeyError, TypeError, AttributeError, RecursionError: it holds none.
        """
        if not self._shows_cuts and not self.closed(body):  # whatever ended the answer
            raise ValueError("it was cut off")
        if self._tags is not None:  # whatever is no tag would be passed over
            inside = body if self._end is None else self._end.sub("", body)
            if self._tags.sub("", inside).strip():
                raise ValueError("there is something between the arguments")
        offered: list[Any] = [*tools]
        message = parse_response(opening + body, self._single, prefix="", tools=offered)
        return [_name_and_arguments(call["function"]) for call in _flat(message[_CALLS])]


class MessageParser:
    """Takes one answer apart.

    Args:
        reader: how the model writes.
        prompt: its end, from which it shows what of the answer the template has begun.
        tools: definitions of what may be called.
        short_ids: make ids of nine letters and digits.
    """

    def __init__(
        self,
        reader: Reader,
        prompt: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        short_ids: bool = False,
    ) -> None:
        self._reader = reader
        self._tools = tools
        self._names = {tool["function"]["name"] for tool in tools}
        self._short_ids = short_ids
        self._trim = _Trim()
        self._cut = False
        self._parser = None
        #: The prompt ends, or the answer stands, inside reasoning.
        self.reasoning = False
        if reader.template is not None:
            self._parser = ResponseParser(reader.template, prefix=reader.begun(prompt))
            for event in self._parser.initial_events:
                self._read(event)

    def push(self, text: str) -> list[Part]:
        """More text; returns what it settles."""
        if self._parser is None:
            return [Text("content", text)] if text else []
        return [part for event in self._parser.feed(text) for part in self._read(event)]

    def finish(self, reason: FinishReason) -> list[Part]:
        """No more text will come; a call that was cut off is text."""
        if self._parser is None:
            return []
        self._cut = reason != "stop"
        _, events = self._parser.finalize()
        return [part for event in events for part in self._read(event)]

    def _read(self, event: Mapping[str, Any]) -> list[Part]:
        kind, name = event["type"], event["field"]
        if name == _CALLS:
            return self._call(**event["value"]) if kind == "region_close" else []
        if name == _REASONING:
            self.reasoning = kind != "region_close"
        if kind != "region_chunk":
            return []
        return self._trim.push("reasoning" if name == _REASONING else "content", event["text"])

    def _call(self, opening: str, body: str) -> list[Part]:
        try:
            if self._cut and not self._reader.closed(body):
                raise ValueError("it was cut off")
            calls = self._reader.parse(opening, body, self._tools)
            if not calls or not {name for name, _ in calls} <= self._names:
                raise ValueError("it names no function that there is")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return self._trim.push("content", opening + body)
        self._trim.restart()
        return [Call(self._new_id(), name, arguments) for name, arguments in calls]

    def _new_id(self) -> str:
        if self._short_ids:
            return "".join(secrets.choice(_LETTERS) for _ in range(9))
        return f"call_{uuid.uuid4().hex}"


class _Trim:
    """Drops the whitespace around regions: templates write it there, and nobody said it."""

    def __init__(self) -> None:
        self._kind = "content"
        self._leading = False
        self._held = ""

    def restart(self) -> None:
        """What comes next is the beginning of a text."""
        self._leading, self._held = True, ""

    def push(self, kind: Literal["content", "reasoning"], text: str) -> list[Part]:
        if kind != self._kind:
            self._kind = kind
            self.restart()
        text = self._held + text
        self._held = ""
        if self._leading:
            text = text.lstrip()
        if kind == "reasoning":  # what ends it may be whitespace in front of the tag
            said = text.rstrip()
            text, self._held = said, text[len(said) :]
        if not text:
            return []
        self._leading = False
        return [Text(kind, text)]


def _bounds(field: Mapping[str, Any]) -> dict[str, Any]:
    """Where a region begins and ends."""
    keys = ("open", "open_pattern", "close", "close_pattern")
    found = {key: field[key] for key in keys if key in field}
    if any("(?P<" in str(value) for value in found.values()):
        found["transform"] = "{content}"  # captures want one
    return found


def _whole_region(field: Mapping[str, Any]) -> dict[str, Any]:
    """A field for calls that keeps every character of them, and so cannot fail.

    The closing tag is matched from behind, which leaves it in the body.
    """
    region: dict[str, Any] = {
        "open_pattern": f"(?P<opening>{delimiter(field, 'open').pattern})",
        "repeats": True,
        "transform": {"opening": "{opening}", "body": "{content}"},
        **_AS_IT_IS,
    }
    if "close" in field or "close_pattern" in field:
        close = delimiter(field, "close").pattern
        region["close_pattern"] = close if _is_ahead(field) else f"(?<={close})"
    return region


def _is_ahead(field: Mapping[str, Any]) -> bool:
    """A call ends where the next one begins."""
    return str(field.get("close_pattern", "")).startswith("(?=")


def delimiter(field: Mapping[str, Any], name: str) -> Any:
    """A delimiter as a regular expression; None if the field has none."""
    if f"{name}_pattern" in field:
        return regex.compile(field[f"{name}_pattern"], regex.DOTALL)
    literals = field.get(name)
    if literals is None:
        return None
    listed = [literals] if isinstance(literals, str) else literals
    ordered = sorted(listed, key=len, reverse=True)
    return regex.compile("|".join(map(re.escape, ordered)), regex.DOTALL)


def _flat(calls: Any) -> list[Any]:
    """One call, a list, or a list of lists: what a field gives depends on ``repeats``."""
    return [call for item in calls for call in _flat(item)] if isinstance(calls, list) else [calls]


def _name_and_arguments(function: Mapping[str, Any]) -> tuple[str, str]:
    name, arguments = function["name"], function["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("it has no name, or its arguments are no object")
    return name, strict_json(arguments)
