"""A `Document` → the text that the model would see → token ids.

No document gets two beginning-of-text tokens: text from a chat template already holds the special
tokens it needs, so it is tokenized without adding any; raw text gets those the tokenizer adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quantkit.data.rows import Document, Message, message_text
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = npt.NDArray[np.int64]
Marks = npt.NDArray[np.bool_]


def encode(document: Document, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool) -> Ids:
    """Token ids of one document, int64 ``[tokens]``, without a closing end-of-text token of ours.

    Raises:
        UsageError: see `render`.
    """
    text = render(document, tokenizer, chat_template=chat_template)
    found = _tokenize(text, document, tokenizer, chat_template=chat_template)
    return np.asarray(found["input_ids"], dtype=np.int64)


def encode_answers(
    document: Document, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool
) -> tuple[Ids, Marks]:
    """The same, and which of the tokens are of an answer (`answer_spans`), bool ``[tokens]``.

    A token on the border is of the answer: the model had to say it.

    Raises:
        UsageError: see `render`; or the tokenizer does not tell which characters a token is of.
    """
    if not tokenizer.is_fast:
        raise UsageError(
            f"{type(tokenizer).__name__} does not tell which characters a token is of, so that "
            "answers cannot be told from what was asked",
            remedy="set `distill: {answers: 1}`",
        )
    text = render(document, tokenizer, chat_template=chat_template)
    found = _tokenize(text, document, tokenizer, chat_template=chat_template, offsets=True)
    ids = np.asarray(found["input_ids"], dtype=np.int64)
    begin, end = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    answers = np.zeros(len(ids), dtype=np.bool_)
    for first, last in answer_spans(document, tokenizer, chat_template=chat_template):
        answers |= (begin < last) & (end > first) & (begin < end)
    return ids, answers


def answer_spans(
    document: Document, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool
) -> list[tuple[int, int]]:
    """Characters (first, behind the last) of the rendered text that answer something.

    Those are a completion, and each of an assistant's turns from where a server lets the model go
    on to what closes the turn. A turn that the template writes otherwise once others follow, as
    some do with what was thought, is left out: no server was ever to say it like that.

    Raises:
        UsageError: see `render`.
    """
    text = render(document, tokenizer, chat_template=chat_template)
    if document.messages is None:
        return [] if document.answer is None else [(document.answer, len(text))]
    spans = []
    for i, turn in enumerate(document.messages):
        if turn["role"] != "assistant" or i == 0:
            continue
        whole = _first_turns(document, i + 1, tokenizer, chat_template=chat_template)
        if chat_template:
            asked = _first_turns(document, i, tokenizer, chat_template=True, answering=True)
        else:
            asked = whole.removesuffix(message_text(turn))
        if text.startswith(whole) and whole.startswith(asked):
            spans.append((len(asked), len(whole)))
    return spans


def _first_turns(
    document: Document, turns: int, tokenizer: PreTrainedTokenizerBase, **options: bool
) -> str:
    assert document.messages is not None
    part = replace(document, messages=document.messages[:turns])
    return render(part, tokenizer, **options)


def _tokenize(
    text: str,
    document: Document,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: bool,
    offsets: bool = False,
) -> Mapping[str, Any]:
    templated = chat_template and document.messages is not None
    # Logged prompts may hold the beginning-of-text token as text; it is then not added again.
    begins = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
    found: Any = tokenizer(
        text,
        add_special_tokens=not (templated or begins),
        truncation=False,
        verbose=False,  # documents longer than the model's context are split, not an accident
        return_offsets_mapping=offsets,
    )
    return found


def render(
    document: Document,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: bool,
    answering: bool = False,
) -> str:
    """The text of one document.

    Args:
        document: raw text is returned as it stands.
        tokenizer: holds the chat template.
        chat_template: False renders each turn as a plain ``role: content`` line.
        answering: with what the template puts in front of the assistant's next turn.

    Raises:
        UsageError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    if document.messages is None:
        return document.text or ""
    if not chat_template:
        return "\n".join(f"{turn['role']}: {message_text(turn)}" for turn in document.messages)
    tools: list[Any] | None = list(document.tools) if document.tools else None
    template = _template(document, tokenizer, tools)
    messages = list(document.messages)
    if "tool_calls" not in template:
        messages = [_calls_as_content(message) for message in messages]
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=answering
        )
    except Exception as error:  # a template is a program: it raises what its author chose
        raise UsageError(
            f"{document.where} is refused by the chat template: {type(error).__name__}: {error}",
            remedy="correct the row, or set `calibrate.chat_template: false`",
        ) from error
    return str(rendered)


def _template(
    document: Document, tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None
) -> str:
    if not tokenizer.chat_template:
        raise UsageError(
            f"{document.where} is a conversation, but the tokenizer has no chat template",
            remedy="set `calibrate.chat_template: false` to render turns as 'role: content' lines",
        )
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError as error:  # several named templates and none is the default
        raise UsageError(
            f"{document.where} no chat template applies: {error}",
            remedy="set `calibrate.chat_template: false`",
        ) from error


def _calls_as_content(message: Message) -> Message:
    """A template that knows nothing of tool calls would drop them without a word.

    The model of such a template writes its calls as text, so text is what they become.
    """
    if not message.get("tool_calls"):
        return message
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": message_text(message)}
