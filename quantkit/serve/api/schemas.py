"""The request bodies that the API accepts: our own bounded models of the OpenAI fields.

Strict: ``"5"`` is not a number and 1 is not true. Fields that nobody knows are ignored, as the
OpenAI API does; fields that it or vLLM knows, that change the answer and that this server does not
implement are refused (`UNSUPPORTED`), because ignoring them would be a silent downgrade.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from quantkit.serve.api.messages import MAX_MESSAGES, Message, Text, check_results
from quantkit.serve.api.strict_json import strict_json
from quantkit.serve.api.tools import FunctionChoice, Mode, Offer, Tools, offered
from quantkit.serve.request import (
    MAX_LOGIT_BIAS,
    MAX_REPETITION_PENALTY,
    MAX_STOP_TOKEN_IDS,
    MAX_TOP_LOGPROBS,
    RequestError,
    SamplingParams,
    StructuredOutputs,
)

MAX_PROMPTS = 256
MAX_CHOICES = 16
#: Larger than any context: the engine refuses what does not fit with the real numbers.
MAX_TOKENS = 2**31 - 1

#: Known fields that are not implemented → the values that mean "off".
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "functions": (None, []),
    "function_call": (None, "none"),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "reasoning_effort": (None,),
    "web_search_options": (None,),
    # Names that vLLM once had for what is `structured_outputs` now.
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    # vLLM's, of the prompt.
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),  # but for chat, which knows them
    "documents": (None, []),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
    "truncate_prompt_tokens": (None,),
    "prompt_logprobs": (None,),
    # vLLM's, of the answer.
    "use_beam_search": (None, False),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "include_stop_str_in_output": (None, False),
    "skip_special_tokens": (None, True),
    "return_tokens_as_token_ids": (None, False),
}

TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=MAX_TOKENS)]], Field(min_length=1)]
Seed = Annotated[int, Field(ge=-(2**63) + 1, le=2**63 - 1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
#: Token ids are strings, as keys of JSON objects always are.
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_LOGIT_BIAS),
]
#: Of the chat template, as `switches` finds them.
Switches = Annotated[dict[Annotated[str, Field(max_length=64)], bool], Field(max_length=16)]
ModelName = Annotated[str, Field(max_length=4096)]
Stop = str | list[str] | None


class JsonSchema(BaseModel):
    """A named schema of ``response_format``."""

    model_config = ConfigDict(strict=True, populate_by_name=True)

    name: Annotated[str, Field(max_length=256)] | None = None
    strict: bool | None = None
    body: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(BaseModel):
    """What an answer must look like. ``json_schema`` needs a schema, the others take none."""

    model_config = ConfigDict(strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_needed(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError(f"type {self.type!r} and 'json_schema' do not go together")
        return self

    def structured(self) -> StructuredOutputs | None:
        if self.json_schema is not None:
            return StructuredOutputs(json=as_json(self.json_schema.body))
        return StructuredOutputs(json_object=True) if self.type == "json_object" else None


class StructuredFormat(BaseModel):
    """vLLM's ``structured_outputs``: exactly one of its fields."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_: Annotated[dict[str, Any] | Text | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: Text | None = None
    grammar: Text | None = None

    def structured(self) -> StructuredOutputs:
        given = as_json(self.json_) if isinstance(self.json_, dict) else self.json_
        return StructuredOutputs(
            json=given,
            json_object=bool(self.json_object),
            regex=self.regex,
            grammar=self.grammar,
        )


def as_json(schema: dict[str, Any]) -> str:
    """A schema as text.

    Raises:
        RequestError: it is nested too deeply to be written, or holds what JSON does not.
    """
    try:
        return strict_json(schema)
    except ValueError as error:
        raise RequestError(f"the schema is {error}", param="response_format") from error


