"""``POST /tokenize`` and ``POST /detokenize``: what the model reads, as vLLM's endpoints say it.

Both count against their tenant's requests a second: the thread that tokenizes is everybody's.
"""

from __future__ import annotations

from fastapi import Request as HttpRequest

from quantkit.serve.api.conversation import check_template
from quantkit.serve.api.generation import Json, Service
from quantkit.serve.api.schemas import DetokenizeRequest, TokenizeRequest
from quantkit.serve.request import RequestError


async def tokenize(service: Service, body: TokenizeRequest, http: HttpRequest) -> Json:
    """The ids of a raw prompt, or of a conversation through the chat template."""
    service.check_model(body.model)
    service.knock(http, charge=True)
    if body.prompt is not None:
        ids = await service.encoder.text(body.prompt, special=body.add_special_tokens)
    else:
        assert body.messages is not None  # the schema wants exactly one of the two
        tools = body.offered()
        check_template(service.style, body.messages, tools)
        definitions = tools.definitions if tools else ()
        ids = await service.encoder.chat(body.messages, definitions, body.chat_template_kwargs)
    answer: Json = {
        "count": len(ids),
        "max_model_len": service.engine.capacity.max_context,
        "tokens": list(ids),
    }
    if body.return_token_strs:
        answer["token_strs"] = await service.encoder.token_strings(ids)
    return answer


async def detokenize(service: Service, body: DetokenizeRequest, http: HttpRequest) -> Json:
    """The text of ids."""
    service.check_model(body.model)
    service.knock(http, charge=True)
    size = service.encoder.size
    for token in body.tokens:
        if token >= size:
            raise RequestError(
                f"tokens: {token} is not an id of this tokenizer; the last is {size - 1}",
                param="tokens",
            )
    return {"prompt": await service.encoder.decode(body.tokens)}
