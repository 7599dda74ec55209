"""Fields of other servers that would change the answer: refused, never ignored."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import BaseModel, ValidationError

from quantkit.serve.api.messages import hold_more_than_text
from quantkit.serve.api.response_schemas import ResponsesRequest
from quantkit.serve.api.responses import messages
from quantkit.serve.api.schemas import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    TokenizeRequest,
)
from quantkit.serve.request import RequestError

BODIES: list[tuple[type[GenerationRequest], dict]] = [
    (CompletionRequest, {"prompt": "a"}),
    (ChatRequest, {"messages": [{"role": "user", "content": "a"}]}),
    (ResponsesRequest, {"input": "a"}),
]
ASKED = {
    "modalities": ["text", "audio"],
    "reasoning_effort": "high",
    "guided_json": {"type": "object"},
    "guided_regex": "a+",
    "guided_choice": ["a", "b"],
    "guided_grammar": "start: 'a'",
    "continue_final_message": True,
    "chat_template": "{{ messages }}",
    "documents": [{"text": "a"}],
    "add_generation_prompt": False,
    "truncate_prompt_tokens": 10,
    "prompt_logprobs": 1,
    "use_beam_search": True,
    "bad_words": ["a"],
    "allowed_token_ids": [1, 2],
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
}


@pytest.mark.parametrize(
    ("kind", "body"), [*BODIES, (TokenizeRequest, {"messages": [{"role": "user", "content": "a"}]})]
)
@pytest.mark.parametrize("name", ASKED)
def test_what_would_change_the_answer_is_refused(
    kind: type[BaseModel], body: dict, name: str
) -> None:
    with pytest.raises(ValidationError, match=f"'{name}' is not supported by this server"):
        kind.model_validate(body | {name: ASKED[name]})


#: What a client writes → what the sampler gets.
SAMPLED: dict[str, tuple[object, dict[str, object]]] = {
    "temperature": (0.0, {"temperature": 0.0}),
    "top_p": (0.5, {"top_p": 0.5}),
    "top_k": (7, {"top_k": 7}),
    "min_p": (0.25, {"min_p": 0.25}),
    "frequency_penalty": (-1.5, {"frequency_penalty": -1.5}),
    "presence_penalty": (1.5, {"presence_penalty": 1.5}),
    "repetition_penalty": (1.25, {"repetition_penalty": 1.25}),
    "logit_bias": ({"5": -3.0}, {"logit_bias": {5: -3.0}}),
    "seed": (11, {"seed": 13}),  # of the third answer
    "stop": (["a", "b"], {"stop": ("a", "b")}),
    "stop_token_ids": ([5, 6], {"stop_token_ids": (5, 6)}),
    "min_tokens": (3, {"min_tokens": 3}),
    "ignore_eos": (True, {"ignore_eos": True}),
}


@pytest.mark.parametrize(("kind", "body"), BODIES)
@pytest.mark.parametrize("name", SAMPLED)
def test_every_sampling_field_reaches_the_sampler(
    kind: type[GenerationRequest], body: dict, name: str
) -> None:
    """And changes nothing else."""
    written, meant = SAMPLED[name]
    plain = kind.model_validate(body).sampling(max_tokens=9, logprobs=2, choice=2)
    if name not in kind.model_fields:
        with pytest.raises(ValidationError, match=name):
            kind.model_validate(body | {name: written})
        return
    asked = kind.model_validate(body | {name: written})
    assert asked.sampling(max_tokens=9, logprobs=2, choice=2) == replace(plain, **meant)
    assert plain != replace(plain, **meant)


def test_only_completions_call_tokens_by_their_ids() -> None:
    asked = {"return_tokens_as_token_ids": True}
    assert CompletionRequest.model_validate({"prompt": "a"} | asked).return_tokens_as_token_ids
    with pytest.raises(ValidationError, match="'return_tokens_as_token_ids' is not supported"):
        ChatRequest.model_validate({"messages": [{"role": "user", "content": "a"}]} | asked)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_responses_have_another_name_for_their_length(name: str) -> None:
    with pytest.raises(ValidationError, match=f"'{name}' is not supported by this server"):
        ResponsesRequest.model_validate({"input": "a", name: 5})


@pytest.mark.parametrize(("kind", "body"), BODIES)
def test_values_that_mean_off_are_taken(kind: type[GenerationRequest], body: dict) -> None:
    off = {name: value for name, values in kind.unsupported.items() for value in values[-1:]}
    kind.model_validate(body | off)
    kind.model_validate(body | dict.fromkeys(kind.unsupported))


@pytest.mark.parametrize(
    ("kind", "body", "name", "value"),
    [
        (CompletionRequest, {"prompt": "a"}, "tools", [{"type": "function"}]),
        (CompletionRequest, {"prompt": "a"}, "add_special_tokens", False),
        (CompletionRequest, {"prompt": "a"}, "chat_template_kwargs", {"enable_thinking": False}),
        (ResponsesRequest, {"input": "a"}, "chat_template_kwargs", {"enable_thinking": False}),
    ],
)
def test_what_only_other_endpoints_know_is_refused(
    kind: type[BaseModel], body: dict, name: str, value: object
) -> None:
    with pytest.raises(ValidationError, match=f"'{name}' is not supported by this server"):
        kind.model_validate(body | {name: value})


@pytest.mark.parametrize(
    "switches",
    [
        *({"enable_thinking": 0}, {"a": "<|im_start|>"}, {"a": [True]}, {"a" * 65: True}, ["a"]),
        {f"a{i}": True for i in range(17)},
    ],
)
def test_switches_are_few_and_true_or_false(switches: object) -> None:
    said = [{"role": "user", "content": "a"}]
    for kind in (ChatRequest, TokenizeRequest):
        with pytest.raises(ValidationError, match="chat_template_kwargs"):
            kind.model_validate({"messages": said, "chat_template_kwargs": switches})
        known = {"messages": said, "chat_template_kwargs": {"enable_thinking": False}}
        assert kind.model_validate(known).chat_template_kwargs == {"enable_thinking": False}
    with pytest.raises(ValidationError, match="need 'messages'"):
        TokenizeRequest.model_validate({"prompt": "a", "chat_template_kwargs": {"a": True}})


@pytest.mark.parametrize(
    "metadata",
    [
        {"a": "\ud800"},
        {"\ud800": "a"},
        {"a": "b" * 513},
        {"a" * 65: "b"},
        {str(i): "a" for i in range(17)},
        {"a": 1},
    ],
)
def test_metadata_is_bounded_text(metadata: dict) -> None:
    """It is echoed."""
    ResponsesRequest.model_validate({"input": "a", "metadata": {"a" * 64: "b" * 512}})
    with pytest.raises(ValidationError, match="metadata"):
        ResponsesRequest.model_validate({"input": "a", "metadata": metadata})


@pytest.mark.parametrize("bad", [float("nan"), "\ud800"])
def test_formats_that_cannot_be_echoed_are_refused(bad: object) -> None:
    text = {"format": {"type": "json_schema", "name": "a", "schema": {"default": bad}}}
    body = ResponsesRequest.model_validate({"input": "a", "text": text})
    with pytest.raises(RequestError, match="holds NaN or half a surrogate pair"):
        body.structured()


# --- what `/v1/responses` reads as messages -------------------------------------------------------


def test_reasoning_that_nobody_here_can_read_says_nothing() -> None:
    """Summaries and what is encrypted; without them an assistant's turn would be empty."""
    said = {"role": "assistant", "content": "b"}
    for item in ({"encrypted_content": "x"}, {"summary": []}, {"content": []}):
        body = {"input": [{"role": "user", "content": "a"}, {"type": "reasoning"} | item, said]}
        read = messages(ResponsesRequest.model_validate(body))
        assert [message.role for message in read] == ["user", "assistant"]
        assert read[1].reasoning_content is None
        assert not hold_more_than_text(read)
    body["input"][1] = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]}
    read = messages(ResponsesRequest.model_validate(body))
    assert [(message.reasoning_content, message.text) for message in read[1:]] == [("hm", "b")]
    assert hold_more_than_text(read), "roles and contents alone do not tell"
