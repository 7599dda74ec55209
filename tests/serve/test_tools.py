"""Tool calls and reasoning over HTTP, with the openai client.

Where an answer's words matter, the model is made to say them (`say`); where they must not, it is
random and the grammar alone makes it right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pydantic
import pytest
from serve_helpers import Live, serving
from tool_helpers import CLOCK, WEATHER, scripted, tool_tokenizer

from quantkit.models.runtime import Runtime
from quantkit.serve import sampler
from quantkit.serve.capture import Capture, CaptureConfig
from quantkit.serve.engine import EngineConfig

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "how are you?"}]
MODEL = {"model": "tiny"}
OSLO = '{"city": "Oslo", "days": 3}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {OSLO}}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
FLAT = [{"type": "function", "strict": None} | tool["function"] for tool in (WEATHER, CLOCK)]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def tools_server(tool_runtime: Runtime) -> Iterator[Live]:
    with serving(tool_runtime, EngineConfig(max_sequences=4)) as live:
        yield live


@pytest.fixture
def ask(tools_server: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{tools_server.url}/v1", api_key="-", max_retries=0)


@pytest.fixture
def send(tools_server: Live) -> Callable[..., httpx.Response]:
    def post(path: str, **body: object) -> httpx.Response:
        given = {"max_tokens": 4} if path == CHAT else {"max_output_tokens": 4}
        return httpx.post(tools_server.url + path, json=given | body, timeout=120)

    return post


@pytest.fixture
def say(tool_runtime: Runtime, monkeypatch) -> Callable[..., None]:
    """Makes the model say these texts, one request after the other."""

    def set_script(*texts: str) -> None:
        monkeypatch.setattr(sampler, "sample", scripted(tool_runtime.tokenizer, *texts))

    return set_script


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


# --- chat -----------------------------------------------------------------------------------------


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


# --- reasoning that the prompt begins -------------------------------------------------------------


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


# --- the Responses API ----------------------------------------------------------------------------


def test_responses_call_functions(ask: openai.OpenAI, say) -> None:
    text = f"<think>\nhm\n</think>\n\nLet me see.\n{CALL}\n{NOW}"
    say(text, "Rain.")
    first = ask.responses.create(input="weather?", tools=FLAT, **MODEL)
    kinds = [item.type for item in first.output]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    assert first.output[0].content[0].text == "hm"
    assert first.output_text == "Let me see."
    call = first.output[2]
    assert (call.name, json.loads(call.arguments)) == ("get_weather", json.loads(OSLO))
    assert first.usage.output_tokens_details.reasoning_tokens > 0
    assert (first.tool_choice, first.parallel_tool_calls) == ("auto", True)
    assert [tool.name for tool in first.tools] == ["get_weather", "clock"]
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "rain"}
        for item in first.output[2:]
    ]
    second = ask.responses.create(
        input=[{"role": "user", "content": "weather?"}, *first.output, *results],
        tools=FLAT,
        **MODEL,
    )
    assert second.output_text == "Rain."
    assert second.usage.input_tokens > first.usage.input_tokens + 10


def test_responses_as_events(ask: openai.OpenAI, say) -> None:
    text = f"<think>\nhm\n</think>\n\nLet me see.\n{CALL}"
    say(text)
    events = list(ask.responses.create(input="weather?", tools=FLAT, stream=True, **MODEL))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    order = [kind for i, kind in enumerate(kinds) if kind != kinds[i - 1]]
    part = ["output_item.added", "content_part.added"]
    assert order == [
        *("created", "in_progress"),
        *(*part, "reasoning_text.delta", "reasoning_text.done"),
        *("content_part.done", "output_item.done"),
        *(*part, "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done"),
        *("output_item.done", "completed"),
    ]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == events[-1].response.output
    for event in events:
        place = getattr(event, "output_index", None)
        if place is not None and hasattr(event, "item_id"):
            assert event.item_id == done[place].id


def test_the_clients_own_response_stream(ask: openai.OpenAI, say) -> None:
    say(f"Let me see.\n{CALL}")
    with ask.responses.stream(input="weather?", tools=FLAT, **MODEL) as stream:
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["message", "function_call"]
    assert json.loads(final.output[1].arguments) == json.loads(OSLO)


def test_responses_can_require_a_call(ask: openai.OpenAI) -> None:
    answer = ask.responses.create(
        input="hi",
        tools=FLAT,
        tool_choice={"type": "function", "name": "clock"},
        **MODEL,
    )
    assert [item.name for item in answer.output] == ["clock"]
    assert answer.tool_choice.name == "clock"


# --- refused --------------------------------------------------------------------------------------


def call_of(arguments: str, **fields: object) -> dict:
    function = {"name": "clock", "arguments": arguments}
    return {"id": "call_1", "type": "function", "function": function} | fields


BAD = [
    ({"tools": [CLOCK, CLOCK]}, "tools", "same name"),
    ({"tools": [{"type": "web_search"}]}, "tools", "function"),
    ({"tools": [CLOCK] * 129}, "tools", "128"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"tool_choice": NAMED, "tools": [CLOCK]}, "tool_choice", "not one of the tools"),
    ({"tool_choice": "any", "tools": [CLOCK]}, "tool_choice", ""),
    ({"tool_choice": {"type": "allowed_tools"}, "tools": [CLOCK]}, "tool_choice", ""),
    ({"tools": [CLOCK], "response_format": {"type": "json_object"}}, "tools", "ask for one"),
    ({"functions": [{"name": "f"}]}, None, "not supported"),
    ({"function_call": "auto"}, None, "not supported"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls", ""),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, None, "not supported"),
    ({"messages": [*HELLO, {"role": "tool", "content": "a"}]}, "messages", "go together"),
    (
        {"messages": [*HELLO, {"role": "tool", "tool_call_id": "x", "content": "a"}]},
        "messages",
        "no call before it",
    ),
    (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [call_of("{}")]}]},
        "messages",
        "only an assistant",
    ),
    *(
        ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [bad]}]}, "messages", why)
        for bad, why in (
            (call_of("[]"), "not a JSON object"),
            (call_of("{"), ""),
            (call_of('{"a":' * 40 + "1" + "}" * 40), "nested deeper"),
            (call_of('{"a":' * 50_000), "nested too deeply"),
            (call_of("{}", id=""), ""),
            (call_of("{}", type="custom"), ""),
            (call_of("{}", function={"name": "a b", "arguments": "{}"}), ""),
        )
    ),
]


@pytest.mark.parametrize(("body", "param", "why"), BAD)
def test_bad_requests(send, body: dict, param: str | None, why: str) -> None:
    response = send(CHAT, **{"messages": HELLO} | body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"].split(".")[0] == param, error
    assert why in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"input": [{"type": "function_call_output", "call_id": "x", "output": "a"}]},
        {"input": [{"type": "computer_call"}]},
        {"input": [{"type": "function_call", "call_id": "x", "name": "f", "arguments": "["}]},
        {"input": "a", "tools": [{"type": "web_search"}]},
        {"input": "a", "tools": FLAT, "tool_choice": {"type": "function", "name": "other"}},
        {"input": "a", "reasoning": {"effort": "high"}},
    ],
)
def test_bad_responses(send, body: dict) -> None:
    response = send(RESPONSES, **body)
    assert response.status_code == 400, response.text


def test_a_model_that_was_not_made_for_tools(live, post) -> None:
    """Its template would drop them without a word."""
    live()
    for body, why in (
        ({"messages": HELLO, "tools": [CLOCK]}, "chat template does not show them"),
        (
            {"messages": [*HELLO, {"role": "assistant", "tool_calls": [call_of("{}")]}]},
            "does not show it calls",
        ),
    ):
        for path in (CHAT, "/tokenize"):
            response = post(path, body)
            assert response.status_code == 400
            assert why in response.json()["error"]["message"]


def test_a_format_that_cannot_be_enforced_says_so(tool_runtime: Runtime) -> None:
    tokenizer = tool_tokenizer(tool_runtime.tokenizer, "qwen3_coder", tokens=False)
    with serving(replace(tool_runtime, tokenizer=tokenizer)) as live:

        def status(**body: object) -> int:
            given = {"messages": HELLO, "tools": [CLOCK], "max_tokens": 4} | body
            return httpx.post(live.url + CHAT, json=given, timeout=120).status_code

        assert status() == 200
        assert status(tool_choice="required") == 400
        assert status(parallel_tool_calls=False) == 400
        assert status(tool_choice="none") == 200


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
