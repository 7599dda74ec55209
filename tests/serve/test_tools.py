"""Tool calls and reasoning in chat, with the openai client.

Where an answer's words matter, the model is made to say them (`say`); where they must not, it is
random and the grammar alone makes it right.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pydantic
import pytest
from serve_helpers import Live, serving
from tool_helpers import CALL, CLOCK, HELLO, MODEL, NAMED, NOW, OSLO, WEATHER, tool_tokenizer

from quantkit.models.runtime import Runtime
from quantkit.serve.capture import Capture, CaptureConfig

CHAT = "/v1/chat/completions"


def streamed(chunks: openai.Stream) -> tuple[dict[str, Any], str | None, list[Any]]:
    """What a client puts together, why it ended, and its pieces of content."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    reason, pieces = None, []
    for chunk in chunks:
        for choice in chunk.choices:
            delta = choice.delta
            reason = choice.finish_reason or reason
            message["content"] += delta.content or ""
            pieces.append(delta.content)
            message["reasoning_content"] += getattr(delta, "reasoning_content", None) or ""
            for call in delta.tool_calls or ():
                assert call.index == len(message["tool_calls"])
                message["tool_calls"].append((call.id, call.function.name, call.function.arguments))
    return message, reason, pieces


def test_a_call_and_its_result(ask: openai.OpenAI, say) -> None:
    """The whole round: a call, its result in the history, an answer."""
    say(f"Let me see.\n{CALL}", "Rain.")
    first = ask.chat.completions.create(messages=HELLO, tools=[WEATHER, CLOCK], **MODEL)
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == json.loads(OSLO)
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    history = [*HELLO, choice.message, result]
    second = ask.chat.completions.create(messages=history, tools=[WEATHER, CLOCK], **MODEL)
    assert second.choices[0].message.content == "Rain."
    assert second.choices[0].message.tool_calls is None
    assert second.choices[0].finish_reason == "stop"
    assert second.usage.prompt_tokens > first.usage.prompt_tokens + 5


def test_the_model_reads_tools_and_calls_as_its_template_writes_them(
    ask: openai.OpenAI, tools_server: Live, tool_runtime: Runtime, send
) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    read = [
        messages[0],
        messages[1]
        | {"content": "", "tool_calls": [call | {"function": {"name": "clock", "arguments": {}}}]},
        messages[2],
    ]
    ids = tool_runtime.tokenizer.apply_chat_template(
        read, tools=[CLOCK], add_generation_prompt=True, return_dict=False
    )
    asked = {"messages": messages, "tools": [CLOCK]}
    answer = httpx.post(tools_server.url + "/tokenize", json=asked, timeout=120).json()
    assert answer["tokens"] == ids
    assert send(CHAT, **asked).json()["usage"]["prompt_tokens"] == len(ids)
    text = tool_runtime.tokenizer.decode(ids)
    assert "<tool_call>\n" in text
    assert "The weather" not in text


def test_streaming(ask: openai.OpenAI, say) -> None:
    text = f"<think>\nwhich city\n</think>\n\nLet me see.\n{CALL}\n{NOW}"
    say(text, text)
    whole = ask.chat.completions.create(messages=HELLO, tools=[WEATHER, CLOCK], **MODEL).choices[0]
    message, reason, pieces = streamed(
        ask.chat.completions.create(messages=HELLO, tools=[WEATHER, CLOCK], stream=True, **MODEL)
    )
    assert reason == whole.finish_reason == "tool_calls"
    assert message["content"] == whole.message.content == "Let me see."
    assert message["reasoning_content"] == whole.message.reasoning_content == "which city"
    assert len([piece for piece in pieces if piece]) > 2, "text comes as it is said"
    said = [(name, json.loads(arguments)) for _, name, arguments in message["tool_calls"]]
    assert said == [("get_weather", json.loads(OSLO)), ("clock", {})]
    ids = [call[0] for call in message["tool_calls"]]
    ids += [call.id for call in whole.message.tool_calls]
    assert len(set(ids)) == 4


def test_the_clients_own_accumulator_understands_the_stream(ask: openai.OpenAI, say) -> None:
    say(f"Hm. {CALL}{NOW}")
    with ask.chat.completions.stream(messages=HELLO, tools=[WEATHER, CLOCK], **MODEL) as stream:
        final = stream.get_final_completion()
    assert [call.function.name for call in final.choices[0].message.tool_calls] == [
        "get_weather",
        "clock",
    ]
    assert final.choices[0].finish_reason == "tool_calls"


def test_what_is_no_call_is_text(ask: openai.OpenAI, say) -> None:
    for text in (
        '<tool_call>\n{"name": "get_weather", "arguments": "{}"\n</tool_call>',
        '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
        "<tool_call>\n",
    ):
        say(text, text)
        for stream in (False, True):
            answer = ask.chat.completions.create(
                messages=HELLO, tools=[WEATHER], stream=stream, **MODEL
            )
            if stream:
                message, reason, _ = streamed(answer)
                assert (message["content"], message["tool_calls"], reason) == (text, [], "stop")
            else:
                assert answer.choices[0].message.content == text
                assert answer.choices[0].message.tool_calls is None
                assert answer.choices[0].finish_reason == "stop"


