"""Tiers on the real engine: a paid request passes those that wait and stops one that runs."""

from __future__ import annotations

import copy
import threading
import time
from dataclasses import replace

import httpx
from serve_helpers import before_forward, generate, request, serving, wait_until

from quantkit.models.llama_family import build_decoder
from quantkit.models.runtime import Runtime
from quantkit.serve.config import ServeConfig
from quantkit.serve.engine import Engine, EngineConfig
from quantkit.serve.keys import Key, digest
from quantkit.serve.policy.tiered import Tiered
from quantkit.serve.policy.tiers import Tenant, Tier

TIERS = (Tier("paid", 8.0), Tier("free", 1.0))
TENANTS = (Tenant("paid", "paid"), Tenant("free", "free"))
KEYS = tuple(Key(digest(tenant.name), tenant.name) for tenant in TENANTS)


def test_a_paid_request_overtakes_and_stops_free_ones(runtime: Runtime, monkeypatch) -> None:
    """Two slots, four free requests, then a paid one: it is first of those that wait, takes the
    slot of the free one that came last, and that one's answer is still whole."""
    native = replace(runtime, decoder=build_decoder(copy.deepcopy(runtime.model)))
    access = ServeConfig(TIERS, TENANTS, KEYS, frozenset())
    ended: list[str] = []
    with serving(native, EngineConfig(max_sequences=2), access=access) as server:
        go_on = threading.Event()

        def hold(token_ids: list[int]) -> None:
            """Two free requests run, and get no further before the paid one is there."""
            wait_until(lambda: go_on.is_set() or server.engine.live >= 2, 60)
            if server.engine.running == 2:
                go_on.wait(60)
            time.sleep(0.005)  # or all of it is over before a client's thread has its turn

        before_forward(monkeypatch, server.engine.runner, hold)
        answers: dict[str, str] = {}

        def ask(name: str, key: str, max_tokens: int) -> None:
            body = {"prompt": f"dog {name}", "max_tokens": max_tokens, "temperature": 0}
            headers = {"Authorization": f"Bearer {key}"}
            url = f"{server.url}/v1/completions"
            response = httpx.post(url, json=body, headers=headers, timeout=300)
            answers[name] = response.json()["choices"][0]["text"]
            ended.append(name)

        threads = []
        for i, (name, key, length) in enumerate(
            [*((f"free{i}", "free", 60) for i in range(4)), ("paid", "paid", 2)], 1
        ):
            threads.append(threading.Thread(target=ask, args=(name, key, length)))
            threads[-1].start()
            wait_until(lambda i=i: server.engine.live == i, 30)
        go_on.set()
        for thread in threads:
            thread.join(300)
        assert ended[0] == "paid"
        assert sorted(ended) == ["free0", "free1", "free2", "free3", "paid"]
        assert server.engine.counters.preemptions >= 1
    alone = Engine(native, EngineConfig(), Tiered(TIERS)).start()
    try:
        for name in answers:
            ids = runtime.tokenizer.encode(f"dog {name}")
            length = 2 if name == "paid" else 60
            [outcome] = generate(alone, request(name, ids, max_tokens=length))
            assert answers[name] == outcome.text
    finally:
        alone.stop()
