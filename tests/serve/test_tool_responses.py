"""Tool calls and reasoning in the Responses API, with the openai client."""

from __future__ import annotations

import json

import openai
from tool_helpers import CALL, FLAT, MODEL, NOW, OSLO


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
