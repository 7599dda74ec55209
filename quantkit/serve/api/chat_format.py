"""What the served model's chat template takes, and how its answers are read.

A tokenizer's own response template comes first, then the rows of `serve.chat_formats` whose marks
the chat template holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import regex
from jinja2 import TemplateError

from quantkit.errors import QuantkitError
from quantkit.serve.api.message_parser import Reader, delimiter
from quantkit.serve.chat_formats import (
    AUTO,
    NONE,
    REASONING_FORMATS,
    TOOL_FORMATS,
    ReasoningFormat,
    ToolFormat,
    check_parsers,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_PROBE = "probe_of_tools"
_QUESTION = "probe_of_headers"
_USER = {"role": "user", "content": _QUESTION}
#: What comes of a response template that is not what its format says: it is a stranger's JSON.
_BROKEN = (ValueError, TypeError, KeyError, IndexError, AttributeError, regex.error)


class ChatFormat:
    """How one model writes what is not plain text.

    Args:
        tokenizer: the model's.
        tool_parser: a row of `TOOL_FORMATS`, `AUTO` or `NONE`.
        reasoning_parser: a row of `REASONING_FORMATS`, `AUTO` or `NONE`.

    Attributes:
        tools: how calls are read and written; None if nobody knows.
        reasoning: how reasoning is written; None if there is none, or nobody knows.
        reader: reads answers to requests with tools.
        plain: reads all other answers.
        takes_tools: the chat template shows the model its tools.
        takes_calls: it shows earlier calls and their results.

    Raises:
        UsageError: there is no format of that name.
        QuantkitError: the tokenizer's own response template is broken.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tool_parser: str = AUTO,
        reasoning_parser: str = AUTO,
    ) -> None:
        check_parsers(tool_parser, reasoning_parser)
        text = template_text(tokenizer)
        named = AUTO not in (tool_parser, reasoning_parser)
        own = {} if named else getattr(tokenizer, "response_template", None) or {}
        self.tools = _choose(TOOL_FORMATS, tool_parser, text)
        self.reasoning = _choose(REASONING_FORMATS, reasoning_parser, text)
        try:
            call, thought = self._fields(own, tool_parser, reasoning_parser)
            headers = ("start_anchor", "start_anchor_pattern")
            anchor = {key: own[key] for key in headers if key in own}
            anchor = anchor or _anchor(tokenizer, thought)
            self.plain = Reader(None, thought, anchor)
            self.reader = Reader(call, thought, anchor)
        except _BROKEN as error:
            raise QuantkitError(
                f"transformers cannot read the tokenizer's response_template: {error}",
                remedy="give --tool-parser and --reasoning-parser",
            ) from error
        self.plain.hidden_ids = _hidden_ids(tokenizer, [thought])
        self.reader.hidden_ids = _hidden_ids(tokenizer, [self.reader.call, thought])
        self.takes_tools = _shows(tokenizer, [_USER], tools=[_definition()])
        self.takes_calls = _shows(tokenizer, _called())

    def _fields(
        self, own: Mapping[str, Any], tool_parser: str, reasoning_parser: str
    ) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
        """The fields that read calls and reasoning; a tokenizer's own become the format."""
        fields = dict(own.get("fields", {}))
        call = fields.get("tool_calls", {})
        if tool_parser == AUTO and _opens(call):
            self.tools = _adopt(call, self.tools)
        thought = next(
            (fields[name] for name in REASONING_FIELDS if _opens(fields.get(name))), None
        )
        if thought is None or reasoning_parser != AUTO:
            thought = None if self.reasoning is None else self.reasoning.field
        elif "open" in thought and "close" in thought:
            self.reasoning = ReasoningFormat(_first(thought["open"]), _first(thought["close"]))
        return None if self.tools is None else self.tools.field, thought

    @property
    def tags(self) -> tuple[str, ...]:
        """Around reasoning."""
        return () if self.reasoning is None else (self.reasoning.opening, self.reasoning.closing)


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """All of a tokenizer's chat templates; empty if it has none."""
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else "\n".join(template.values())