def check_supported(
    extra: dict[str, Any] | None, unsupported: dict[str, tuple[Any, ...]] = UNSUPPORTED
) -> None:
    """Raise ValueError if one of the fields beside a model's own would change the answer."""
    for name, value in (extra or {}).items():
        if name in unsupported and value not in unsupported[name]:
            raise ValueError(f"'{name}' is not supported by this server")


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None

    @model_validator(mode="after")
    def _supported(self) -> StreamOptions:
        if self.include_obfuscation:
            raise ValueError("'include_obfuscation' is not supported by this server")
        return self


class GenerationRequest(BaseModel):
    """What completions and chat have in common."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = UNSUPPORTED

    model: ModelName | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Seed | None = None
    stop: Stop = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=MAX_REPETITION_PENALTY)] | None = None
    logit_bias: LogitBias | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    stop_token_ids: (
        Annotated[
            list[Annotated[int, Field(ge=0, le=MAX_TOKENS)]], Field(max_length=MAX_STOP_TOKEN_IDS)
        ]
        | None
    ) = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _supported(self) -> GenerationRequest:
        check_supported(self.model_extra, self.unsupported)
        if self.response_format is not None and self.structured_outputs is not None:
            raise ValueError("'response_format' and 'structured_outputs' exclude each other")
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' needs 'stream': true")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(
        self, *, max_tokens: int, logprobs: int | None, choice: int = 0, echo: bool = False
    ) -> SamplingParams:
        """Parameters of the ``choice``-th answer; each has its own seed, or all were equal."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),  # -1 is the other usual way to write "off"
            min_p=self.min_p or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            structured_outputs=self.structured(),
            seed=self.seed_of(choice),
            logprobs=logprobs,
            echo=echo,
        )

    def seed_of(self, choice: int) -> int | None:
        """The seed of the ``choice``-th answer."""
        return None if self.seed is None else (self.seed + choice) % 2**63

    def structured(self) -> StructuredOutputs | None:
        """What the text of an answer must look like."""
        asked = self.response_format or self.structured_outputs
        return None if asked is None else asked.structured()


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    unsupported: ClassVar = UNSUPPORTED | {
        "tools": (None, []),
        "add_special_tokens": (None, True),
    }

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    #: As in vLLM: ids beside the text; a stream has a chunk for each token, with text or without.
    return_token_ids: bool | None = None
    #: As in vLLM: tokens of ``logprobs`` are called ``token_id:7``, which no two share.
    return_tokens_as_token_ids: bool | None = None


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    chat_template_kwargs: Switches | None = None
    tools: Offer | None = None
    tool_choice: Mode | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': true")
        return self

    @field_validator("messages")
    @classmethod
    def _results_have_calls(cls, messages: list[Message]) -> list[Message]:
        check_results(messages)
        return messages

    def offered(self) -> Tools | None:
        """The tools that the answer may call; None if it may call nothing."""
        chosen = self.tool_choice
        return offered(
            [tool.function for tool in self.tools or ()],
            chosen.function if isinstance(chosen, FunctionChoice) else chosen,
            parallel=self.parallel_tool_calls,
        )


class TokenizeRequest(BaseModel):
    """``POST /tokenize``: exactly one of ``prompt`` and ``messages``."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: ModelName | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    chat_template_kwargs: Switches | None = None
    tools: Offer | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    def offered(self) -> Tools | None:
        """The tools that the template is to show."""
        return offered([tool.function for tool in self.tools or ()], None, parallel=None)

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        check_supported(self.model_extra)
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("exactly one of 'prompt' and 'messages' is needed")
        if (self.tools or self.chat_template_kwargs) and self.messages is None:
            raise ValueError("'tools' and 'chat_template_kwargs' need 'messages'")
        return self


class DetokenizeRequest(BaseModel):
    """``POST /detokenize``."""

    model_config = ConfigDict(strict=True)

    model: ModelName | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, le=MAX_TOKENS)]], Field(max_length=1_000_000)]


class EmbeddingsRequest(BaseModel):
    """``POST /v1/embeddings``."""

    model_config = ConfigDict(strict=True)

    model: ModelName | None = None
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)] | TokenIds
