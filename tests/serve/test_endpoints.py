"""Endpoints beside completions and chat, tiers over HTTP, and the contract of all of them."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from pathlib import Path

import httpx
import jsonschema
import openai
import pytest
from serve_helpers import before_forward, oracle, wait_until

from quantkit.models.runtime import Runtime
from quantkit.serve.api import protocol
from quantkit.serve.api.prompts import PromptEncoder
from quantkit.serve.capture import Capture, CaptureConfig
from quantkit.serve.config import ServeConfig, open_config
from quantkit.serve.engine import EngineConfig
from quantkit.serve.keys import Key, digest
from quantkit.serve.policy.tiers import Tenant, Tier

HELLO = [{"role": "user", "content": "how are you today?"}]
GREEDY = {"model": "tiny", "temperature": 0}


def access(*tenants: Tenant, tiers: tuple[Tier, ...] = (Tier("only"),)) -> ServeConfig:
    """Each tenant's key is its name; the first one is an operator."""
    keys = tuple(Key(digest(tenant.name), tenant.name) for tenant in tenants)
    return ServeConfig(tiers, tenants, keys, frozenset({tenants[0].name}))


def ask(url: str, key: str, **body: object) -> httpx.Response:
    return httpx.post(
        f"{url}/v1/completions",
        json={"prompt": "The quick", "max_tokens": 4, "temperature": 0} | body,
        headers={"Authorization": f"Bearer {key}"},
        timeout=30,
    )


def sample(text: str, name: str, **labels: str) -> float:
    """A value of the Prometheus text."""
    inner = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    found = re.search(rf"^{name}{{{inner}}} (\S+)$", text, re.MULTILINE)
    assert found, f"no {name}{{{inner}}}"
    return float(found[1])


# --- /v1/responses --------------------------------------------------------------------------------


def test_responses(client: openai.OpenAI, runtime: Runtime) -> None:
    answer = client.responses.create(input=HELLO[0]["content"], max_output_tokens=20, **GREEDY)
    ids = runtime.tokenizer.apply_chat_template(
        HELLO, add_generation_prompt=True, return_dict=False
    )
    expected = runtime.tokenizer.decode(oracle(runtime, ids, 20), skip_special_tokens=True)
    assert answer.output_text == expected
    assert answer.usage is not None
    assert answer.usage.input_tokens == len(ids)
    assert answer.usage.output_tokens == 20
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    listed = client.responses.create(
        input=[{"role": "user", "content": [{"type": "input_text", "text": HELLO[0]["content"]}]}],
        max_output_tokens=20,
        **GREEDY,
    )
    assert listed.output_text == expected
    told = client.responses.create(input="hi", instructions="Be brief.", **GREEDY)
    assert (
        told.usage.input_tokens > client.responses.create(input="hi", **GREEDY).usage.input_tokens
    )


