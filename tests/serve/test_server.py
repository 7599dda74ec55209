"""The server's life: disconnects, probes, keys, full queues and draining."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from serve_helpers import before_forward, wait_until

from quantkit.errors import UsageError
from quantkit.serve.api import server as servers
from quantkit.serve.api.sse import EventStreamResponse
from quantkit.serve.config import open_config
from quantkit.serve.engine import EngineConfig
from quantkit.serve.keys import read_api_keys


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_releases_the_sequence(server, stream: bool) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 500, "stream": stream}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(head.encode() + body)
        wait_until(lambda: server.engine.running == 1)
        if stream:
            assert b"200 OK" in sock.recv(1000)
    wait_until(lambda: server.engine.live == 0)
    assert server.engine.memory.used == 0
    assert 'outcome="cancelled"} 1.0' in server.engine.metrics.render().decode()


def test_health_ready_and_metrics(server, client: openai.OpenAI) -> None:
    client.completions.create(model="tiny", prompt="The", max_tokens=3, temperature=0)
    assert httpx.get(server.url + "/health").json() == {"live": True}
    assert httpx.get(server.url + "/ready").status_code == 200
    text = httpx.get(server.url + "/metrics").text
    assert 'quantkit_requests_total{outcome="length"} 1.0' in text
    assert "quantkit_requests_running 0.0" in text
    assert "quantkit_kv_reserved_tokens 0.0" in text
    server.engine.close_intake()
    assert httpx.get(server.url + "/ready").status_code == 503
    response = httpx.post(server.url + "/v1/completions", json={"prompt": "a"})
    assert response.status_code == 503
    server.engine.stop()
    assert httpx.get(server.url + "/health").status_code == 503


def test_full_queue_is_429(live) -> None:
    server = live(EngineConfig(max_sequences=1, max_queue=1))
    body = {"prompt": ["a"] * 5, "max_tokens": 200}
    response = httpx.post(server.url + "/v1/completions", json=body)
    assert response.status_code == 429
    assert response.headers["retry-after"]
    wait_until(lambda: server.engine.live == 0)  # the part that had been queued is gone


def test_api_keys(live, tmp_path) -> None:
    path = tmp_path / "keys"
    path.write_text("# team a\nsecret-a\n\n  secret-b  \n")
    server = live(access=open_config(read_api_keys(path)))

    def status(path: str, authorization: str | bytes | None) -> int:
        headers = {} if authorization is None else {"Authorization": authorization}
        return httpx.get(server.url + path, headers=headers).status_code

    wrong = (None, "", "Bearer", "Bearer secret", "secret-a", "Basic secret-a", b"\xff")
    for authorization in wrong:
        assert status("/v1/models", authorization) == 401
        assert status("/metrics", authorization) == 401
    for authorization in ("Bearer secret-a", "bearer secret-b"):
        assert status("/v1/models", authorization) == 200
    assert status("/health", None) == status("/ready", None) == 200
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="nope", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="missing or wrong API key"):
        client.models.list()

    path.write_text("# nothing\n")
    with pytest.raises(UsageError, match="holds no key"):
        read_api_keys(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_api_keys(tmp_path / "missing")
    path.write_text("# größer\nsecret-a\nein-Schlüssel\n", encoding="utf-8")
    with pytest.raises(UsageError, match=f"{path}:3 a key is not ASCII") as refused:
        read_api_keys(path)
    assert "Schlüssel" not in str(refused.value)


@pytest.mark.parametrize("stream", [False, True])
def test_drain_finishes_what_runs(live, stream: bool) -> None:
    server = live()
    answers: list[httpx.Response] = []
    body = {"prompt": "a", "max_tokens": 300, "stream": stream}

    def ask() -> None:
        answers.append(httpx.post(server.url + "/v1/completions", json=body, timeout=30))

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: server.engine.running == 1)
    server.server.handle_exit(2, None)
    server.thread.join(20)
    asking.join(5)
    assert answers[0].status_code == 200
    assert re.search(r'"finish_reason": ?"(stop|length)"', answers[0].text)
    assert server.server.cut == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/health")


def test_drain_is_bounded(live, monkeypatch) -> None:
    server = live(drain_seconds=0.3)
    before_forward(monkeypatch, server.engine.runner, lambda token_ids: time.sleep(0.05))
    answers: list[httpx.Response] = []
    body = {"prompt": "a", "max_tokens": 500, "stream": True}
    asking = threading.Thread(
        target=lambda: answers.append(httpx.post(server.url + "/v1/completions", json=body))
    )
    asking.start()
    wait_until(lambda: server.engine.running == 1)
    server.server.handle_exit(15, None)
    server.thread.join(10)
    asking.join(5)
    assert server.server.cut == 1
    assert '"type":"service_unavailable"' in answers[0].text
    assert answers[0].text.endswith("data: [DONE]\n\n")


def test_answers_that_are_not_the_engines_are_cut_as_well(monkeypatch) -> None:
    """Those that `/compare` passes on: nothing is live, and the exit code must still be 4."""
    monkeypatch.setattr(servers, "FLUSH_SECONDS", 0)
    app = FastAPI()

    async def endless() -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"
        await asyncio.sleep(600)

    @app.get("/", response_model=None)
    async def answer() -> EventStreamResponse:
        return EventStreamResponse(endless(), lambda: None)

    engine: Any = SimpleNamespace(live=0, close_intake=lambda: None)
    sock, up = servers.bind("127.0.0.1", 0), threading.Event()
    url = servers.url(sock)
    server = servers.Server(app, engine, drain_seconds=0, on_ready=up.set)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    assert up.wait(10)
    with httpx.stream("GET", url, timeout=20) as response:
        chunks = response.iter_raw()  # kept: it closes the connection when it goes
        assert next(chunks) == b"data: 1\n\n"
        server.handle_exit(15, None)
        thread.join(20)
    assert not thread.is_alive()
    assert server.cut == 1
