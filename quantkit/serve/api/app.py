"""The FastAPI application: routes, and nothing else."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from quantkit import __version__
from quantkit.serve.api import chat, compare, completions, documents, errors, responses, tokens, web
from quantkit.serve.api.documents import responses as answers
from quantkit.serve.api.generation import Service
from quantkit.serve.api.middleware import MAX_BODY_BYTES, ApiKeys, BodyLimit, LocalOnly
from quantkit.serve.api.response_schemas import ResponsesRequest
from quantkit.serve.api.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingsRequest,
    TokenizeRequest,
)
from quantkit.serve.capture import Capture
from quantkit.serve.chat_formats import AUTO
from quantkit.serve.config import ServeConfig, open_config
from quantkit.serve.engine import Engine
from quantkit.serve.peer import Peer
from quantkit.serve.request import RequestError
from quantkit.serve.tracing import Tracing


def create_app(
    engine: Engine,
    *,
    access: ServeConfig | None = None,
    capture: Capture | None = None,
    tracing: Tracing | None = None,
    local_only: bool | None = None,
    page: bool = True,
    peer: Peer | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    tool_parser: str = AUTO,
    reasoning_parser: str = AUTO,
    stream_interval: int = 1,
) -> FastAPI:
    """An OpenAI-compatible application over a started engine.

    Args:
        engine: runs the model.
        access: tiers, tenants and keys; by default everybody may call and is treated alike.
            /health, /ready and the page's files never need a key.
        capture: where a sample of the traffic goes.
        tracing: where OpenTelemetry spans go.
        local_only: answer only requests that name this machine; by default if there are no keys.
        page: show a page at /.
        peer: another server, which operators may ask through /compare.
        max_body_bytes: longer bodies are refused with 413.
        tool_parser: how the model writes calls, as `ChatFormat` takes it.
        reasoning_parser: how it writes reasoning.
        stream_interval: tokens of a streamed answer that are written together, behind its first.

    Raises:
        UsageError: there is no such parser.
    """
    access = access or open_config()
    service = Service(
        engine,
        access,
        capture,
        tracing,
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        stream_interval=stream_interval,
    )
    # No docs pages: they load scripts from other hosts. /openapi.json is the contract.
    app = FastAPI(title="quantkit", version=__version__, docs_url=None, redoc_url=None)
    errors.install(app)
    app.add_middleware(BodyLimit, limit=max_body_bytes)
    # Added later, so outside: no key, no body read.
    app.add_middleware(ApiKeys, config=access, more_open_paths=web.PATHS if page else frozenset())
    if not access.keys if local_only is None else local_only:
        app.add_middleware(LocalOnly)

    def check_operator(http: Request, what: str) -> None:
        if http.state.tenant.name not in access.operators:
            raise errors.NotOperatorError(what)

    @app.post(
        "/v1/completions",
        response_model=None,
        responses=answers(documents.CompletionDocument, streams=True),
    )
    async def create_completion(body: CompletionRequest, http: Request) -> Response:
        return await completions.create(service, body, http)

    @app.post(
        "/v1/chat/completions",
        response_model=None,
        responses=answers(documents.ChatDocument, streams=True),
    )
    async def create_chat_completion(body: ChatRequest, http: Request) -> Response:
        return await chat.create(service, body, http)

    @app.post(
        "/v1/responses",
        response_model=None,
        responses=answers(documents.ResponseDocument, streams=True),
    )
    async def create_response(body: ResponsesRequest, http: Request) -> Response:
        return await responses.create(service, body, http)

    @app.post("/v1/embeddings", response_model=None, responses=documents.refusals())
    async def create_embeddings(body: EmbeddingsRequest) -> Response:
        """Refused: what a language model was trained for is the next token."""
        service.check_model(body.model)
        raise RequestError(
            f"model: {service.model} predicts tokens and was not trained to embed texts",
            param="model",
        )

    @app.post("/tokenize", response_model=None, responses=answers(documents.TokenizeDocument))
    async def tokenize(body: TokenizeRequest, http: Request) -> dict[str, Any]:
        return await tokens.tokenize(service, body, http)

    @app.post("/detokenize", response_model=None, responses=answers(documents.DetokenizeDocument))
    async def detokenize(body: DetokenizeRequest, http: Request) -> dict[str, Any]:
        return await tokens.detokenize(service, body, http)

    @app.get("/v1/models", response_model=None, responses=answers(documents.ModelList))
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(service)]}

    @app.get("/v1/models/{name:path}", response_model=None, responses=answers(documents.ModelCard))
    async def get_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _card(service)

    @app.get("/version", responses=documents.refusals())
    async def get_version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/health", responses=documents.probe("Live", "live"))
    async def health() -> JSONResponse:
        """Live: the engine thread runs. If not, only a restart helps."""
        return JSONResponse({"live": engine.alive}, 200 if engine.alive else 503)

    @app.get("/ready", responses=documents.probe("Ready", "ready"))
    async def ready() -> JSONResponse:
        """Ready: it takes requests and those it has move forward."""
        return JSONResponse({"ready": engine.ready}, 200 if engine.ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse, responses=documents.refusals())
    async def metrics(http: Request) -> Response:
        """Prometheus' text format; of all tenants, so for operators only."""
        check_operator(http, "read the metrics")
        return Response(engine.metrics.render(), media_type="text/plain; version=0.0.4")

    if peer is not None:
        compare.install(app, peer, check_operator)
    if page:
        web.install(app, comparing=peer is not None)

    plain = app.openapi
    app.openapi = lambda: documents.without_422(plain())  # type: ignore[method-assign]
    return app


def _card(service: Service) -> dict[str, Any]:
    """A model as the OpenAI API lists it, plus what identifies the numerics."""
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "quantkit",
        "max_model_len": service.engine.capacity.max_context,
        "fingerprint": dict(service.engine.runtime.fingerprint),
    }
