"""``POST /v1/chat/completions``: messages through the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import Request as HttpRequest
from fastapi.responses import Response

from quantkit.serve.api.generation import Choice, Generation, Json, Service, head
from quantkit.serve.api.prompts import PromptEncoder
from quantkit.serve.api.schemas import ChatRequest
from quantkit.serve.events import Event, Finished, TokenEvent, TokenLogprob
from quantkit.serve.request import Request

OBJECT = "chat.completion"
CHUNK_OBJECT = "chat.completion.chunk"


async def create(service: Service, body: ChatRequest, http: HttpRequest) -> Response:
    """Answer one chat request."""
    service.check_model(body.model)
    service.knock(http)
    prompt_ids = await service.encoder.chat(body.messages)
    fields = head(service, "chatcmpl")
    requests = [
        Request(
            id=f"{fields['id']}-{choice}",
            prompt_ids=prompt_ids,
            sampling=body.sampling(
                max_tokens=_max_tokens(service, body, len(prompt_ids)),
                logprobs=(body.top_logprobs or 0) if body.logprobs else None,
                choice=choice,
            ),
        )
        for choice in range(body.n or 1)
    ]
    writer = Writer(service.encoder, with_logprobs=bool(body.logprobs))
    said = [{"role": message.role, "content": message.text} for message in body.messages]
    prompts = [{"messages": said}] * len(requests)
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
    """Writes choices of this endpoint's shape."""

    def __init__(self, encoder: PromptEncoder, *, with_logprobs: bool) -> None:
        self.encoder = encoder
        self.with_logprobs = with_logprobs
        self._begun: set[int] = set()

    async def choice(self, index: int, choice: Choice) -> Json:
        """A finished answer."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": await self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    async def chunks(self, index: int, event: Event) -> AsyncIterator[Json]:
        """What one event adds to the stream; the first one of a choice opens it."""
        if index not in self._begun:
            self._begun.add(index)
            yield _chunk({"role": "assistant", "content": ""})
        if isinstance(event, TokenEvent) and (event.text or event.logprob):
            logprobs = await self._logprobs([event.logprob] if event.logprob else [])
            yield _chunk({"content": event.text}) | {"logprobs": logprobs}
        if isinstance(event, Finished):
            if event.text:
                yield _chunk({"content": event.text})
            yield _chunk({}) | {"finish_reason": event.reason}

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


def _chunk(delta: Json) -> Json:
    return {"delta": delta, "logprobs": None, "finish_reason": None}


def _item(name: str, logprob: float) -> Json:
    """A token's text and bytes; a part of a character has no bytes of its own to show."""
    whole = "\ufffd" not in name
    return {"token": name, "logprob": logprob, "bytes": list(name.encode()) if whole else None}
