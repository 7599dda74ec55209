"""What breaks inside a server, injected: an exception, no memory, a hang, a clock that jumps."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serve_helpers import Live, before_forward, wait_until

from quantkit.serve import door
from quantkit.serve.config import ServeConfig
from quantkit.serve.engine import EngineConfig
from quantkit.serve.policy.tiers import Tenant, Tier

COMPLETIONS = "/v1/completions"


def test_an_exception_in_the_engine_thread(unharmed: Live, post, monkeypatch) -> None:
    """Outside any sequence's work: all fail, once each, and the next request is well."""
    with monkeypatch.context() as patch:
        patch.setattr(unharmed.engine.scheduler, "schedule", lambda *a: 1 / 0)
        with ThreadPoolExecutor(4) as pool:
            body = {"prompt": "a", "max_tokens": 5}
            answers = list(pool.map(lambda _: post(COMPLETIONS, body), range(4)))
    assert {answer.status_code for answer in answers} == {500}
    assert "division" not in answers[0].text
    assert post(COMPLETIONS, body).status_code == 200


def test_a_policy_that_raises(unharmed: Live, post, monkeypatch) -> None:
    """The ledger is on the event loop: an error there is a 500 and leaves nothing behind."""
    with monkeypatch.context() as patch:
        patch.setattr(door.Admission, "admit", lambda *a: 1 / 0)
        assert post(COMPLETIONS, {"prompt": "a"}).status_code == 500


def test_out_of_memory_is_one_requests(unharmed: Live, post, monkeypatch) -> None:
    def breaks(token_ids: list[int]) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        before_forward(patch, unharmed.engine.runner, breaks)
        assert post(COMPLETIONS, {"prompt": "a"}).status_code == 500


def test_a_hang_is_not_ready(live, monkeypatch) -> None:
    server = live(EngineConfig(max_sequences=1, stall_seconds=0.2))
    go_on = threading.Event()
    before_forward(monkeypatch, server.engine.runner, lambda token_ids: go_on.wait(20))
    with ThreadPoolExecutor(1) as pool:
        body = {"prompt": "a", "max_tokens": 2}
        asking = pool.submit(httpx.post, server.url + COMPLETIONS, json=body, timeout=30)
        wait_until(lambda: httpx.get(server.url + "/ready").status_code == 503)
        assert httpx.get(server.url + "/health").status_code == 200, "the thread is there"
        go_on.set()
        assert asking.result().status_code == 200
        wait_until(lambda: httpx.get(server.url + "/ready").status_code == 200)


@pytest.mark.parametrize("jump", [-1e8, 1e8])
def test_a_wall_clock_that_jumps(live, monkeypatch, jump: float) -> None:
    """Nothing is decided by it. Of the monotonic clock, `test_policy` and `test_admission`."""
    tenant = Tenant("t", "only", requests_per_second=1000, tokens_per_second=1e6, concurrency=8)
    access = ServeConfig((Tier("only", ttft=60.0),), (tenant,), (), frozenset({"t"}))
    server = live(access=access)
    now, jumped = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + jumped[0])
    for by in (0.0, jump, 0.0):
        jumped[0] = by
        body = {"prompt": "a", "max_tokens": 3}
        assert httpx.post(server.url + COMPLETIONS, json=body, timeout=30).status_code == 200
        assert httpx.get(server.url + "/ready").status_code == 200
    text = httpx.get(server.url + "/metrics").text
    assert 'quantkit_tier_slo_attainment{tier="only"} 1.0' in text
