"""Answers taken apart, whole and character by character, in every format of the table."""

from __future__ import annotations

import copy
import json

import pytest
from tool_helpers import CLOCK, TEMPLATES, WEATHER, tool_tokenizer
from transformers import PreTrainedTokenizerFast

from quantkit.errors import QuantkitError, UsageError
from quantkit.serve.api.chat_format import ChatFormat
from quantkit.serve.api.message_parser import Message, MessageParser, Text
from quantkit.serve.chat_formats import TOOL_FORMATS
from quantkit.serve.events import FinishReason

TOOLS = [WEATHER, CLOCK]
OSLO = ("get_weather", {"city": "Oslo", "days": 3})
NOW = ("clock", {})

#: What a model of each format says → (content, calls).
SAID: dict[str, list[tuple[str, str, list[tuple[str, dict]]]]] = {
    "hermes": [
        ("No call at all.", "No call at all.", []),
        (
            'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": '
            '{"city": "Oslo", "days": 3}}\n</tool_call>',
            "Let me see.",
            [OSLO],
        ),
        (
            '<tool_call>{"name": "clock", "arguments": {}}</tool_call>\n<tool_call>\n'
            '{"arguments": {"city": "Oslo", "days": 3}, "name": "get_weather"}\n</tool_call>\n',
            "",
            [NOW, OSLO],
        ),
        ("a < b <tool and </tool_call>", "a < b <tool and </tool_call>", []),
    ],
    "qwen3_coder": [
        (
            "Well:\n<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n"
            "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
            "Well:",
            [OSLO],
        ),
        ("<tool_call>\n<function=clock>\n</function>\n</tool_call>", "", [NOW]),
    ],
    "mistral_args": [
        (
            'Now.[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo", "days": 3}[TOOL_CALLS]clock[ARGS]{}',
            "Now.",
            [OSLO, NOW],
        ),
    ],
    "mistral": [
        (
            '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}, '
            '{"name": "clock", "arguments": {}}]',
            "",
            [OSLO, NOW],
        ),
    ],
    "llama3_json": [
        ('{"name": "get_weather", "parameters": {"city": "Oslo", "days": 3}}', "", [OSLO]),
        ('<|python_tag|>{"name": "clock", "parameters": {}}', "", [NOW]),
        ('As JSON: {"name": "clock", "parameters": {}}',) * 2 + ([],),
    ],
}
CASES = [(name, *case) for name, cases in SAID.items() for case in cases]


def style(tokenizer: PreTrainedTokenizerFast, name: str) -> ChatFormat:
    found = ChatFormat(tool_tokenizer(tokenizer, name))
    assert found.tools is TOOL_FORMATS[name], "found by what the template holds"
    return found


def parser(form: ChatFormat, prompt: str = "") -> MessageParser:
    return MessageParser(form.reader, prompt, TOOLS)


def read(
    machine: MessageParser, pieces: list[str], reason: FinishReason = "stop"
) -> tuple[Message, list[str]]:
    """The message, and its content as it stood after each piece."""
    message, stages = Message(), []
    for piece in pieces:
        message.add(machine.push(piece))
        stages.append(message.content)
    message.add(machine.finish(reason))
    return message, stages


