"""Every failure as the OpenAI error object, with the right status.

``{"error": {"message", "type", "param", "code"}}``: clients retry 429 and 5xx, and never 4xx,
so a fault of the request must never come out as a 500.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from quantkit.serve.door import RefusedError
from quantkit.serve.engine import QueueFullError, StoppedError
from quantkit.serve.events import Failed
from quantkit.serve.peer import PeerError
from quantkit.serve.request import RequestError
from quantkit.serve.structured import CompilerBusyError

logger = logging.getLogger(__name__)


class GenerationError(Exception):
    """The engine failed a request before its first token."""

    def __init__(self, event: Failed) -> None:
        super().__init__(event.message)
        self.event = event


class ModelNotFoundError(Exception):
    """The request names a model that is not served here."""


class NotOperatorError(Exception):
    """The caller's tenant is no operator; the text is what it may not do."""


def error_body(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def failed_body(event: Failed) -> dict[str, Any]:
    """The body for a request that the engine failed."""
    if event.invalid:
        return error_body(event.message, "invalid_request_error")
    return error_body(event.message, "service_unavailable" if event.shutdown else "server_error")


def install(app: FastAPI) -> None:
    """Register the handlers."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(ModelNotFoundError, _unknown_model)
    app.add_exception_handler(NotOperatorError, _not_operator)
    app.add_exception_handler(PeerError, _bad_gateway)
    app.add_exception_handler(RefusedError, _not_admitted)
    app.add_exception_handler(QueueFullError, _busy)
    app.add_exception_handler(CompilerBusyError, _busy)
    app.add_exception_handler(StoppedError, _stopped)
    app.add_exception_handler(GenerationError, _failed)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _bug)


def _invalid(_: Request, error: Exception) -> JSONResponse:
    """Pydantic's first complaint, in one line that names the field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    # ("body", "messages", 0, "content") → messages.0.content; a union adds the branch's name.
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    message = f"{param}: {first['msg']}" if param else str(first["msg"])
    return JSONResponse(error_body(message, "invalid_request_error", param=param), 400)


def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    body = error_body(str(error), "invalid_request_error", param=error.param, code=error.code)
    return JSONResponse(body, 400)


def _unknown_model(_: Request, error: Exception) -> JSONResponse:
    body = error_body(str(error), "invalid_request_error", param="model", code="model_not_found")
    return JSONResponse(body, 404)


def _not_operator(_: Request, error: Exception) -> JSONResponse:
    message = f"this key may not {error}; its tenant needs 'operator: true'"
    return JSONResponse(error_body(message, "permission_error"), 403)


def _bad_gateway(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body(str(error), "bad_gateway"), 502)


#: Status of a refusal → the type that clients know.
REFUSALS = {400: "invalid_request_error", 429: "rate_limit_error", 503: "service_unavailable"}


def _not_admitted(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RefusedError)
    refusal = error.refusal
    body = error_body(str(error), REFUSALS[refusal.status], code=refusal.code)
    headers = {"Retry-After": str(refusal.retry_after)} if refusal.retry_after else {}
    return JSONResponse(body, refusal.status, headers=headers)


def _busy(_: Request, error: Exception) -> JSONResponse:
    body = error_body(str(error), "rate_limit_error", code="queue_full")
    return JSONResponse(body, 429, headers={"Retry-After": "1"})


def _stopped(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body(str(error), "service_unavailable"), 503)


def _failed(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, GenerationError)
    event = error.event
    status = 400 if event.invalid else 503 if event.shutdown else 500
    return JSONResponse(failed_body(event), status)


def _http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    body = error_body(str(error.detail), kind)
    return JSONResponse(body, error.status_code, headers=error.headers)


def _bug(_: Request, error: Exception) -> JSONResponse:
    logger.error("unhandled error", exc_info=error)
    body = error_body("internal error; the server's log has the details", "server_error")
    return JSONResponse(body, 500)
