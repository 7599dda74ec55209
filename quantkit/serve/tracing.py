"""OpenTelemetry spans: one for each answer, only if an endpoint was configured.

Named and attributed after the semantic conventions for generative AI. Prompts and answers are
never part of a span. The SDK exports in batches on a thread of its own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from quantkit import __version__
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Tracer

#: Path → the conventions' name of the operation.
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
}


@dataclass(frozen=True)
class Span:
    """What is known of an answer when it is over. Times are of the monotonic clock."""

    start: float
    first_token: float | None
    end: float
    outcome: str
    input_tokens: int
    output_tokens: int
    tenant: str
    tier: str


class Tracing:
    """Makes spans with a tracer of OpenTelemetry."""

    def __init__(self, tracer: Tracer, model: str) -> None:
        self._tracer = tracer
        self._model = model

    def begin(self, path: str, headers: Mapping[str, str]) -> Trace:
        """The trace of a request: its client's, if it sent a ``traceparent``."""
        from opentelemetry.propagate import extract

        return Trace(self._tracer, self._model, OPERATIONS[path], extract(dict(headers)))


@dataclass(frozen=True)
class Trace:
    """Where the spans of one HTTP request belong."""

    tracer: Tracer
    model: str
    operation: str
    parent: Context

    def record(self, found: Span) -> None:
        """Make a span of an answer that is over."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        # Spans want the time of day; durations stay those of the monotonic clock.
        offset = time.time_ns() - int(time.monotonic() * 1e9)
        span = self.tracer.start_span(
            f"{self.operation} {self.model}",
            context=self.parent,
            kind=SpanKind.SERVER,
            start_time=offset + int(found.start * 1e9),
            attributes={
                "gen_ai.operation.name": self.operation,
                "gen_ai.request.model": self.model,
                "gen_ai.usage.input_tokens": found.input_tokens,
                "gen_ai.usage.output_tokens": found.output_tokens,
                "gen_ai.response.finish_reasons": [found.outcome],
                "quantkit.tenant": found.tenant,
                "quantkit.tier": found.tier,
            },
        )
        if found.first_token is not None:
            span.add_event("first token", timestamp=offset + int(found.first_token * 1e9))
        if found.outcome == "failed":
            span.set_status(Status(StatusCode.ERROR))
        span.end(offset + int(found.end * 1e9))


def connect(endpoint: str, model: str) -> Tracing:
    """Send spans to an OTLP endpoint over HTTP.

    Raises:
        UsageError: the endpoint is no http address, or the exporter is not installed.
    """
    if not _is_http(endpoint):
        raise UsageError(
            f"--otlp-endpoint {endpoint} is no http:// or https:// address",
            remedy="write it as http://localhost:4318/v1/traces",
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UsageError(
            f"--otlp-endpoint needs OpenTelemetry: {error}",
            remedy="pip install 'quantkit[otel]'",
        ) from error
    resource = Resource.create({"service.name": "quantkit", "service.version": __version__})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracing(provider.get_tracer("quantkit", __version__), model)


def _is_http(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, a port that is none
        return False
