"""Fields of other servers that would change the answer: refused, never ignored."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from quantkit.serve.api.response_schemas import ResponsesRequest
from quantkit.serve.api.schemas import ChatRequest, CompletionRequest, GenerationRequest

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
}


@pytest.mark.parametrize(("kind", "body"), BODIES)
@pytest.mark.parametrize("name", ASKED)
def test_what_would_change_the_answer_is_refused(
    kind: type[GenerationRequest], body: dict, name: str
) -> None:
    with pytest.raises(ValidationError, match=f"'{name}' is not supported by this server"):
        kind.model_validate(body | {name: ASKED[name]})


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_responses_have_another_name_for_their_length(name: str) -> None:
    with pytest.raises(ValidationError, match=f"'{name}' is not supported by this server"):
        ResponsesRequest.model_validate({"input": "a", name: 5})


@pytest.mark.parametrize(("kind", "body"), BODIES)
def test_values_that_mean_off_are_taken(kind: type[GenerationRequest], body: dict) -> None:
    off = {name: value for name, values in kind.unsupported.items() for value in values[-1:]}
    kind.model_validate(body | off)
    kind.model_validate(body | dict.fromkeys(kind.unsupported))
