"""/compare: another server's answer to the same request, and all that it may do wrong."""

from __future__ import annotations

import json
import threading

import httpx
import pytest
from serve_helpers import Live, assert_empty, before_forward, wait_until
from stub_server import EVENT, answering

from quantkit.serve import peer as peers
from quantkit.serve.config import ServeConfig
from quantkit.serve.keys import Key, digest
from quantkit.serve.peer import Peer
from quantkit.serve.policy.tiers import Tenant, Tier

BODY = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "how are you?"}],
    "max_tokens": 8,
    "temperature": 0,
    "stream": True,
    "stream_options": {"include_usage": True},
}


def ask(server: Live, **headers: str) -> httpx.Response:
    return httpx.post(server.url + "/compare", json=BODY, headers=headers, timeout=30)


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


def message(response: httpx.Response) -> str:
    return response.json()["error"]["message"]


def test_the_other_server_answers_as_if_it_were_asked_itself(live) -> None:
    other = live()
    server = live(peer=Peer(f"{other.url}/v1/"))
    assert httpx.get(server.url + "/compare").json() == {"url": other.url, "model": "tiny"}

    def deltas(url: str) -> list[dict]:
        response = httpx.post(url, json=BODY, timeout=30)
        assert response.headers["content-type"].startswith("text/event-stream")
        *lines, done = [line for line in response.text.split("\n\n") if line]
        assert done == "data: [DONE]"
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        return [{key: event[key] for key in ("choices", "usage")} for event in events]

    assert deltas(server.url + "/compare") == deltas(other.url + "/v1/chat/completions")
    assert server.engine.metrics.generated_tokens._value.get() == 0, "it computed nothing itself"


def test_only_operators_may_and_keys_stay_where_they_belong(live) -> None:
    tenants = (Tenant("boss", "only"), Tenant("guest", "only"))
    keys = tuple(Key(digest(tenant.name), tenant.name) for tenant in tenants)
    access = ServeConfig((Tier("only"),), tenants, keys, frozenset({"boss"}))
    with answering() as stub:
        server = live(access=access, peer=Peer(stub.url, key="theirs"))
        assert ask(server).status_code == 401
        refused = ask(server, authorization="Bearer guest")
        assert refused.status_code == 403
        assert "may not compare" in message(refused)
        listed = httpx.get(server.url + "/compare", headers={"authorization": "Bearer guest"})
        assert listed.status_code == 403
        assert stub.requests == []
        assert EVENT.decode() in ask(server, authorization="Bearer boss").text
    [(path, authorization, read)] = stub.requests
    assert (path, authorization) == ("/v1/chat/completions", "Bearer theirs")
    assert json.loads(read) == BODY


def test_without_a_peer_there_is_no_route(server: Live) -> None:
    assert ask(server).status_code == 404
    assert "/compare" not in httpx.get(server.url + "/openapi.json").json()["paths"]


def test_a_web_page_of_another_host_is_refused(live) -> None:
    with answering() as stub:
        server = live(peer=Peer(stub.url))
        assert ask(server, origin="https://evil.example").status_code == 403
        assert ask(server, host="evil.example").status_code == 403
        assert stub.requests == []


def test_what_cannot_be_passed_on_is_refused(live) -> None:
    with answering() as stub:
        server = live(peer=Peer(stub.url))
        for change in ({"messages": []}, {"temperature": -1}, {"max_tokens": 0}):
            response = httpx.post(server.url + "/compare", json=BODY | change)
            assert response.status_code == 400
        for unknown in ("\ud800", float("nan"), {"\ud800": 1}):
            body = json.dumps(BODY | {"unknown": unknown})
            headers = {"content-type": "application/json"}
            response = httpx.post(server.url + "/compare", content=body, headers=headers)
            assert response.status_code == 400
            assert "half a surrogate pair" in message(response)
        assert stub.requests == []
        deep = BODY | {"unknown": nested(300)}
        assert httpx.post(server.url + "/compare", json=deep).status_code == 200
        assert json.loads(stub.requests[0][2]) == deep


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"status": 401, "body": b'{"error": {"message": "no key"}}'}, "status 401: no key"),
        ({"status": 500, "body": b"<h1>oops</h1>"}, "status 500: <h1>oops</h1>"),
        ({"status": 500, "body": b"x" * 300_000}, "more than 262144 bytes"),
        ({"status": 302}, "status 302"),
        ({"media_type": "text/html"}, "'text/html' where text/event-stream was due"),
        ({"body": b"", "length": 10}, "does not answer"),
    ],
)
def test_refusals_of_the_other_server_are_502(live, answer: dict, said: str) -> None:
    """Never its own status: a 401 of theirs says nothing of the caller's key."""
    with answering(**answer) as stub:
        response = ask(live(peer=Peer(stub.url)))
        assert response.status_code == 502
        assert said in message(response)
        assert stub.url in message(response)
        assert [path for path, _, _ in stub.requests] == ["/v1/chat/completions"], "no redirect"


