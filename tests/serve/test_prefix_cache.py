"""Texts that begin alike share pages, and no answer shows it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from serve_helpers import before_forward, generate, request, running

from quantkit.models.page_pool import PagePool
from quantkit.models.runtime import Runtime
from quantkit.ops.page_store import PAGE_TOKENS
from quantkit.serve.events import Failed
from quantkit.serve.prefix_cache import PrefixCache, extend_keys
from quantkit.serve.request import Request

SYSTEM = [5 + i * 7 % 300 for i in range(150)]  # two full pages and a part


def asked(name: str, tail: list[int], **sampling: object) -> Request:
    return request(name, SYSTEM + tail, **{"max_tokens": 8, "logprobs": 2, **sampling})


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_answers_are_the_same_bits_with_and_without(native: Runtime, dtype: str) -> None:
    requests = [asked("a", [9]), asked("b", [9, 8]), asked("c", [7], temperature=1.0, seed=1)]
    config = {"prefill_chunk": 100, "kv_cache_dtype": dtype}
    with running(native, enable_prefix_caching=False, **config) as engine:
        plain = [generate(engine, item)[0] for item in requests]
        assert engine.counters.prefix_queries == 0
    with running(native, **config) as engine:
        cached = [generate(engine, item)[0] for item in requests]
        assert engine.counters.prefix_hits == 2 * 128
        assert engine.counters.prefix_hit_rate == pytest.approx(256 / (151 + 152 + 151))
        assert "quantkit_prefix_cache_hits 256.0" in engine.metrics.render().decode()
        assert "quantkit_prompt_tokens_total 198.0" in engine.metrics.render().decode()
    for mine, theirs in zip(cached, plain, strict=True):
        assert mine.events[:-1] == theirs.events[:-1]
    assert [outcome.finished.cached_tokens for outcome in cached] == [0, 128, 128]
    assert [outcome.finished.cached_tokens for outcome in plain] == [0, 0, 0]


def test_the_last_prompt_token_is_always_computed(native: Runtime) -> None:
    with running(native) as engine:
        for expected in (0, 64):
            [outcome] = generate(engine, request("a", SYSTEM[:128]))
            assert outcome.finished.cached_tokens == expected


def test_an_answer_is_a_prefix_of_the_next_turn(native: Runtime) -> None:
    with running(native) as engine:
        [first] = generate(engine, request("a", SYSTEM[:60], max_tokens=20, ignore_eos=True))
        turn = [*SYSTEM[:60], *first.tokens, 9, 9]
        [second] = generate(engine, request("b", turn))
    assert second.finished.cached_tokens == 64


def test_those_who_wait_for_their_turn_read_what_was_read_meanwhile(native: Runtime) -> None:
    """All four are admitted at once; the prompt of each is a chunk of its own."""
    requests = [asked(f"r{i}", [9 + i]) for i in range(4)]
    with running(native, prefill_chunk=151) as engine:
        outcomes = generate(engine, *requests)
    assert [outcome.finished.cached_tokens for outcome in outcomes] == [0, 128, 128, 128]


def test_tenants_do_not_share(native: Runtime) -> None:
    with running(native) as engine:
        for tenant, expected in (("a", 0), ("b", 0), ("a", 128), ("b", 128)):
            [outcome] = generate(engine, replace(asked("x", [9]), tenant=tenant))
            assert outcome.finished.cached_tokens == expected


def test_scored_prompts_are_computed(native: Runtime) -> None:
    with running(native) as engine:
        [first] = generate(engine, asked("a", [9], echo=True))
        [second] = generate(engine, asked("b", [9], echo=True))
    assert first.events == second.events
    assert second.finished.cached_tokens == 0


def test_pages_of_a_failed_request_are_not_shared(native: Runtime, monkeypatch) -> None:
    with running(native) as engine:
        before_forward(monkeypatch, engine.runner, lambda ids: 1 / 0 if ids == [9] else None)
        [failed] = generate(engine, asked("a", [9], logit_bias={9: 100}))
        assert isinstance(failed.terminal, Failed)
        monkeypatch.undo()
        [next_one] = generate(engine, asked("b", [9]))
    assert next_one.finished.cached_tokens == 0


def test_modules_have_none(runtime: Runtime) -> None:
    with running(runtime) as engine:
        for _ in range(2):
            assert generate(engine, asked("a", [9]))[0].finished.cached_tokens == 0


def test_a_collision_is_a_miss() -> None:
    pool = PagePool(2)
    cache = PrefixCache(pool)
    page = pool.take()
    cache.store(b"key", [1, 2], page)
    assert cache.find(b"key", [1, 2]) == page
    assert cache.find(b"key", [1, 3]) is None
    other = pool.take()
    cache.store(b"key", [1, 3], other)  # the first keeps the name
    for item in (page, other):
        pool.give_back(item)
    assert [pool.take(), len(cache), pool.take(), len(cache)] == [other, 1, page, 0]


def test_names_depend_on_all_that_went_before() -> None:
    page = list(range(PAGE_TOKENS))
    names = set()
    for tenant, text in (("a", page * 2), ("b", page * 2), ("a", [*page[:-1], 0, *page])):
        keys: list[bytes] = []
        extend_keys(keys, tenant, text)
        extend_keys(keys, tenant, text)  # what is known is not made again
        assert len(keys) == 2
        names.update(keys)
    assert len(names) == 6
