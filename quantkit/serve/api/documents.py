"""What the API answers, for /openapi.json. Tests hold every answer against it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, create_model


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorDocument(BaseModel):
    """Every status from 400 on."""

    error: Error


class PromptDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "cancelled"]
    #: With ``return_token_ids``.
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionDocument(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CalledFunctionDocument(BaseModel):
    name: str
    arguments: str


class ToolCallDocument(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunctionDocument


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDocument] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "cancelled", "tool_calls"]


class ChatDocument(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class OutputText(BaseModel):
    type: Literal["output_text"]
    text: str
    annotations: list[dict[str, Any]]


class OutputMessage(BaseModel):
    type: Literal["message"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(BaseModel):
    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed"]


class ReasoningText(BaseModel):
    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(BaseModel):
    type: Literal["reasoning"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    summary: list[dict[str, Any]]
    content: list[ReasoningText]


class ResponseUsage(BaseModel):
    input_tokens: int
    output_tokens: int
    total_tokens: int


class ResponseDocument(BaseModel):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[OutputMessage | OutputCall | OutputReasoning]
    usage: ResponseUsage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    fingerprint: dict[str, Any]


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeDocument(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeDocument(BaseModel):
    prompt: str


class PeerDocument(BaseModel):
    url: str
    model: str


ERRORS = {
    400: "The request breaks a rule, which the message names.",
    401: "The API key is missing or wrong.",
    403: "This caller may not do this.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too long.",
    429: "Over a limit of this key; Retry-After says when to come back.",
    500: "The server failed; its log has the details.",
    503: "The server would be too late or is going away; Retry-After, if there, says when.",
}

#: Of an event stream: what each event is (OpenAPI 3.2, and what FastAPI says of its own streams).
EVENT = {
    "type": "object",
    "properties": {
        "event": {"type": "string"},
        "data": {"type": "string"},  # JSON, or [DONE] behind the last one
    },
    "required": ["data"],
}


def responses(answer: type[BaseModel], *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route that answers with a document, or with events if asked to."""
    found: dict[str, Any] = {"model": answer, "description": "The answer."}
    if streams:
        found["content"] = {"text/event-stream": {"itemSchema": EVENT}}
    return {200: found} | refusals()


def refusals() -> dict[int | str, dict[str, Any]]:
    """The ``responses`` that every route may give."""
    return {
        status: {"model": ErrorDocument, "description": text} for status, text in ERRORS.items()
    }


def relayed() -> dict[int | str, dict[str, Any]]:
    """The ``responses`` that a route which asks another server may give."""
    text = "The other server does not answer, or refuses."
    return refusals() | {502: {"model": ErrorDocument, "description": text}}


def probe(title: str, field: str) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a probe: one field, true with 200 and false with 503."""
    model = create_model(title, **{field: (bool, ...)})  # type: ignore[call-overload]
    return {
        200: {"model": model, "description": "Yes."},
        503: {"model": model, "description": "No."},
    }


def without_422(document: dict[str, Any]) -> dict[str, Any]:
    """FastAPI documents 422 for every body; this server answers 400 instead."""
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document.get("components", {}).get("schemas", {}).pop(name, None)
    return document