def test_an_answer_that_breaks_off_says_so(live) -> None:
    with answering(length=10_000) as stub:
        text = ask(live(peer=Peer(stub.url))).text
    *_, last = [block for block in text.split("\n\n") if block]
    assert "does not answer" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert EVENT.decode() in text


def test_nobody_is_there(live) -> None:
    with answering() as stub:
        pass
    server = live(peer=Peer(stub.url))
    for response in (ask(server), httpx.get(server.url + "/compare")):
        assert response.status_code == 502
        assert "does not answer" in message(response)


@pytest.mark.parametrize(
    ("body", "model", "said"),
    [
        (b'{"data": [{"id": "a"}, {"id": "b"}]}', None, "name one with --compare-model"),
        (b'{"data": [{"id": "a"}, {"id": "b"}]}', "c", "does not serve 'c'"),
        (b'{"data": [{"name": "a"}, 5]}', None, "serves 0 models"),
        (b'["a"]', None, "serves 0 models"),
        (b"[" * 100_000, None, "serves 0 models"),
        (b"x" * 300_000, None, "more than 262144 bytes"),
    ],
)
def test_lists_of_models(live, body: bytes, model: str | None, said: str) -> None:
    with answering(media_type="application/json", body=body) as stub:
        response = httpx.get(live(peer=Peer(stub.url, model=model)).url + "/compare")
    assert response.status_code == 502
    assert said in message(response)


def test_one_of_several_models(live) -> None:
    body = b'{"data": [{"id": "a"}, {"id": "b"}]}'
    with answering(media_type="application/json; charset=utf-8", body=body) as stub:
        server = live(peer=Peer(stub.url, model="b"))
        assert httpx.get(server.url + "/compare").json() == {"url": stub.url, "model": "b"}


def test_silence_ends(live, monkeypatch) -> None:
    other = live()
    monkeypatch.setattr(peers, "SILENT_SECONDS", 0.2)
    server = live(peer=Peer(other.url))
    go_on = threading.Event()
    with monkeypatch.context() as patch:
        before_forward(patch, other.engine.runner, lambda token_ids: go_on.wait(20))
        response = ask(server)
        go_on.set()
    assert response.status_code == 502
    assert "ReadTimeout" in message(response)


def test_a_client_that_leaves_ends_the_others_work(live, monkeypatch) -> None:
    """Before the first event and among them."""
    other = live()
    server = live(peer=Peer(other.url))
    go_on = threading.Event()
    with monkeypatch.context() as patch:
        before_forward(patch, other.engine.runner, lambda token_ids: go_on.wait(20))
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + "/compare", json=BODY, timeout=0.5)
        assert other.engine.live == 1
        go_on.set()
    assert_empty(other.engine)
    steps: list[int] = []
    go_on.clear()

    def third_waits(token_ids: list[int]) -> None:
        steps.append(1)
        if len(steps) > 3:
            go_on.wait(20)

    with monkeypatch.context() as patch:
        before_forward(patch, other.engine.runner, third_waits)
        body = BODY | {"max_tokens": 400}
        with httpx.stream("POST", server.url + "/compare", json=body, timeout=30) as response:
            assert next(response.iter_bytes())
        go_on.set()
        wait_until(lambda: other.engine.live == 0)
        assert len(steps) < 390