def test_responses_as_events(client: openai.OpenAI) -> None:
    whole = client.responses.create(input="hi there", max_output_tokens=20, **GREEDY)
    events = list(
        client.responses.create(input="hi there", max_output_tokens=20, stream=True, **GREEDY)
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    tail = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert kinds[-4:] == tail
    deltas = "".join(event.delta for event in events if event.type.endswith("text.delta"))
    assert deltas == whole.output_text == events[-1].response.output_text
    assert events[-1].response.usage == whole.usage


def test_a_failing_response_says_so(server, client: openai.OpenAI, monkeypatch) -> None:
    calls: list[int] = []

    def breaks(token_ids: list[int]) -> None:
        calls.append(1)
        assert len(calls) < 4

    before_forward(monkeypatch, server.engine.runner, breaks)
    events = list(client.responses.create(input="hi", stream=True, **GREEDY))
    assert events[-1].type == "response.failed"
    assert "internal error" in events[-1].response.error.message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "root", "content": "a"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "a", "max_output_tokens": 5000}, "max_tokens"),
        ({"input": "a", "previous_response_id": "resp_1"}, None),
        ({"input": "a", "background": True}, None),
        ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "text"),
        ({"input": "a", "n": 2}, "n"),
        ({"input": "a", "max_tokens": 5}, None),
        ({"input": "a", "max_completion_tokens": 5}, None),
        (
            {
                "input": "a",
                "text": {"format": {"type": "json_object"}},
                "response_format": {"type": "json_object"},
            },
            "text",
        ),
        (
            {
                "input": "a",
                "text": {"format": {"type": "text"}},
                "structured_outputs": {"regex": "a"},
            },
            "text",
        ),
    ],
)
def test_bad_responses(post, body: dict, param: str | None) -> None:
    response = post("/v1/responses", body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    if param is not None:
        assert error["param"].split(".")[0] == param


# --- tokens and embeddings ------------------------------------------------------------------------


def test_tokenize_and_back(post, runtime: Runtime) -> None:
    text = "The quick 東京 🙂 dog"
    answer = post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == runtime.tokenizer.encode(text)
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 512)
    assert len(answer["token_strs"]) == answer["count"]
    assert post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}
    chat = post("/tokenize", {"messages": HELLO}).json()
    assert chat["tokens"] == runtime.tokenizer.apply_chat_template(
        HELLO, add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": HELLO}),
        ("/tokenize", {"prompt": 5}),
        ("/detokenize", {"tokens": [10**6]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/embeddings", {}),
    ],
)
def test_bad_tokens_and_embeddings(post, path: str, body: dict) -> None:
    response = post(path, body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


# --- tiers ----------------------------------------------------------------------------------------


def test_tenants_limits_are_429_with_retry_after(live) -> None:
    slow = Tenant("slow", "only", requests_per_second=0.1)
    narrow = Tenant("narrow", "only", concurrency=2)
    server = live(access=access(Tenant("boss", "only"), slow, narrow))
    assert ask(server.url, "slow").status_code == 200
    refused = ask(server.url, "slow")
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 10
    assert refused.json()["error"]["code"] == "rate_limit"
    assert ask(server.url, "narrow", n=2, seed=1).status_code == 200
    assert ask(server.url, "narrow", n=3, seed=1).status_code == 400
    assert ask(server.url, "boss").status_code == 200, "others are not concerned"


def test_a_promise_that_cannot_be_kept_is_503(live, monkeypatch) -> None:
    tiers = (Tier("fast", 8.0, ttft=1e-9), Tier("slow", 1.0))
    tenants = (Tenant("acme", "fast"), Tenant("guest", "slow"))
    server = live(EngineConfig(max_sequences=1), access=access(*tenants, tiers=tiers))
    assert ask(server.url, "acme").status_code == 200, "alone, and nothing was measured"
    gate = threading.Event()
    before_forward(monkeypatch, server.engine.runner, lambda token_ids: gate.wait(20))
    waiting = threading.Thread(target=lambda: ask(server.url, "acme"))
    waiting.start()
    wait_until(lambda: server.engine.live == 1)
    refused = ask(server.url, "acme")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "too_slow"
    assert int(refused.headers["retry-after"]) >= 1
    gate.set()
    waiting.join(20)
    text = httpx.get(f"{server.url}/metrics", headers={"Authorization": "Bearer acme"}).text
    assert sample(text, "quantkit_tier_requests_total", tier="fast", outcome="too_slow") == 1
    assert sample(text, "quantkit_tier_slo_attainment", tier="fast") == 0, "1e-9 s is never met"


def test_over_a_limit_nothing_is_tokenized(live, monkeypatch) -> None:
    """One thread tokenizes for everybody, so nobody's refused requests may keep it busy."""
    slow, narrow = (
        Tenant("slow", "only", requests_per_second=0.001),
        Tenant("narrow", "only", concurrency=1),
    )
    server = live(
        EngineConfig(max_sequences=1), access=access(Tenant("boss", "only"), slow, narrow)
    )

    def send(key: str, path: str, body: dict) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(server.url + path, json=body, headers=headers, timeout=30)

    bodies = {
        "/tokenize": {"prompt": "a"},
        "/detokenize": {"tokens": [5]},
        "/v1/completions": {"prompt": "a"},
        "/v1/chat/completions": {"messages": HELLO},
        "/v1/responses": {"input": "a"},
    }
    gate = threading.Event()
    before_forward(monkeypatch, server.engine.runner, lambda token_ids: gate.wait(20))
    running = threading.Thread(target=lambda: ask(server.url, "narrow"))
    running.start()
    wait_until(lambda: server.engine.live == 1)
    assert send("slow", "/tokenize", bodies["/tokenize"]).status_code == 200, "its only request"
    with monkeypatch.context() as patch:
        patch.setattr(PromptEncoder, "_run", lambda *a: 1 / 0)
        for key, code in (("slow", "rate_limit"), ("narrow", "concurrency")):
            for path, body in bodies.items():
                refused = send(key, path, body)
                assert refused.status_code == 429, refused.text
                assert refused.json()["error"]["code"] == code
                assert int(refused.headers["retry-after"]) >= 1
        assert send("boss", "/tokenize", bodies["/tokenize"]).status_code == 500, "it got further"
    gate.set()
    running.join(20)
    text = httpx.get(f"{server.url}/metrics", headers={"Authorization": "Bearer boss"}).text
    assert sample(text, "quantkit_tenant_requests_total", tenant="slow", outcome="rate_limit") == 5


def test_metrics_are_for_operators_and_name_no_stranger(live) -> None:
    server = live(access=access(Tenant("boss", "only"), Tenant("guest", "only")))
    assert ask(server.url, "guest", max_tokens=5).status_code == 200
    url = f"{server.url}/metrics"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"Authorization": "Bearer guest"}).status_code == 403
    text = httpx.get(url, headers={"Authorization": "Bearer boss"}).text
    assert sample(text, "quantkit_tenant_tokens_total", tenant="guest", kind="generated") == 5
    assert sample(text, "quantkit_tier_time_to_first_token_seconds_count", tier="only") == 1
    assert sample(text, "quantkit_tier_inter_token_latency_seconds_count", tier="only") == 4
    assert sample(text, "quantkit_tier_requests_waiting", tier="only") == 0


