"""Tools as requests bring them, and what an answer may do with them.

Only functions: nothing that this server would have to run itself. Their number, size and depth are
bounded, and their schemas compiled, because all of it comes from clients.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from quantkit.serve.api.strict_json import strict_json
from quantkit.serve.chat_formats import ToolFormat, Writing
from quantkit.serve.request import RequestError, StructuredOutputs, require
from quantkit.serve.tool_grammar import CallableFunction, CallForm

MAX_TOOLS = 128
#: Of all definitions together, as JSON.
MAX_TOOLS_BYTES = 64 * 1024
MAX_CALLS = 128

#: OpenAI's rule. Templates write names between control tokens, so nothing else gets through.
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
CallId = Annotated[str, Field(min_length=1, max_length=256)]
#: Without parameters, a function takes none.
_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
_Text = Annotated[str, Field(max_length=MAX_TOOLS_BYTES)]


class Function(BaseModel):
    """A function of ``tools``; ``parameters`` is a JSON schema, absent if it takes none."""

    model_config = ConfigDict(strict=True)

    name: FunctionName
    description: _Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(BaseModel):
    """``tools`` of chat."""

    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    function: Function


class FlatFunctionTool(Function):
    """``tools`` of the Responses API: the function's fields beside its type."""

    type: Literal["function"]


class FunctionRef(BaseModel):
    model_config = ConfigDict(strict=True)

    name: FunctionName


class FunctionChoice(BaseModel):
    """``tool_choice`` of chat that names a function."""

    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    function: FunctionRef


class FlatFunctionChoice(FunctionRef):
    """The same in the Responses API."""

    type: Literal["function"]


Mode = Literal["none", "auto", "required"]
Offer = Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)]
FlatOffer = Annotated[list[FlatFunctionTool], Field(max_length=MAX_TOOLS)]


@dataclass(frozen=True)
class Tools:
    """What an answer may call.

    Attributes:
        functions: those that may be called.
        definitions: all that were offered, as chat templates take them.
        required: the answer has to be a call.
        parallel: it may hold several.
    """

    functions: tuple[CallableFunction, ...]
    definitions: tuple[dict[str, Any], ...]
    required: bool
    parallel: bool

    @property
    def enforced(self) -> bool:
        """The model alone cannot be trusted to keep what was asked for."""
        strict = any(function.strict for function in self.functions)
        return self.required or strict or not self.parallel

    @property
    def schemas(self) -> StructuredOutputs:
        """A form that compiles if all schemas do."""
        way = Writing(trigger="", before="{name}")
        return StructuredOutputs(calls=CallForm(way, self.functions, required=True, many=False))

    def form(self, style: ToolFormat, tags: tuple[str, ...]) -> StructuredOutputs | None:
        """What an answer must look like; None where the format cannot be written by grammar."""
        if style.writing is None:
            return None
        calls = CallForm(style.writing, self.functions, self.required, self.parallel, tags)
        return StructuredOutputs(calls=calls)


def offered(
    tools: Sequence[Function],
    choice: Mode | FunctionRef | None,
    *,
    parallel: bool | None,
) -> Tools | None:
    """Tools as a request offers them; None if nothing may be called.

    Raises:
        RequestError: two have one name, they are too large or too deep, a schema is no JSON or not
            one of an object, or the choice names none of them.
    """
    named = choice.name if isinstance(choice, FunctionRef) else None
    if not tools:
        require(
            choice in (None, "none", "auto"), "tool_choice", "there are no tools to choose from"
        )
        return None
    names = [tool.name for tool in tools]
    require(len({*names}) == len(names), "tools", "two functions have the same name")
    require(named is None or named in names, "tool_choice", f"{named!r} is not one of the tools")
    functions = tuple(_callable(tool) for tool in tools)
    definitions = tuple(_definition(tool) for tool in tools)
    size = sum(len(json.dumps(definition)) for definition in definitions)
    require(size <= MAX_TOOLS_BYTES, "tools", f"{size} bytes; at most {MAX_TOOLS_BYTES}")
    if choice == "none":
        return None
    return Tools(
        tuple(item for item in functions if named is None or item.name == named),
        definitions,
        required=choice == "required" or named is not None,
        parallel=named is None and parallel is not False,
    )


def _callable(tool: Function) -> CallableFunction:
    schema = _NOTHING if tool.parameters is None else tool.parameters
    where = f"tools: {tool.name}: parameters"
    if schema.get("type", "object") != "object":
        kind = str(schema["type"])[:64]
        raise RequestError(f"{where}: type is {kind!r}; arguments are an object", param="tools")
    try:
        text = strict_json(schema)
        StructuredOutputs(json=text)
    except (ValueError, RequestError) as error:
        raise RequestError(f"{where}: {error}", param="tools") from error
    return CallableFunction(tool.name, text, bool(tool.strict))


def _definition(tool: Function) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}
