"""A chat prompt, and what is known of the answer to it: its form and how it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantkit.serve.api.chat_format import ChatFormat
from quantkit.serve.api.message_parser import MessageParser, Reader
from quantkit.serve.api.messages import Message, hold_calls, hold_more_than_text
from quantkit.serve.request import RequestError, SamplingParams, StructuredOutputs, require

if TYPE_CHECKING:
    from quantkit.serve.api.generation import Service
    from quantkit.serve.api.tools import Tools


@dataclass(frozen=True)
class Conversation:
    """What an answer continues.

    Attributes:
        style: how the model writes.
        prompt_ids: all that it reads.
        tail: their text, as far back as the answer may begin.
        tools: what the answer may call; None if nothing.
        form: what it must look like; None is free.
        said: for the capture; None where messages alone do not tell what the model read.
    """

    style: ChatFormat
    prompt_ids: tuple[int, ...]
    tail: str
    tools: Tools | None
    form: StructuredOutputs | None
    said: dict[str, Any] | None

    @property
    def reader(self) -> Reader:
        return self.style.plain if self.tools is None else self.style.reader

    def parser(self) -> MessageParser:
        """Reads one answer."""
        return MessageParser(
            self.reader,
            self.tail,
            () if self.tools is None else self.tools.definitions,
            short_ids=self.style.tools is not None and self.style.tools.short_ids,
        )

    def sampling(self, asked: SamplingParams) -> SamplingParams:
        """A request's parameters, with the answer's form."""
        return replace(asked, structured_outputs=self.form, hidden_ids=self.reader.hidden_ids)


async def begin(
    service: Service,
    messages: Sequence[Message],
    tools: Tools | None = None,
    form: StructuredOutputs | None = None,
    switched: Mapping[str, bool] | None = None,
) -> Conversation:
    """Lay out a prompt and the form of its answer.

    Args:
        service: the served model.
        messages: what was said.
        tools: what the answer may call.
        form: what its text must look like.
        switched: switches of the chat template, by name.

    Raises:
        RequestError: the model's template shows it no tools or has no such switch, its calls
            cannot be read or held to what was asked, or a function's schema does not compile.
    """
    style = service.style
    check_template(style, messages, tools)
    definitions = tools.definitions if tools else ()
    prompt_ids = await service.encoder.chat(messages, definitions, switched)
    said: dict[str, Any] | None = None
    if not (tools or switched or hold_more_than_text(messages)):
        said = {"messages": [{"role": item.role, "content": item.text} for item in messages]}
    tail = await service.encoder.tail(prompt_ids)
    conversation = Conversation(style, prompt_ids, tail, tools, form, said)
    if tools is not None:
        require(
            form is None, "tools", "an answer cannot have a given form and call tools; ask for one"
        )
        # Known before the model says a word, whether or not it is held to the schemas.
        await service.engine.grammars.compile_soon(tools.schemas)
        if tools.enforced:
            form = _enforcing(style, tools)
    if form is not None and style.reasoning is not None and conversation.parser().reasoning:
        form = replace(form, reasoning_end=style.reasoning.closing)
    return replace(conversation, form=form)


def check_template(style: ChatFormat, messages: Sequence[Message], tools: Tools | None) -> None:
    """Raise `RequestError` if the model would not see its tools, or its earlier calls."""
    if tools is not None and not style.takes_tools:
        raise RequestError(
            "tools: this model's chat template does not show them to it",
            param="tools",
            remedy="serve a model that was trained to call tools",
        )
    if tools is not None and style.tools is None:
        raise RequestError(
            "tools: how this model writes calls is not known",
            param="tools",
            remedy="start the server with --tool-parser",
        )
    if hold_calls(messages) and not style.takes_calls:
        raise RequestError(
            "messages: this model's chat template does not show it calls and their results",
            param="messages",
        )


def _enforcing(style: ChatFormat, tools: Tools) -> StructuredOutputs:
    form = None if style.tools is None else tools.form(style.tools, style.tags)
    if form is None:
        raise RequestError(
            "tool_choice: how this model writes calls cannot be enforced, so no call can be "
            "required, strict or the only one",
            param="tool_choice",
            remedy="use 'auto', parallel calls and no strict functions",
        )
    return form
