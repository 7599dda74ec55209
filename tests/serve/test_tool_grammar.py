"""Grammars of calls: what they let through is read as the call it is, in every format."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from tool_helpers import CLOCK, WEATHER, tool_tokenizer
from transformers import PreTrainedTokenizerFast

from quantkit.serve.api.chat_format import ChatFormat
from quantkit.serve.api.message_parser import Message, MessageParser
from quantkit.serve.api.tools import Function, offered
from quantkit.serve.chat_formats import TOOL_FORMATS
from quantkit.serve.request import RequestError, StructuredOutputs
from quantkit.serve.structured import GrammarCompiler

WRITTEN = [name for name, row in TOOL_FORMATS.items() if row.writing is not None]
FUNCTIONS = [Function(**tool["function"]) for tool in (WEATHER, CLOCK)]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (WEATHER, CLOCK)}


class Speaker:
    """Says what a form allows, at random."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, form: StructuredOutputs) -> None:
        self.tokenizer = tokenizer
        self.matcher = GrammarCompiler(tokenizer, len(tokenizer)).compile(form).matcher

    def allows(self, text: str) -> bool:
        """All of this, and then the end."""
        walk = self.matcher.deep_copy()
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return walk.try_consume_tokens(ids) == len(ids) and walk.is_accepting()

    def say(self, seed: int, limit: int = 2000) -> str:
        rng, walk, said = random.Random(seed), self.matcher.deep_copy(), []
        while len(said) < limit and not (walk.is_accepting() and rng.random() < 0.7):
            if walk.is_stopped():
                break
            mask = walk.compute_bitmask()
            ids = [
                i
                for i in range(len(self.tokenizer))
                if mask[i // 8] >> (i % 8) & 1 and i != self.tokenizer.eos_token_id
            ]
            if not ids:
                break
            said.append(rng.choice(ids))
            assert walk.consume_token(said[-1])
        assert walk.is_accepting(), self.tokenizer.decode(said)
        return str(self.tokenizer.decode(said))


def forms(name: str, tokenizer: PreTrainedTokenizerFast, choice: str, **options: object):
    style = ChatFormat(tokenizer)
    assert style.tools is TOOL_FORMATS[name]
    tools = offered(FUNCTIONS, choice, parallel=options.get("parallel"))  # type: ignore[arg-type]
    assert tools is not None
    form = tools.form(style.tools, style.tags)
    assert form is not None
    return style, form


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "letters"])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_required_call_is_one_whatever_the_model_says(
    name: str, tokens: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    own = tool_tokenizer(tokenizer, name, tokens=tokens)
    style, form = forms(name, own, "required")
    speaker = Speaker(own, form)
    called = set()
    for seed in range(8):
        text = speaker.say(seed)
        message = Message()
        machine = MessageParser(style.reader, "", [WEATHER, CLOCK])
        message.add(machine.push(text))
        message.add(machine.finish("stop"))
        assert message.calls, text
        assert not message.content, text
        for call in message.calls:
            called.add(call.name)
            if call.name == "get_weather":
                jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    assert called == set(SCHEMAS)
    assert not speaker.allows("It is noon.")


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "letters"])
@pytest.mark.parametrize("name", WRITTEN)
def test_auto_leaves_text_free_and_holds_calls_to_their_schema(
    name: str, tokens: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    own = tool_tokenizer(tokenizer, name, tokens=tokens)
    _, form = forms(name, own, "auto")
    speaker = Speaker(own, form)
    way = TOOL_FORMATS[name].writing
    assert way is not None

    def call(arguments: dict, function: str = "get_weather") -> str:
        before = (way.begin + way.before).replace("{name}", function)
        return before + json.dumps(arguments) + way.after + way.end

    good = call({"city": "Rome", "days": 2})
    assert speaker.allows("It is noon. {}")
    assert speaker.allows(good)
    assert not speaker.allows(call({"city": "Paris", "days": 2}))
    assert not speaker.allows(call({"city": "Rome"}))
    assert not speaker.allows(call({}, "rm_rf"))
    if way.trigger:
        assert speaker.allows("Let me see.\n" + good)
        assert not speaker.allows("Let me see.\n" + call({}, "rm_rf"))


def test_one_call_or_several(tokenizer: PreTrainedTokenizerFast) -> None:
    own = tool_tokenizer(tokenizer)
    call = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    for parallel in (True, False):
        for choice in ("auto", "required"):
            speaker = Speaker(own, forms("hermes", own, choice, parallel=parallel)[1])
            assert speaker.allows(call)
            assert speaker.allows(f"{call}\n{call}") == parallel


def test_reasoning_that_the_prompt_began_comes_first(tokenizer: PreTrainedTokenizerFast) -> None:
    """Any form begins behind it: calls, a schema, a regular expression, a grammar."""
    for tokens in (True, False):
        own = tool_tokenizer(tokenizer, tokens=tokens)
        call = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
        for form, text in (
            (forms("hermes", own, "required")[1], call),
            (StructuredOutputs(json='{"enum": [1]}'), "1"),
            (StructuredOutputs(regex="a+"), "aa"),
            (StructuredOutputs(grammar='start: "b"'), "b"),
        ):
            speaker = Speaker(own, replace(form, reasoning_end="</think>"))
            assert speaker.allows(f"so it is\n</think>\n\n{text}")
            assert not speaker.allows(text)
            assert not speaker.allows("so it is\n</think>\n\nwell")
            assert Speaker(own, form).allows(text)


def test_free_text_may_hold_reasoning(tokenizer: PreTrainedTokenizerFast) -> None:
    own = tool_tokenizer(tokenizer)
    speaker = Speaker(own, forms("hermes", own, "auto")[1])
    call = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    assert speaker.allows(f"<think>\nso\n</think>\n\n{call}")


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"properties": {"a": {"type": "string", "pattern": "("}}}, "unclosed group"),
        ({"properties": {"a": {"type": "nonsense"}}}, "nonsense"),
        ({"properties": {"a": {"type": 7}}}, "type must be"),
        ({"properties": ["a"]}, "properties must be an object"),
        ({"properties": {"a": {"$ref": "https://example.com/a.json"}}}, "example.com"),
        ({"properties": {"a": {"$ref": "#/$defs/missing"}}}, "does not exist"),
        ({"$ref": "#"}, ""),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "Too many items"),
        ({"properties": {f"p{i}": {"type": "string"} for i in range(1200)}}, "max is 2000"),
    ],
)
def test_schemas_that_are_refused(
    schema: dict, reason: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    """With the function's name, before anything is generated, strict or not."""
    compiler = GrammarCompiler(tokenizer, len(tokenizer))
    for strict in (False, True):
        good = Function(name="good", parameters={"type": "object"})
        bad = Function(name="bad", parameters={"type": "object"} | schema, strict=strict)
        tools = offered([good, bad], "auto", parallel=None)
        assert tools is not None
        with pytest.raises(RequestError, match="tools: bad: ") as caught:
            compiler.compile(tools.schemas)
        assert caught.value.param == "tools"
        assert reason in str(caught.value)
        assert not re.search("<state>|failed to compile|x-guidance", str(caught.value))


@pytest.mark.parametrize("bad", ["\ud800", float("nan"), float("inf")])
@pytest.mark.parametrize("choice", ["auto", "none"])
def test_schemas_that_are_no_json_are_refused(choice: Any, bad: object) -> None:
    """Where nothing may be called, too: `/v1/responses` says its tools back."""
    tool = Function(name="bad", parameters={"properties": {"a": {"default": bad}}})
    with pytest.raises(RequestError, match="tools: bad: parameters: nested too deeply, or") as why:
        offered([tool], choice, parallel=None)
    assert why.value.param == "tools"


def test_keywords_beyond_the_grammar_are_errors_only_where_strict(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    compiler = GrammarCompiler(tokenizer, len(tokenizer))
    schema = {"type": "object", "not": {"required": ["a"]}, "x-guidance": {"lenient": True}}
    for strict in (False, True):
        tools = offered([Function(name="f", parameters=schema, strict=strict)], None, parallel=None)
        assert tools is not None
        assert tools.enforced == strict
        if strict:
            with pytest.raises(RequestError, match="Unimplemented keys"):
                compiler.compile(tools.schemas)
        else:
            compiler.compile(tools.schemas)


def test_a_linked_list_is_no_endless_schema(tokenizer: PreTrainedTokenizerFast) -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}
    schema = node | {"$defs": {"node": node}}
    tools = offered([Function(name="f", parameters=schema, strict=True)], "required", parallel=None)
    assert tools is not None
    GrammarCompiler(tokenizer, len(tokenizer)).compile(tools.schemas)