def calls(message: Message) -> list[tuple[str, dict]]:
    assert len({call.id for call in message.calls}) == len(message.calls)
    return [(call.name, json.loads(call.arguments)) for call in message.calls]


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_every_format_is_read(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """And every row of the table has something to read here."""
    form = style(tokenizer, name)
    assert form.takes_tools
    assert form.takes_calls
    for text, content, expected in SAID[name]:
        whole, _ = read(parser(form), [text])
        assert (whole.content, calls(whole)) == (content, expected)
        streamed, stages = read(parser(form), list(text))
        assert (streamed.content, calls(streamed)) == (content, expected)
        for stage in stages:
            assert content.startswith(stage), "no half tag, and nothing taken back"


def test_text_streams_at_once(tokenizer: PreTrainedTokenizerFast) -> None:
    machine = parser(style(tokenizer, "hermes"))
    assert machine.push("Hello") == [Text("content", "Hello")]
    assert machine.push(" <") == [], "may become a tag"
    assert machine.push("3") == [Text("content", " <3")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>{not json}</tool_call>"),
        ("hermes", '<tool_call>{"name": "clock"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "clock", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "clock", "arguments": {"a": NaN}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "rm_rf", "arguments": {}}</tool_call> after'),
        ("hermes", 'Hm. \n<tool_call>{"name": 5, "arguments": {}}\n</tool_call>\n\nafter'),
        ("hermes", "<tool_call>" + '{"a":' * 3000 + "</tool_call>"),
        ("hermes", "<tool_call>[]</tool_call>"),
        # Half a surrogate pair: no answer in UTF-8 can carry it.
        ("hermes", r'<tool_call>{"name": "clock", "arguments": {"a": "\ud800"}}</tool_call>'),
        ("hermes", r'<tool_call>{"name": "clock", "arguments": {"\udfff": 1}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "clock", "arguments": {'),
        ("qwen3_coder", "<tool_call><function=clock>\n<parameter=a>\n1</function></tool_call>"),
        ("qwen3_coder", "<tool_call><function=clock>\nwords</function></tool_call>"),
        ("qwen3_coder", "<tool_call><function=other>\n</function></tool_call>"),
        ("mistral_args", "[TOOL_CALLS]clock[ARGS]{"),
        ("mistral_args", '[TOOL_CALLS]clock[ARGS]["a"]'),
        ("mistral", '[TOOL_CALLS] [{"name": "clock", "arguments": {}}, {"name": "x"}]'),
        ("mistral", "[TOOL_CALLS] []"),
        ("llama3_json", '{"name": "clock"}'),
        ("llama3_json", '{"answer": 42}'),
        ("llama3_json", '{"name": "other", "parameters": {}}'),
    ],
)
def test_what_is_no_call_is_text_word_for_word(
    name: str, text: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    for pieces in ([text], list(text)):
        message, _ = read(parser(style(tokenizer, name)), pieces)
        assert message.calls == ()
        assert message.content == text


@pytest.mark.parametrize("reason", ["length", "stop"])
def test_a_call_that_was_cut_off_is_text(
    reason: FinishReason, tokenizer: PreTrainedTokenizerFast
) -> None:
    """XML that stops in the middle, at a stop string or for want of tokens, would be a call with
    fewer arguments."""
    text = "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n"
    message, _ = read(parser(style(tokenizer, "qwen3_coder")), [text], reason)
    assert (message.content, message.calls) == (text, ())


def test_lines_that_were_cut_off_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """As for a tokenizer's own format of pairs; one that ends with the answer is whole there."""
    own = tool_tokenizer(tokenizer, "hermes")
    field = {
        "open_pattern": r"<call>(?P<name>\w+)\n",
        "close": own.eos_token,
        "content": "kv-lines",
        "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
    }
    own.response_template = {"start_anchor": "a", "fields": {"tool_calls": field}}
    form = ChatFormat(own)
    text = "<call>get_weather\ncity: Oslo\n"
    message, _ = read(parser(form), [text])
    assert (message.content, message.calls) == (text, ())
    assert form.reader.hidden_ids is not None
    assert own.eos_token_id not in form.reader.hidden_ids, "the parser sees it"
    message, _ = read(parser(form), [text + own.eos_token])
    assert calls(message) == [("get_weather", {"city": "Oslo"})]


def test_types_come_from_the_schema(tokenizer: PreTrainedTokenizerFast) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    text = (
        "<tool_call><function=f><parameter=a>true</parameter><parameter=b>7</parameter>"
        "</function></tool_call>"
    )
    machine = MessageParser(style(tokenizer, "qwen3_coder").reader, "", [tool])
    message, _ = read(machine, [text])
    assert calls(message) == [("f", {"a": True, "b": "7"})]


def test_ids_are_unique_and_short_where_the_template_wants_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = "[TOOL_CALLS]clock[ARGS]{}" * 50
    machine = MessageParser(style(tokenizer, "mistral_args").reader, "", TOOLS, short_ids=True)
    message, _ = read(machine, [text])
    assert len({call.id for call in message.calls}) == 50
    assert all(len(call.id) == 9 and call.id.isalnum() for call in message.calls)


# --- reasoning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "content"),
    [
        ("", "<think>\nhm,\n well\n</think>\n\nYes.", "hm,\n well", "Yes."),
        ("<|im_start|>assistant\n<think>\n", "hm\n</think>\n\nYes.", "hm", "Yes."),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "Yes.", "", "Yes."),
        ("", "Yes. <thin", "", "Yes. <thin"),
        ("", "<think>\nnever ends \n", "never ends", ""),
        ("", "  Two spaces.", "", "  Two spaces."),
        # What users wrote is no beginning of the answer.
        ("<think>", "Yes.", "", "Yes."),
        ("<|im_start|>assistant\n<think><|im_end|>\n<|im_start|>assistant\n", "Yes.", "", "Yes."),
    ],
)
def test_reasoning(
    prompt: str, text: str, reasoning: str, content: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    form = style(tokenizer, "hermes")
    for reader in (form.plain, form.reader):
        for pieces in ([text], list(text)):
            message, stages = read(MessageParser(reader, prompt, TOOLS), pieces)
            assert (message.reasoning, message.content) == (reasoning, content)
            assert all(content.startswith(stage) for stage in stages)


def test_reasoning_and_a_call(tokenizer: PreTrainedTokenizerFast) -> None:
    text = (
        '<think>\nthe clock\n</think>\n\n<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    )
    message, _ = read(parser(style(tokenizer, "hermes")), list(text))
    assert (message.reasoning, message.content, calls(message)) == ("the clock", "", [NOW])


def test_whitespace_behind_what_is_no_call_stays(tokenizer: PreTrainedTokenizerFast) -> None:
    """Once something was said, the whitespace that follows was said, too."""
    text = "<think>a</think>\n\n<tool_call>bad</tool_call>"
    message, _ = read(parser(style(tokenizer, "hermes")), [text, "\n\n", "  rest"])
    assert message.content == "<tool_call>bad</tool_call>\n\n  rest"
    assert (message.reasoning, message.calls) == ("a", ())


PROMPTED = "{% if add_generation_prompt %}ANSWER{% endif %}"


@pytest.mark.parametrize(
    "template",
    [
        "<|{{ m.role }}|>{{ m.content }}<|end|>\n" + PROMPTED,
        "[INST] {{ m.content }} [/INST]ANSWER",
        "{{ m.content }}</s>ANSWER",
        "{{ m.content }} ASSISTANT:{% if add_generation_prompt %}<think>\n{% endif %}",
        "{{ m.content }}{% if add_generation_prompt %}</s>ANSWER{% else %}<eos>{% endif %}",
    ],
)
def test_reasoning_that_any_template_begins(
    template: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Where answers begin is learned from the template, whatever it writes there."""
    own = copy.deepcopy(tokenizer)
    answer = "<|start|>assistant to=user\n<think>\n"
    own.chat_template = template.replace("ANSWER", answer).replace("m.", "messages[-1].")
    asked = [{"role": "user", "content": "What does <think> mean?"}]
    prompt = own.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert prompt.rstrip().endswith("<think>")
    machine = MessageParser(ChatFormat(own).plain, prompt)
    assert machine.reasoning
    message, _ = read(machine, ["hm\n</think>\n\n", "Yes."])
    assert (message.reasoning, message.content) == ("hm", "Yes.")
    quiet = MessageParser(ChatFormat(own).plain, prompt + "\n</think>\n\n")
    assert not quiet.reasoning


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1].content }}{# <think> #}",
        "{{ raise_exception('no') }}{# <think> #}",
    ],
)
def test_a_template_that_begins_no_answer(
    template: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    """What a user wrote is none of it, then."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    form = ChatFormat(own)
    assert form.reasoning is not None
    assert not MessageParser(form.plain, "What does <think> mean?").reasoning


# --- where formats come from ----------------------------------------------------------------------


def test_a_tokenizers_own_template_comes_first(tokenizer: PreTrainedTokenizerFast) -> None:
    """Its parser reads; what is written is a known format's, if it reads that."""
    own = tool_tokenizer(tokenizer, "hermes")
    field = copy.deepcopy(dict(TOOL_FORMATS["hermes"].field))
    own.response_template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "thinking": {"open": "<hm>", "close": "</hm>"},
            "tool_calls": field,
            "content": {"close": "<|im_end|>"},
        },
    }
    form = ChatFormat(own)
    assert form.tools is not None
    assert form.tools.writing == TOOL_FORMATS["hermes"].writing
    text = '<hm>so</hm>Hi <tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    message, _ = read(parser(form), list(text))
    assert (message.reasoning, message.content, calls(message)) == ("so", "Hi", [NOW])
    field |= {"open_pattern": "<call>", "close": "</call>"}
    other = ChatFormat(own)
    assert other.tools is not None
    assert other.tools.writing is None, "it does not read what a known format writes"
    message, _ = read(parser(other), ['<call>{"name": "clock", "arguments": {}}</call>'])
    assert calls(message) == [NOW]


def test_a_broken_template_is_known_at_the_start(tokenizer: PreTrainedTokenizerFast) -> None:
    own = tool_tokenizer(tokenizer, "hermes")
    for field in ({"open_pattern": "("}, {"open": ""}, {"open": 5}):
        own.response_template = {"start_anchor": "a", "fields": {"tool_calls": field}}
        with pytest.raises(QuantkitError, match="response_template"):
            ChatFormat(own)
        assert ChatFormat(own, "hermes", "think").tools is TOOL_FORMATS["hermes"]
    for template in (
        "x",
        [1],
        {"fields": None},
        {"fields": {"tool_calls": "x"}},
        {"fields": {"thinking": {"open": 5, "close": "a"}}},
        {"fields": {"thinking": {"open": [], "close": "b"}}},
        {"fields": {"tool_calls": {"open": "a", "content_args": 3}}},
    ):
        own.response_template = template
        with pytest.raises(QuantkitError, match="response_template"):
            ChatFormat(own)


def test_a_parser_can_be_named(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = ChatFormat(tokenizer)
    assert (plain.tools, plain.reasoning, plain.takes_tools) == (None, None, False)
    named = ChatFormat(tokenizer, "hermes", "think")
    assert named.tools is TOOL_FORMATS["hermes"]
    assert named.tags == ("<think>", "</think>")
    off = ChatFormat(tool_tokenizer(tokenizer, "hermes"), "none", "none")
    assert (off.tools, off.reasoning) == (None, None)
    for options in (("klingon", "auto"), ("auto", "klingon")):
        with pytest.raises(UsageError, match="'klingon' is not known"):
            ChatFormat(tokenizer, *options)


def test_special_tokens_are_seen_where_a_format_needs_them(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    special = tool_tokenizer(tokenizer, "mistral_args", special=True)
    form = ChatFormat(special)
    shown = set(special.convert_tokens_to_ids(["[TOOL_CALLS]", "[ARGS]"]))
    assert form.plain.hidden_ids is None, "without tools, nothing special is shown"
    assert form.reader.hidden_ids is not None
    assert form.reader.hidden_ids.isdisjoint(shown)
    assert special.eos_token_id in form.reader.hidden_ids


def test_templates_cover_the_table() -> None:
    assert set(TEMPLATES) == set(SAID) == set(TOOL_FORMATS)