def test_tenants_beyond_the_label_limit_are_one(live) -> None:
    tenants = [Tenant(f"t{i}", "only") for i in range(150)]
    server = live(access=access(*tenants))
    assert ask(server.url, "t149").status_code == 200
    text = httpx.get(f"{server.url}/metrics", headers={"Authorization": "Bearer t0"}).text
    assert sample(text, "quantkit_tenant_requests_total", tenant="other", outcome="length") == 1
    assert "t149" not in text


def test_nothing_is_left_in_the_books(live, monkeypatch) -> None:
    """Answers that end, fail, or lose their client all leave the ledger."""
    server = live(access=access(Tenant("boss", "only", concurrency=2)))
    before_forward(monkeypatch, server.engine.runner, lambda token_ids: time.sleep(0.005))
    for _ in range(3):
        assert ask(server.url, "boss").status_code == 200
        assert ask(server.url, "boss", prompt=[10**6]).status_code == 400
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server.url}/v1/completions",
                json={"prompt": "a", "max_tokens": 480, "ignore_eos": True},
                headers={"Authorization": "Bearer boss"},
                timeout=0.02,
            )
        wait_until(lambda: server.engine.live == 0)
    assert ask(server.url, "boss", n=2, seed=1).status_code == 200


def test_captured_answers(live, tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    capture = Capture(CaptureConfig(path, rate=1.0))
    server = live(capture=capture)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)
    chat = client.chat.completions.create(messages=HELLO, max_tokens=5, **GREEDY)
    raw = client.completions.create(prompt="write a@b.de", max_tokens=5, **GREEDY)
    client.completions.create(prompt=[5, 6], max_tokens=5, **GREEDY)  # ids are not text
    streamed = client.responses.create(input="hi", max_output_tokens=5, stream=True, **GREEDY)
    text = "".join(event.delta for event in streamed if event.type.endswith("text.delta"))
    wait_until(lambda: capture.written == 3)
    capture.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    answer = {"role": "assistant", "content": chat.choices[0].message.content}
    assert rows[0] == {"messages": [*HELLO, answer]}
    assert rows[1] == {"prompt": "write <email>", "completion": raw.choices[0].text}
    assert rows[2]["messages"][-1]["content"] == text
    assert "quantkit_capture_rows" in httpx.get(server.url + "/metrics").text