def _choose(rows: Mapping[str, Any], asked: str, text: str) -> Any:
    if asked == NONE:
        return None
    if asked == AUTO:
        return next((row for row in rows.values() if _has_marks(row, text)), None)
    return rows[asked]


def _has_marks(row: ToolFormat | ReasoningFormat, text: str) -> bool:
    marks = row.marks if isinstance(row, ToolFormat) else (row.opening,)
    return all(mark in text for mark in marks)


def _adopt(call: Mapping[str, Any], known: ToolFormat | None) -> ToolFormat:
    """A tokenizer's own field, with the writing of a known format if it reads what that writes."""
    if known is None or known.writing is None:
        return ToolFormat((), call)
    way = known.writing
    written = way.begin + way.before.replace("{name}", "f") + "{}" + way.after + way.end
    try:
        found = Reader(call, None, {"start_anchor": "\0"}).parse(written, "", [])
    except (ValueError, KeyError, TypeError, AttributeError, regex.error):
        found = []
    same = found == [("f", "{}")]
    return ToolFormat((), call, way if same else None, known.short_ids)


def _opens(field: Mapping[str, Any] | None) -> bool:
    """A field that begins somewhere, and is not what all the rest belongs to."""
    return field is not None and not field.keys().isdisjoint({"open", "open_pattern"})


def _first(literal: str | list[str]) -> str:
    return literal if isinstance(literal, str) else literal[0]


def _hidden_ids(
    tokenizer: PreTrainedTokenizerBase, fields: list[Mapping[str, Any] | None]
) -> frozenset[int] | None:
    """Special tokens whose text no answer shows: all but those that a reader looks for.

    None if it looks for none, which is the usual case.
    """
    keys = ("open", "open_pattern", "close", "close_pattern")
    looked_for = "\0".join(str(item.get(key, "")) for item in fields if item for key in keys)
    special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    hidden = frozenset(
        i
        for i, content in special.items()
        if content not in looked_for and re.escape(content) not in looked_for
    )
    return hidden if len(hidden) < len(special) else None


def _definition() -> dict[str, Any]:
    schema = {"type": "object", "properties": {"a": {"type": "string", "description": "a"}}}
    function = {"name": _PROBE, "description": "a", "parameters": schema}
    return {"type": "function", "function": function}


def _called() -> list[dict[str, Any]]:
    function = {"name": _PROBE, "arguments": {"a": "b"}}
    call = {"id": "abcdefghi", "type": "function", "function": function}  # nine, as Mistral wants
    return [
        _USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": _PROBE, "content": "result"},
    ]


def _anchor(
    tokenizer: PreTrainedTokenizerBase, thought: Mapping[str, Any] | None
) -> dict[str, str]:
    """Where answers begin in a prompt: what the template writes there, in front of reasoning."""
    asked = _render(tokenizer, [_USER], begin=False)
    begun = _render(tokenizer, [_USER])
    alike = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(asked, begun, strict=False))
    )
    # One that begins an answer in any case shows it behind the question.
    for written in (begun[alike:], begun.rpartition(_QUESTION)[2]):
        header = written if thought is None else delimiter(thought, "open").split(written, 1)[0]
        if header := header.lstrip():
            return {"start_anchor": header}
    return {"start_anchor_pattern": r"(?!)"}  # never


def _shows(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[Any] | None = None,
) -> bool:
    """The template writes the probe out. Tried: one may name ``tools`` and not show them."""
    return _PROBE in _render(tokenizer, messages, tools)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[Any] | None = None,
    *,
    begin: bool = True,
) -> str:
    """A conversation as the template writes it, with the answer's beginning or without; empty if
    there is no template, or it refuses."""
    if not tokenizer.chat_template:
        return ""
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=begin
        )
    except (TemplateError, ValueError, TypeError):
        return ""
    return str(text)
