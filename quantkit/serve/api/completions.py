"""``POST /v1/completions``: raw prompts, echo and log-probabilities.

With ``echo``, ``logprobs`` and ``max_tokens`` 0 or 1 this is what evaluation harnesses score
prompts with: the first token has no log-probability, every other one its own, and
``top_logprobs`` always holds the most likely token, so that "was it greedy" can be told.

Several prompts and ``n`` answers become one engine request each, with choices numbered prompt by
prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Request as HttpRequest
from fastapi.responses import Response

from quantkit.serve.api.generation import Choice, Generation, Json, Service, head
from quantkit.serve.api.prompts import PromptEncoder
from quantkit.serve.api.schemas import CompletionRequest
from quantkit.serve.events import Event, Finished, PromptScored, TokenEvent, TokenLogprob
from quantkit.serve.request import Request

OBJECT = "text_completion"
DEFAULT_MAX_TOKENS = 16


async def create(service: Service, body: CompletionRequest, http: HttpRequest) -> Response:
    """Answer one completion request."""
    service.check_model(body.model)
    service.knock(http)
    prompts = _prompts(body.prompt)
    ids = [
        await service.encoder.text(prompt) if isinstance(prompt, str) else tuple(prompt)
        for prompt in prompts
    ]
    n = body.n or 1
    fields = head(service, "cmpl")
    requests = [
        Request(
            id=f"{fields['id']}-{index}-{choice}",
            prompt_ids=prompt_ids,
            sampling=body.sampling(
                max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
                logprobs=body.logprobs,
                choice=choice,
                echo=bool(body.echo),
            ),
        )
        for index, prompt_ids in enumerate(ids)
        for choice in range(n)
    ]
    echoes = []
    if body.echo:
        for prompt in prompts:
            text = prompt if isinstance(prompt, str) else await service.encoder.decode(prompt)
            echoes += [text] * n
    told = [prompt_ids for prompt_ids in ids for _ in range(n)] if body.return_token_ids else []
    writer = Writer(
        service.encoder,
        echoes,
        with_logprobs=body.logprobs is not None,
        names_are_ids=bool(body.return_tokens_as_token_ids),
        prompt_ids=told,
    )
    texts = [{"prompt": p} if isinstance(p, str) else None for p in prompts for _ in range(n)]
    generation = Generation(http, service, requests, texts, sum(map(len, ids)), fields)
    if body.stream:
        return await generation.streamed(writer.chunks, OBJECT, include_usage=body.include_usage)
    return await generation.whole(writer.choice, OBJECT)


def _prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> Sequence[str | list[int]]:
    """One prompt or several → several."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return prompt


class Writer:
    """Writes choices of this endpoint's shape.

    ``echoes`` holds the prompt texts to repeat, one a choice, or nothing; ``prompt_ids`` the
    prompts' tokens, one a choice, if ids are to be told. Where ``names_are_ids``, log-probabilities
    call a token by its id, and offsets count its text all the same. Offsets of streamed tokens
    continue from chunk to chunk.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        echoes: list[str],
        *,
        with_logprobs: bool,
        names_are_ids: bool = False,
        prompt_ids: Sequence[Sequence[int]] = (),
    ) -> None:
        self.encoder = encoder
        self.echoes = dict(enumerate(echoes))
        self.with_logprobs = with_logprobs
        self.names_are_ids = names_are_ids
        self.with_ids = bool(prompt_ids)
        self.prompt_ids = dict(enumerate(prompt_ids))
        self._offsets: dict[int, int] = {}

    async def choice(self, index: int, choice: Choice) -> Json:
        """A finished answer."""
        found = {
            "index": index,
            "text": self.echoes.pop(index, "") + choice.text,
            "logprobs": await self._logprobs(index, choice.logprobs),
            "finish_reason": choice.finish_reason,
        }
        return found | self._ids(index, choice.token_ids)

    async def chunks(self, index: int, event: Event) -> list[Json]:
        """What one event adds to the stream: nothing, if its text is still held back and its id
        is not asked for."""
        echo = self.echoes.pop(index, "")
        scored = list(event.logprobs) if isinstance(event, PromptScored) else []
        found = [await self._chunk(index, echo, scored)] if echo or scored else []
        if isinstance(event, TokenEvent) and (event.text or event.logprob or self.with_ids):
            chunk = await self._chunk(index, event.text, [event.logprob] if event.logprob else [])
            found.append(chunk | self._ids(index, [event.token_id]))
        if isinstance(event, Finished):
            chunk = await self._chunk(index, event.text, [])
            found.append(chunk | {"finish_reason": event.reason})
        return found

    async def _chunk(self, index: int, text: str, entries: list[TokenLogprob]) -> Json:
        logprobs = await self._logprobs(index, entries) if entries else None
        return {"text": text, "logprobs": logprobs, "finish_reason": None}

    def _ids(self, index: int, token_ids: Sequence[int]) -> Json:
        """The prompt's come once, with the first of the answer's."""
        if not self.with_ids:
            return {}
        prompt = self.prompt_ids.pop(index, None)
        return {
            "token_ids": list(token_ids),
            "prompt_token_ids": None if prompt is None else list(prompt),
        }

    async def _logprobs(self, index: int, entries: list[TokenLogprob]) -> Json | None:
        if not self.with_logprobs:
            return None
        ids = {i for entry in entries for i in (entry.token_id, *(top for top, _ in entry.top))}
        ordered = sorted(ids)
        texts = dict(zip(ordered, await self.encoder.token_strings(ordered), strict=True))
        names = {i: f"token_id:{i}" for i in ordered} if self.names_are_ids else texts
        offset = self._offsets.get(index, 0)
        body: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            body["tokens"].append(names[entry.token_id])
            body["token_logprobs"].append(entry.logprob)
            body["top_logprobs"].append(_alternatives(entry, names))
            body["text_offset"].append(offset)
            offset += len(texts[entry.token_id])
        self._offsets[index] = offset
        return body


def _alternatives(entry: TokenLogprob, names: dict[int, str]) -> dict[str, float] | None:
    """Text → log-probability, best first, the chosen token included.

    Different tokens can have one text (two halves of characters): the likelier one is kept, so
    a token that was not the best never looks as if it had been.
    """
    if entry.logprob is None:
        return None
    alternatives: dict[str, float] = {}
    for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
        alternatives.setdefault(names[token_id], logprob)
    return alternatives