# --- the contract ---------------------------------------------------------------------------------


def test_answers_are_what_the_document_says(server, post) -> None:
    document = httpx.get(server.url + "/openapi.json").json()
    assert "422" not in json.dumps(document)

    def check(path: str, method: str, response: httpx.Response) -> None:
        described = document["paths"][path][method]["responses"]
        assert str(response.status_code) in described, (path, response.status_code)
        schema = described[str(response.status_code)]["content"]["application/json"]["schema"]
        jsonschema.validate(response.json(), schema | {"components": document["components"]})

    good = {
        "/v1/completions": {"prompt": "a", "max_tokens": 2, "logprobs": 1},
        "/v1/chat/completions": {"messages": HELLO, "max_tokens": 2, "logprobs": True},
        "/v1/responses": {"input": "a", "max_output_tokens": 2},
        "/tokenize": {"prompt": "a", "return_token_strs": True},
        "/detokenize": {"tokens": [5, 6]},
    }
    for path, body in good.items():
        response = post(path, body)
        assert response.status_code == 200, response.text
        check(path, "post", response)
        check(path, "post", post(path, {"model": "other"} | body))
        check(path, "post", post(path, {}))
    check("/v1/embeddings", "post", post("/v1/embeddings", {"input": "a"}))
    check("/v1/models", "get", httpx.get(server.url + "/v1/models"))
    check("/v1/models/{name}", "get", httpx.get(server.url + "/v1/models/tiny"))
    check("/v1/models/{name}", "get", httpx.get(server.url + "/v1/models/other"))


def test_a_head_that_never_ends_is_cut(live, monkeypatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    server = live()
    host, port = server.url.removeprefix("http://").split(":")
    for sent in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\n"):
        with socket.create_connection((host, int(port)), timeout=20) as sock:
            sock.sendall(sent)
            assert sock.recv(100) == b"", "the server hung up"
    assert httpx.get(server.url + "/health").status_code == 200


def test_without_keys_only_this_machine_is_answered(live) -> None:
    server = live()
    port = server.url.rsplit(":", 1)[1]

    def status(**headers: str) -> int:
        body = {"prompt": "a", "max_tokens": 1}
        return httpx.post(server.url + "/v1/completions", json=body, headers=headers).status_code

    assert status() == status(host=f"localhost:{port}") == status(host=f"[::1]:{port}") == 200
    assert status(origin=f"http://localhost:{port}") == 200
    for headers in (
        {"host": "evil.example"},
        {"host": f"127.0.0.1.evil.example:{port}"},
        {"host": "[::1"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
    ):
        assert status(**headers) == 403, headers
    assert not any(
        name.startswith("access-control")
        for name in httpx.get(server.url + "/health", headers={"origin": "null"}).headers
    )
    open_server = live(access=open_config(), local_only=False)
    body = {"prompt": "a", "max_tokens": 1}
    url = open_server.url + "/v1/completions"
    assert httpx.post(url, json=body, headers={"host": "my.name"}).status_code == 200
