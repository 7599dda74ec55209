"""How families of models write reasoning and tool calls: a row for each way.

A row is found by what the model's chat template holds, or named with ``--tool-parser`` and
``--reasoning-parser``. ``field`` is a field of transformers' response templates
(`transformers.utils.chat_parsing`), which read answers; ``writing`` says how to write a call, for
grammars that hold the model to one. A tokenizer that brings a response template needs no row to be
read. Names are vLLM's, where it has the same format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantkit.errors import UsageError

#: Values of the two options beside the names of rows.
AUTO, NONE = "auto", "none"
_FUNCTION = {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}}


@dataclass(frozen=True)
class Writing:
    """How calls stand in an answer: ``begin``, calls with ``between`` between them, ``end``.

    Attributes:
        trigger: what the first call starts with, ``begin`` included; empty where the answer is
            the call.
        before: in front of the arguments; ``{name}`` is the function's.
        after: behind the arguments, which are a JSON object.
        between: None where a message holds one call.
    """

    trigger: str
    before: str
    after: str = ""
    begin: str = ""
    between: str | None = None
    end: str = ""


@dataclass(frozen=True)
class ToolFormat:
    """A way to write calls.

    Attributes:
        marks: stand in the chat templates of its models, all of them.
        field: reads one call, or a list of calls.
        writing: None where only the model itself can write one.
        short_ids: the template takes ids of nine letters and digits only.
    """

    marks: tuple[str, ...]
    field: Mapping[str, Any] = field(hash=False)
    writing: Writing | None = None
    short_ids: bool = False


@dataclass(frozen=True)
class ReasoningFormat:
    """Reasoning stands between two tags; ``opening`` in a chat template tells the format."""

    opening: str
    closing: str

    @property
    def field(self) -> dict[str, Any]:
        return {"open": self.opening, "close": self.closing, "content": "text"}


#: Searched in this order: a row stands in front of those whose marks it holds as well.
TOOL_FORMATS: dict[str, ToolFormat] = {
    # Qwen3-Coder, Qwen3.5: arguments are XML, whose values take their types from the schema.
    "qwen3_coder": ToolFormat(
        marks=("<tool_call>", "<function="),
        field={
            "open_pattern": r"\s{0,8}<tool_call>\s{0,8}<function=(?P<name>[^>\n]{1,64})>",
            "close_pattern": r"</function>\s{0,8}</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {
                # A value ends at the next opening tag at the latest: without that, text that never
                # closes a tag takes time with the square of its length.
                "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?"
                r"(?P<value>(?:(?!<parameter=).)*?)\n?</parameter>"
            },
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
    ),
    # Hermes 2 and 3, Qwen2.5, Qwen3.
    "hermes": ToolFormat(
        marks=("<tool_call>",),
        field={
            "open_pattern": r"\s{0,8}<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {
                "type": "function",
                "function": {"name": "{content.name}", "arguments": "{content.arguments}"},
            },
        },
        writing=Writing(
            trigger="<tool_call>",
            before='<tool_call>\n{"name": "{name}", "arguments": ',
            after="}\n</tool_call>",
            between="\n",
        ),
    ),
    # Mistral from tokenizer v11 on.
    "mistral_args": ToolFormat(
        marks=("[TOOL_CALLS]", "[ARGS]"),
        field={
            "open_pattern": r"\s{0,8}\[TOOL_CALLS\]\s{0,8}(?P<name>[\w-]{1,64})"
            r"(?:\[CALL_ID\]\w{0,64})?\[ARGS\]",
            "close_pattern": r"(?=\[TOOL_CALLS\])",
            "repeats": True,
            "content": "json",
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
        writing=Writing(trigger="[TOOL_CALLS]", before="[TOOL_CALLS]{name}[ARGS]", between=""),
        short_ids=True,
    ),
    # Mistral up to tokenizer v7: one list for all calls.
    "mistral": ToolFormat(
        marks=("[TOOL_CALLS]",),
        field={
            "open_pattern": r"\s{0,8}\[TOOL_CALLS\]\s{0,8}(?=\[)",
            "content": "json",
            "transform": _FUNCTION,
            "transform_each": True,
        },
        writing=Writing(
            trigger="[TOOL_CALLS]",
            begin="[TOOL_CALLS] [",
            before='{"name": "{name}", "arguments": ',
            after="}",
            between=", ",
            end="]",
        ),
        short_ids=True,
    ),
    # Llama 3.1 to 3.3: the answer is the call, and there is one.
    "llama3_json": ToolFormat(
        marks=('"parameters": dictionary of argument name',),
        field={
            "open_pattern": r"\A\s{0,8}(?:<\|python_tag\|>)?\s{0,8}(?=\{)",
            "content": "json",
            "transform": {
                "type": "function",
                "function": {"name": "{content.name}", "arguments": "{content.parameters}"},
            },
        },
        writing=Writing(trigger="", before='{"name": "{name}", "parameters": ', after="}"),
    ),
}

REASONING_FORMATS: dict[str, ReasoningFormat] = {
    "think": ReasoningFormat("<think>", "</think>"),  # DeepSeek-R1, Qwen3, QwQ, SmolLM3
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),  # Magistral
}


def check_parsers(tool_parser: str, reasoning_parser: str) -> None:
    """Raise `UsageError` unless both are `AUTO`, `NONE` or the name of a row."""
    for option, name, rows in (
        ("--tool-parser", tool_parser, [*TOOL_FORMATS]),
        ("--reasoning-parser", reasoning_parser, [*REASONING_FORMATS]),
    ):
        if name not in (AUTO, NONE, *rows):
            remedy = f"use {', '.join((AUTO, NONE, *rows))}"
            raise UsageError(f"{option} {name!r} is not known", remedy=remedy)
