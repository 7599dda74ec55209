"""Random requests from the API's own document: never a server error, never another shape."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serve_helpers import Live, serving

from quantkit.models.runtime import Runtime
from quantkit.serve.engine import EngineConfig

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
PATHS = {
    *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"),
    *("/v1/models", "/v1/models/{name}", "/tokenize", "/detokenize"),
    *("/version", "/health", "/ready", "/metrics"),
}


@pytest.fixture(scope="module")
def served(runtime: Runtime) -> Iterator[Live]:
    # A short context keeps short what random requests may ask for.
    with serving(runtime, EngineConfig(max_sequences=4, max_context=24)) as live:
        yield live


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_the_contract_holds(served: Live, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(served.url + "/openapi.json")
    seen = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        seen.add(operation.path)
        if operation.method == "get" and mode is GenerationMode.NEGATIVE:
            continue  # without parameters there is nothing to get wrong

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=15,
            deadline=None,
            phases=[Phase.generate],
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def check(case: schemathesis.Case) -> None:
            case.validate_response(case.call(timeout=60), checks=CHECKS)

        check()
    assert seen == PATHS


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "The quick"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("/v1/responses", {"input": "Hello"}),
    ],
)
def test_streams_hold_it_too(served: Live, path: str, asked: dict[str, object]) -> None:
    schema = schemathesis.openapi.from_url(served.url + "/openapi.json")
    case = schema[path]["POST"].Case(body=asked | {"stream": True}, media_type="application/json")
    response = case.call(timeout=60)
    assert response.headers["content-type"][0].startswith("text/event-stream")
    case.validate_response(response, checks=CHECKS)
