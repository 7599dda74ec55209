"""The request body of ``/v1/responses``: items instead of messages, tools without a wrapper."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from quantkit.serve.api.messages import MAX_MESSAGES, CalledFunction, Text
from quantkit.serve.api.schemas import MAX_TOKENS, UNSUPPORTED, GenerationRequest, as_json
from quantkit.serve.api.tools import CallId, FlatFunctionChoice, FlatOffer, Mode, Tools, offered
from quantkit.serve.request import RequestError, StructuredOutputs


class InputText(BaseModel):
    """A piece of an item of the Responses API."""

    model_config = ConfigDict(strict=True)

    type: Literal["input_text", "output_text", "text", "reasoning_text"]
    text: Text


Pieces = Text | Annotated[list[InputText], Field(max_length=MAX_MESSAGES)]


def joined(pieces: str | list[InputText] | None) -> str:
    """The text of some pieces."""
    if isinstance(pieces, str):
        return pieces
    return "".join(piece.text for piece in pieces or ())


class InputMessage(BaseModel):
    """A message."""

    model_config = ConfigDict(strict=True)

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Pieces


class InputCall(CalledFunction):
    """A call that the assistant made."""

    type: Literal["function_call"]
    call_id: CallId


class InputResult(BaseModel):
    """What came of a call."""

    model_config = ConfigDict(strict=True)

    type: Literal["function_call_output"]
    call_id: CallId
    output: Pieces


class InputReasoning(BaseModel):
    """What the assistant thought before what follows."""

    model_config = ConfigDict(strict=True)

    type: Literal["reasoning"]
    content: Annotated[list[InputText], Field(max_length=MAX_MESSAGES)] | None = None


def _kind(item: Any) -> Any:
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputResult, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(_kind),
]


#: Known fields of the Responses API that are not implemented → the values that mean "off".
UNSUPPORTED_RESPONSES: dict[str, tuple[Any, ...]] = {
    "background": (None, False),
    "conversation": (None,),
    "include": (None, []),
    "max_tokens": (None,),  # here it is max_output_tokens
    "max_completion_tokens": (None,),
    "max_tool_calls": (None,),
    "previous_response_id": (None,),
    "prompt": (None,),
    "reasoning": (None, {}),
    "top_logprobs": (None, 0),
    "truncation": (None, "disabled"),
}


class TextFormat(BaseModel):
    """``text.format`` of the Responses API: `ResponseFormat`, with the schema beside its type."""

    model_config = ConfigDict(strict=True)

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(max_length=256)] | None = None
    strict: bool | None = None
    body: Annotated[dict[str, Any] | None, Field(alias="schema")] = None

    @model_validator(mode="after")
    def _schema_where_needed(self) -> TextFormat:
        if (self.body is not None) != (self.type == "json_schema"):
            raise ValueError(f"type {self.type!r} and 'schema' do not go together")
        return self


class TextOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    format: TextFormat | None = None


#: OpenAI's limits.
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


class ResponsesRequest(GenerationRequest):
    """``POST /v1/responses``."""

    unsupported: ClassVar = UNSUPPORTED | UNSUPPORTED_RESPONSES

    input: (
        Annotated[Text, Field(min_length=1)]
        | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES)]
    )
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    metadata: Metadata | None = None
    n: Literal[1] | None = None
    text: TextOptions | None = None
    tools: FlatOffer | None = None
    tool_choice: Mode | FlatFunctionChoice | None = None
    parallel_tool_calls: bool | None = None

    def offered(self) -> Tools | None:
        """The tools that the answer may call; None if it may call nothing."""
        return offered(self.tools or (), self.tool_choice, parallel=self.parallel_tool_calls)

    def structured(self) -> StructuredOutputs | None:
        asked = self.text and self.text.format
        if not asked:
            return super().structured()
        if self.response_format is not None or self.structured_outputs is not None:
            raise RequestError(
                "'text.format' excludes 'response_format' and 'structured_outputs'",
                param="text",
                remedy="give one of them",
            )
        if asked.body is not None:
            return StructuredOutputs(json=as_json(asked.body))
        return StructuredOutputs(json_object=True) if asked.type == "json_object" else None
