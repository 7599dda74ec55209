"""Chat templates, plain roles, tool calls; never two beginning-of-text tokens."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from quantkit.data import Document, encode, render
from quantkit.data.render import answer_spans, encode_answers
from quantkit.data.rows import to_document
from quantkit.errors import UsageError

ROW = {
    "messages": [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
        },
    ],
    "tools": [{"name": "weather", "parameters": {}}],
}
CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'


def document(row: object) -> Document:
    made = to_document(row, "a.jsonl:1")
    assert made is not None
    return made


def test_chat_goes_through_the_template_without_a_second_bos(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    chat = document({"messages": [{"role": "user", "content": "hi"}]})
    assert render(chat, tokenizer, chat_template=True) == "<s>[user]hi</s>\n"
    ids = encode(chat, tokenizer, chat_template=True)
    assert ids.tolist().count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids) == "<s>[user]hi</s>\n"


def test_raw_text_gets_one_bos_even_when_it_was_logged_with_one(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    for text in ("hi", "<s>hi"):
        ids = encode(document({"text": text}), tokenizer, chat_template=True)
        assert tokenizer.decode(ids) == "<s>hi"


def test_without_a_template_roles_are_plain_lines(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    chat = document(ROW)
    with pytest.raises(UsageError, match=r"a.jsonl:1 is a conversation, but the tokenizer has no"):
        render(chat, tokenizer, chat_template=True)
    assert render(chat, tokenizer, chat_template=False) == f"user: weather?\nassistant: {CALL}"
    ids = encode(chat, tokenizer, chat_template=False)
    assert str(tokenizer.decode(ids)).startswith("<s>user: ")
    assert render(document({"text": "raw"}), tokenizer, chat_template=True) == "raw"


def test_tool_calls_are_handed_to_a_template_that_knows_them(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = (
        "{{ tools | length }} {% for m in messages %}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.city }}"
        "{% else %}{{ m.content }} {% endif %}{% endfor %}"
    )
    assert render(document(ROW), tokenizer, chat_template=True) == "1 weather? Oslo"


def test_tool_calls_become_text_for_a_template_that_does_not(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rendered = render(document(ROW), tokenizer, chat_template=True)
    assert rendered == f"<s>[user]weather?[assistant]{CALL}</s>\n"


def test_a_conversation_that_the_template_refuses(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UsageError, match=r"a.jsonl:1 is refused .* roles must alternate; correct"):
        render(document(ROW), tokenizer, chat_template=True)


def test_named_templates_without_a_default(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = {"rag": "x"}
    with pytest.raises(UsageError, match=r"a.jsonl:1 no chat template applies"):
        render(
            document({"messages": [{"role": "user", "content": "a"}]}),
            tokenizer,
            chat_template=True,
        )


@pytest.mark.real_model
def test_real_template(smollm: PreTrainedTokenizerBase) -> None:
    chat = document({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]})
    text = render(chat, smollm, chat_template=True)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n")
    ids = encode(chat, smollm, chat_template=True)
    assert smollm.decode(ids) == text
    assert ids.tolist().count(smollm.bos_token_id) == 2
    assert CALL in render(document(ROW), smollm, chat_template=True)


CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
#: Drops what was thought in all turns but the last.
THINKS = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{{ m['content'] if loop.last else m['content'].split('/')[-1] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def said(row: object, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool = True) -> str:
    """The tokens that are known as answers, and dots for the others."""
    made = document(row)
    ids, answers = encode_answers(made, tokenizer, chat_template=chat_template)
    assert ids.tolist() == encode(made, tokenizer, chat_template=chat_template).tolist()
    words = [tokenizer.decode([i]) if a else "." for i, a in zip(ids, answers, strict=True)]
    return "".join(words).lstrip(".")


def test_what_answers_a_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    assert said({"prompt": "<s>Who? ", "completion": "I."}, tokenizer) == "I."
    assert said({"prompt": "Who? ", "completion": "I."}, tokenizer) == "I."
    assert said({"prompt": "Who?", "completion": ""}, tokenizer) == ""
    assert said({"text": "Who? I."}, tokenizer) == ""


def test_each_turn_of_the_assistant_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    tokenizer.chat_template = CHATML
    assert said(row, tokenizer) == "b<end>" + "." * len("<|user|>c<end><|assistant|>") + "d<end>"
    plain = said(row, tokenizer, chat_template=False)
    assert plain == "b" + "." * len("\nuser: c\nassistant: ") + "d"
    greeted = {"messages": row["messages"][1:]}
    assert said(greeted, tokenizer) == "d<end>"  # a turn that follows nothing answers nothing
    assert said({"messages": row["messages"][:1]}, tokenizer) == ""


def test_turns_that_a_server_never_asked_for_in_this_form_are_left_out(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    turns = [("user", "a"), ("assistant", "hm/b"), ("user", "c"), ("assistant", "oh/d")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    tokenizer.chat_template = THINKS
    text = render(document(row), tokenizer, chat_template=True)
    spans = answer_spans(document(row), tokenizer, chat_template=True)
    assert [text[first:last] for first, last in spans] == ["oh/d<end>"]


def test_a_call_is_an_answer(smollm: PreTrainedTokenizerBase) -> None:
    text = render(document(ROW), smollm, chat_template=True)
    spans = answer_spans(document(ROW), smollm, chat_template=True)
    assert [text[first:last].strip() for first, last in spans] == [f"{CALL}<|im_end|>"]


def test_a_tokenizer_without_offsets_is_refused(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(UsageError, match="does not tell which characters a token is of"):
        encode_answers(document({"text": "a"}), tokenizer, chat_template=True)
