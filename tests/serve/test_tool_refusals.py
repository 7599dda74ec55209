"""Requests with tools that are refused: what is malformed, and what the model cannot do."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest
from serve_helpers import serving
from tool_helpers import CLOCK, FLAT, HELLO, NAMED, tool_tokenizer

from quantkit.models.runtime import Runtime

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"


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
