"""The FastAPI application: routes, and nothing else."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from quantkit import __version__
from quantkit.serve.api import chat, completions, errors
from quantkit.serve.api.generation import Service
from quantkit.serve.api.middleware import MAX_BODY_BYTES, ApiKeys, BodyLimit
from quantkit.serve.api.schemas import ChatRequest, CompletionRequest
from quantkit.serve.engine import Engine


def create_app(
    engine: Engine, *, api_keys: tuple[str, ...] = (), max_body_bytes: int = MAX_BODY_BYTES
) -> FastAPI:
    """An OpenAI-compatible application over a started engine.

    Args:
        engine: runs the model.
        api_keys: accepted bearer keys; none means that everybody may call. /health and /ready
            never need one.
        max_body_bytes: longer bodies are refused with 413.
    """
    service = Service(engine)
    # No docs pages: they load scripts from other hosts. /openapi.json is the contract.
    app = FastAPI(title="quantkit", version=__version__, docs_url=None, redoc_url=None)
    errors.install(app)
    app.add_middleware(BodyLimit, limit=max_body_bytes)
    app.add_middleware(ApiKeys, keys=api_keys)  # added last, so outermost: no key, no body read

    @app.post("/v1/completions", response_model=None)
    async def create_completion(body: CompletionRequest, http: Request) -> Response:
        return await completions.create(service, body, http)

    @app.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(body: ChatRequest, http: Request) -> Response:
        return await chat.create(service, body, http)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(service)]}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _card(service)

    @app.get("/version")
    async def get_version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/health")
    async def health() -> JSONResponse:
        """Live: the engine thread runs. If not, only a restart helps."""
        return JSONResponse({"live": engine.alive}, 200 if engine.alive else 503)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Ready: it takes requests and those it has move forward."""
        return JSONResponse({"ready": engine.ready}, 200 if engine.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.render(), media_type="text/plain; version=0.0.4")

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
