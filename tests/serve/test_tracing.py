"""Spans: one an answer, in the client's trace, and without a word of what was said."""

from __future__ import annotations

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from serve_helpers import before_forward, wait_until

from quantkit.errors import UsageError
from quantkit.serve.tracing import Tracing, connect


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(live, exporter: InMemorySpanExporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return live(tracing=Tracing(provider.get_tracer("test"), "tiny"))


def test_an_answer_is_a_span(traced, exporter: InMemorySpanExporter) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    body = {"prompt": "The quick secret", "max_tokens": 3, "n": 2, "seed": 0}
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    assert httpx.post(f"{traced.url}/v1/completions", json=body, headers=headers).is_success
    wait_until(lambda: len(exporter.get_finished_spans()) == 2)
    for span in exporter.get_finished_spans():
        assert span.name == "text_completion tiny"
        assert f"{span.context.trace_id:032x}" == trace
        assert span.attributes["gen_ai.usage.output_tokens"] == 3
        assert span.attributes["gen_ai.response.finish_reasons"] == ("length",)
        [first] = span.events
        assert span.start_time < first.timestamp < span.end_time
        assert "secret" not in span.to_json()


def test_a_failure_is_an_error(traced, exporter: InMemorySpanExporter, monkeypatch) -> None:
    before_forward(monkeypatch, traced.engine.runner, lambda token_ids: 1 / 0)
    messages = [{"role": "user", "content": "hi"}]
    response = httpx.post(f"{traced.url}/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 500
    wait_until(lambda: len(exporter.get_finished_spans()) == 1)
    [span] = exporter.get_finished_spans()
    assert span.name == "chat tiny"
    assert span.status.status_code is StatusCode.ERROR


@pytest.mark.parametrize(
    "endpoint", ["localhost:4318", "grpc://localhost:4317", "http://", "http://[::1", "http://a:b"]
)
def test_an_endpoint_that_is_no_address_is_refused(endpoint: str) -> None:
    with pytest.raises(UsageError, match="is no http:// or https:// address"):
        connect(endpoint, "tiny")