def test_without_an_offer_nothing_is_a_call(ask: openai.OpenAI, say) -> None:
    """``none`` keeps the tools from the model as well."""
    say(CALL, CALL)
    plain = ask.chat.completions.create(messages=HELLO, **MODEL)
    assert plain.choices[0].message.content == CALL
    none = ask.chat.completions.create(messages=HELLO, tools=[WEATHER], tool_choice="none", **MODEL)
    assert none.choices[0].message.content == CALL
    assert none.choices[0].finish_reason == "stop"
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_model_that_knows_nothing_calls_if_it_has_to(
    ask: openai.OpenAI, choice: Any, stream: bool
) -> None:
    for seed in range(3):
        answer = ask.chat.completions.create(
            messages=HELLO,
            tools=[WEATHER, CLOCK],
            tool_choice=choice,
            parallel_tool_calls=False,
            seed=seed,
            stream=stream,
            **MODEL,
        )
        if stream:
            message, reason, _ = streamed(answer)
            [(_, name, arguments)] = message["tool_calls"]
            assert not message["content"]
        else:
            reason = answer.choices[0].finish_reason
            [call] = answer.choices[0].message.tool_calls
            name, arguments = call.function.name, call.function.arguments
            assert answer.choices[0].message.content is None
        assert reason == "tool_calls"
        assert name == "get_weather" or choice != NAMED
        if name == "get_weather":
            jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])


def test_strict_functions_are_held_to_their_schema(
    ask: openai.OpenAI, tool_runtime: Runtime
) -> None:
    """Under ``auto`` a model that wants to call must do it right."""
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    tag = tool_runtime.tokenizer.convert_tokens_to_ids("<tool_call>")
    for seed in range(3):
        answer = ask.chat.completions.create(
            messages=HELLO,
            tools=[strict],
            parallel_tool_calls=False,
            logit_bias={str(tag): 100},
            seed=seed,
            **MODEL,
        )
        [call] = answer.choices[0].message.tool_calls
        jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])


def test_logprobs_cover_every_token(ask: openai.OpenAI, say, tool_runtime: Runtime) -> None:
    text = f"<think>a</think>b {CALL}"
    say(text, text)
    options = {"tools": [WEATHER], "logprobs": True, "top_logprobs": 2} | MODEL
    whole = ask.chat.completions.create(messages=HELLO, **options)
    count = len(tool_runtime.tokenizer.encode(text)) + 1
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens == count
    chunks = ask.chat.completions.create(messages=HELLO, stream=True, **options)
    seen = [
        item
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for item in choice.logprobs.content
    ]
    assert len(seen) == count


def test_several_answers_and_usage(ask: openai.OpenAI) -> None:
    options = {
        "tools": [CLOCK],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "n": 2,
        "seed": 3,
    } | MODEL
    whole = ask.chat.completions.create(messages=HELLO, **options)
    assert [choice.finish_reason for choice in whole.choices] == ["tool_calls"] * 2
    chunks = list(
        ask.chat.completions.create(
            messages=HELLO, stream=True, stream_options={"include_usage": True}, **options
        )
    )
    assert chunks[-1].usage == whole.usage
    reasons = {c.index: c.finish_reason for chunk in chunks for c in chunk.choices}
    assert reasons == {0: "tool_calls", 1: "tool_calls"}


def test_an_answer_that_is_cut_off_is_no_call(ask: openai.OpenAI) -> None:
    answer = ask.chat.completions.create(
        messages=HELLO, tools=[WEATHER], tool_choice="required", max_tokens=3, **MODEL
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content.startswith("<tool_call>")


class Route(pydantic.BaseModel):
    to: Literal["billing", "returns"]
    urgent: bool


class Clock(pydantic.BaseModel):
    """What time it is."""

    zone: Literal["utc", "local"]


def test_the_clients_parse_helpers(ask: openai.OpenAI) -> None:
    """``response_format`` from a pydantic model, and strict tools made from one."""
    parsed = ask.chat.completions.parse(messages=HELLO, response_format=Route, **MODEL)
    assert isinstance(parsed.choices[0].message.parsed, Route)
    called = ask.chat.completions.parse(
        messages=HELLO,
        tools=[openai.pydantic_function_tool(Clock)],
        tool_choice="required",
        parallel_tool_calls=False,
        **MODEL,
    )
    [call] = called.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Clock)
    answer = ask.responses.parse(input="hi", text_format=Route, **MODEL)
    assert isinstance(answer.output_parsed, Route)


def test_answers_with_tools_are_not_captured(tool_runtime: Runtime, tmp_path) -> None:
    """Messages alone do not tell what the model read."""
    capture = Capture(CaptureConfig(tmp_path / "traffic.jsonl", rate=1.0))
    with serving(tool_runtime, capture=capture) as live:
        thought = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
        for body in ({"tools": [CLOCK]}, {"messages": [*HELLO, thought, *HELLO]}, {}):
            given = {"messages": HELLO, "max_tokens": 2, "temperature": 0} | body
            assert httpx.post(live.url + CHAT, json=given, timeout=120).status_code == 200
    capture.close()
    assert len((tmp_path / "traffic.jsonl").read_text().splitlines()) == 1


def test_a_form_begins_behind_reasoning_that_the_prompt_began(tool_runtime: Runtime) -> None:
    """As with DeepSeek-R1: without that, the whole answer would be read as reasoning."""
    tokenizer = tool_tokenizer(tool_runtime.tokenizer, tokens=False)
    header = "<|im_start|>assistant\n"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        header + "{% endif %}", header + "<think>\n{% endif %}"
    )
    assert tokenizer.chat_template.endswith("<think>\n{% endif %}")
    end = tokenizer.convert_tokens_to_ids("</think>")
    with serving(replace(tool_runtime, tokenizer=tokenizer)) as live:
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="-", max_retries=0)
        options = {"logit_bias": {str(end): 100}} | MODEL
        called = client.chat.completions.create(
            messages=HELLO,
            tools=[CLOCK],
            tool_choice="required",
            parallel_tool_calls=False,
            **options,
        ).choices[0]
        assert called.message.tool_calls[0].function.name == "clock"
        formed = client.chat.completions.create(
            messages=HELLO,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"enum": [1, 2]}},
            },
            **options,
        ).choices[0]
        assert formed.message.content in ("1", "2")
