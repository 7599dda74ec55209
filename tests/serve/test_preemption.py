"""Requests that are stopped for others say what they would have said alone."""

from __future__ import annotations

import asyncio

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve_helpers import Outcome, Scattered, generate, request, running

from quantkit.models.runtime import Runtime
from quantkit.serve.engine import Engine, EngineConfig
from quantkit.serve.events import Event

SMALL = {"max_context": 256, "kv_cache_tokens": 256, "prefill_chunk": 48}


def test_stopped_requests_end_as_if_nothing_had_been(native: Runtime) -> None:
    """Four answers that need three pages each of the four there are; one prompt is scored."""
    requests = [
        request(
            f"r{i}",
            [5 + (i + j) % 300 for j in range(20 + 10 * i)],
            temperature=float(i % 2),
            seed=i,
            max_tokens=150,
            logprobs=1,
            echo=i == 3,
            repetition_penalty=1.3 if i == 1 else 1.0,
            ignore_eos=True,
        )
        for i in range(4)
    ]
    for caching in (True, False):
        config = {**SMALL, "enable_prefix_caching": caching}
        with running(native, **config) as engine:
            alone = [generate(engine, item)[0] for item in requests]
            assert engine.counters.preemptions == 0
            together = generate(engine, *requests)
            assert engine.counters.preemptions > 0
        for one, many in zip(alone, together, strict=True):
            assert many.events[:-1] == one.events[:-1]
            assert many.finished.completion_tokens == one.finished.completion_tokens == 150


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    plan=st.lists(
        st.tuples(st.integers(1, 150), st.integers(0, 60), st.none() | st.integers(0, 40)),
        min_size=1,
        max_size=7,
    ),
    pages=st.integers(4, 8),
    seed=st.integers(0, 2**32),
)
def test_every_request_ends_once_whatever_happens(
    native: Runtime, plan: list[tuple[int, int, int | None]], pages: int, seed: int
) -> None:
    """Few pages, a policy without sense, cancellations in between: stepped without a thread."""
    config = EngineConfig(max_context=256, kv_cache_tokens=64 * pages, prefill_chunk=48)
    engine = Engine(native, config, Scattered(seed))
    engine._accepting = True
    streams: dict[str, list[Event]] = {f"r{i}": [] for i in range(len(plan))}
    for i, (prompt, new, _) in enumerate(plan):
        item = request(f"r{i}", [5 + (i + j) % 300 for j in range(prompt)], max_tokens=new)
        engine.submit(item, streams[f"r{i}"].append)
    for step in range(5000):
        for i, (_, _, when) in enumerate(plan):
            if when == step:
                engine.cancel(f"r{i}")
        if not engine.live:
            break
        engine._take_orders()
        engine.step()
    assert engine.live == 0, "somebody starves"
    assert engine.memory.used == 0
    for events, (_, new, when) in zip(streams.values(), plan, strict=True):
        outcome = Outcome(events)
        assert outcome.finished.reason in {"stop", "length", "cancelled"}
        assert len(outcome.tokens) <= new
        assert when is not None or outcome.finished.reason != "cancelled"


def test_cancelling_who_was_stopped(native: Runtime) -> None:
    long = {"max_tokens": 150, "ignore_eos": True}
    with running(native, **SMALL) as engine:

        async def run() -> list[Outcome]:
            outcomes = [Outcome([]), Outcome([])]
            stream = engine.stream(request("a", [5] * 60, **long), request("b", [6] * 60, **long))
            async for index, event in stream:
                outcomes[index].events.append(event)
                if engine.counters.preemptions:
                    engine.cancel("b")
            return outcomes

        first, second = asyncio.run(run())
    assert first.finished.reason == "length"
    assert second.finished.reason == "cancelled"
