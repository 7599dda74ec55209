"""``POST /v1/chat/completions``: messages through the tokenizer's own chat template."""

from __future__ import annotations

from dataclasses import replace

from fastapi import Request as HttpRequest
from fastapi.responses import Response

from quantkit.serve.api.conversation import Conversation, begin
from quantkit.serve.api.generation import Choice, Generation, Json, Service, head
from quantkit.serve.api.message_parser import Call, Message, MessageParser, Part
from quantkit.serve.api.prompts import PromptEncoder
from quantkit.serve.api.schemas import ChatRequest
from quantkit.serve.events import Event, Finished, FinishReason, TokenEvent, TokenLogprob
from quantkit.serve.request import Request

OBJECT = "chat.completion"
CHUNK_OBJECT = "chat.completion.chunk"


async def create(service: Service, body: ChatRequest, http: HttpRequest) -> Response:
    """Answer one chat request."""
    service.check_model(body.model)
    service.knock(http)
    conversation = await begin(
        service, body.messages, body.offered(), body.structured(), body.chat_template_kwargs
    )
    prompt_ids = conversation.prompt_ids
    fields = head(service, "chatcmpl")
    asked = body.sampling(
        max_tokens=_max_tokens(service, body, len(prompt_ids)),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    sampling = conversation.sampling(asked)
    requests = [
        Request(
            id=f"{fields['id']}-{choice}",
            prompt_ids=prompt_ids,
            sampling=replace(sampling, seed=body.seed_of(choice)),
        )
        for choice in range(body.n or 1)
    ]
    writer = Writer(service.encoder, conversation, with_logprobs=bool(body.logprobs))
    prompts = [conversation.said] * len(requests)
    generation = Generation(http, service, requests, prompts, len(prompt_ids), fields)
    if body.stream:
        return await generation.streamed(
            writer.chunks, CHUNK_OBJECT, include_usage=body.include_usage
        )
    return await generation.whole(writer.choice, OBJECT)


def _max_tokens(service: Service, body: ChatRequest, prompt_tokens: int) -> int:
    """What was asked for, or the rest of the context; a prompt without room is refused later."""
    asked = body.max_completion_tokens or body.max_tokens
    return asked or max(1, service.engine.capacity.max_context - prompt_tokens)


class Writer:
    """Writes choices of this endpoint's shape. Log-probabilities are of every token, those of
    reasoning and calls included."""

    def __init__(
        self, encoder: PromptEncoder, conversation: Conversation, *, with_logprobs: bool
    ) -> None:
        self.encoder = encoder
        self.conversation = conversation
        self.with_logprobs = with_logprobs
        self._parsers: dict[int, MessageParser] = {}
        self._calls: dict[int, int] = {}

    async def choice(self, index: int, choice: Choice) -> Json:
        """A finished answer."""
        reason = choice.finish_reason or "cancelled"
        parser, said = self.conversation.parser(), Message()
        said.add(parser.push(choice.text))
        said.add(parser.finish(reason))
        message: Json = {"role": "assistant", "content": said.content, "refusal": None}
        if said.reasoning:
            message["reasoning_content"] = said.reasoning
        if said.calls:
            message["content"] = said.content or None
            message["tool_calls"] = [_call(call) for call in said.calls]
        return {
            "index": index,
            "message": message,
            "logprobs": await self._logprobs(choice.logprobs),
            "finish_reason": _reason(reason, len(said.calls)),
        }

    async def chunks(self, index: int, event: Event) -> list[Json]:
        """What one event adds to the stream; the first one of a choice opens it."""
        found: list[Json] = []
        if index not in self._parsers:
            self._parsers[index] = self.conversation.parser()
            self._calls[index] = 0
            found.append(_chunk({"role": "assistant", "content": ""}))
        parser = self._parsers[index]
        if isinstance(event, TokenEvent):
            deltas = [self._delta(index, part) for part in parser.push(event.text)]
            if event.logprob is not None:  # it goes with the token's text, or alone
                logprobs = await self._logprobs([event.logprob])
                first, *deltas = deltas or [{"content": ""}]
                found.append(_chunk(first) | {"logprobs": logprobs})
            found += map(_chunk, deltas)
        if isinstance(event, Finished):
            parts = [*parser.push(event.text), *parser.finish(event.reason)]
            found += [_chunk(self._delta(index, part)) for part in parts]
            reason = _reason(event.reason, self._calls[index])
            found.append(_chunk({}) | {"finish_reason": reason})
        return found

    def _delta(self, index: int, part: Part) -> Json:
        """A part of an answer; a call comes whole, because only a whole one is known to be one."""
        if isinstance(part, Call):
            place = self._calls[index]
            self._calls[index] += 1
            return {"tool_calls": [{"index": place} | _call(part)]}
        return {"reasoning_content" if part.kind == "reasoning" else "content": part.text}

    async def _logprobs(self, entries: list[TokenLogprob]) -> Json | None:
        if not self.with_logprobs:
            return None
        pairs = [
            pair
            for entry in entries
            for pair in ((entry.token_id, entry.logprob or 0.0), *entry.top)
        ]
        names = await self.encoder.token_strings([token_id for token_id, _ in pairs])
        items = iter([_item(name, pair[1]) for name, pair in zip(names, pairs, strict=True)])
        content = [
            next(items) | {"top_logprobs": [next(items) for _ in entry.top]} for entry in entries
        ]
        return {"content": content, "refusal": None}


def _call(call: Call) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _reason(reason: FinishReason, calls: int) -> str:
    """An answer that ends with calls waits for their results."""
    return "tool_calls" if calls and reason == "stop" else reason


def _chunk(delta: Json) -> Json:
    return {"delta": delta, "logprobs": None, "finish_reason": None}


def _item(name: str, logprob: float) -> Json:
    """A token's text and bytes; a part of a character has no bytes of its own to show."""
    whole = "\ufffd" not in name
    return {"token": name, "logprob": logprob, "bytes": list(name.encode()) if whole else None}
