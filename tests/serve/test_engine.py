"""The engine against `model.generate` and against its own promises."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve_helpers import (
    Outcome,
    assert_empty,
    before_forward,
    generate,
    oracle,
    request,
    running,
    wait_until,
)

from quantkit.errors import UsageError
from quantkit.models.page_pool import PagedSequence
from quantkit.models.runtime import Runtime
from quantkit.serve.engine import Engine, EngineConfig, QueueFullError, StoppedError
from quantkit.serve.events import Failed, Finished, PromptScored, TokenEvent
from quantkit.serve.policy.order import FirstCome
from quantkit.serve.request import ContextOverflowError, RequestError
from quantkit.serve.runner import DecoderRunner, ModuleRunner, Work

PROMPTS = [
    "The",
    "The quick brown fox",
    "how are you today? " * 8,
    "東京 🙂",
    "Thank you, I am well." * 3,
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_equals_generate(engine: Engine, runtime: Runtime, prompt: str) -> None:
    ids = runtime.tokenizer.encode(prompt)
    [outcome] = generate(engine, request("a", ids, max_tokens=40))
    expected = oracle(runtime, ids, 40)
    assert outcome.tokens == expected
    assert outcome.text == runtime.tokenizer.decode(expected, skip_special_tokens=True)
    assert outcome.finished.prompt_tokens == len(ids)
    assert outcome.finished.completion_tokens == len(expected)


def test_a_request_that_came_while_all_were_failed_is_over(runtime: Runtime) -> None:
    """It had its end before the thread took it in: taken in all the same, it would hold a slot."""
    engine = Engine(runtime, EngineConfig())
    engine._accepting = True
    events: list[object] = []
    engine.submit(request("a", [1, 2, 3], max_tokens=4), events.append)
    engine._fail_all(Failed("a step failed"))
    engine._stopping = True  # or it would wait for work
    engine._take_orders()
    assert not engine.scheduler.waiting
    assert [type(event) for event in events] == [Failed]
    assert_empty(engine)


def test_concurrent_requests_get_the_text_they_get_alone(engine: Engine, runtime: Runtime) -> None:
    """Eight at once on four slots, greedy and sampled: batching must not be visible."""
    requests = [
        request(
            f"r{i}",
            runtime.tokenizer.encode(PROMPTS[i % len(PROMPTS)]),
            temperature=float(i % 2),
            seed=i,
            max_tokens=20 + i,
            logprobs=2,
        )
        for i in range(8)
    ]
    alone = [generate(engine, item)[0] for item in requests]
    together = generate(engine, *requests)
    for one, many in zip(alone, together, strict=True):
        assert many.events == one.events  # bit for bit: tokens, text and log-probabilities


def test_seed_decides_the_text(engine: Engine, runtime: Runtime) -> None:
    ids = runtime.tokenizer.encode("The quick")

    def tokens(name: str, seed: int | None) -> list[int]:
        item = request(name, ids, temperature=1.0, seed=seed, max_tokens=24)
        return generate(engine, item)[0].tokens

    assert tokens("a", 7) == tokens("b", 7)
    assert tokens("c", 7) != tokens("d", 8)
    assert tokens("e", None) != tokens("f", None)


def test_stop_string_across_tokens(engine: Engine, runtime: Runtime) -> None:
    ids = runtime.tokenizer.encode("The quick")
    [free] = generate(engine, request("a", ids, max_tokens=40))
    stop = free.text[7:12]  # cuts through token boundaries wherever they are
    first = free.text.index(stop)
    [outcome] = generate(engine, request("b", ids, max_tokens=40, stop=("never", stop)))
    assert outcome.text == free.text[:first]
    assert outcome.finished.reason == "stop"


def test_eos_ends_with_stop(engine: Engine, runtime: Runtime, monkeypatch) -> None:
    ids = runtime.tokenizer.encode("The quick")
    third = oracle(runtime, ids, 3)[2]
    monkeypatch.setattr(engine, "_eos", frozenset({third}))
    [outcome] = generate(engine, request("a", ids, max_tokens=40))
    assert outcome.finished.reason == "stop"
    assert outcome.tokens[-1] == third


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
def test_prompt_logprobs_equal_a_direct_forward(
    engine: Engine, runtime: Runtime, length: int
) -> None:
    """On both sides of the chunk size of 16."""
    ids = torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    [outcome] = generate(engine, request("a", ids, echo=True, logprobs=3, max_tokens=1))
    scored, token, finished = outcome.events
    assert isinstance(scored, PromptScored)
    assert isinstance(token, TokenEvent)
    assert isinstance(finished, Finished)
    with torch.inference_mode():
        expected = runtime.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert [entry.token_id for entry in scored.logprobs] == ids
    assert scored.logprobs[0].logprob is None
    for row, entry in zip(expected, scored.logprobs[1:], strict=False):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        assert [logprob for _, logprob in entry.top] == pytest.approx(
            row.topk(3).values.tolist(), abs=1e-4
        )
    assert token.logprob is not None
    assert token.logprob.logprob == pytest.approx(expected[-1].max().item(), abs=1e-4)


def test_max_tokens_zero_only_scores(engine: Engine, runtime: Runtime) -> None:
    item = request("a", [5, 6, 7], echo=True, logprobs=1, max_tokens=0)
    [outcome] = generate(engine, item)
    assert isinstance(outcome.events[0], PromptScored)
    assert outcome.tokens == []
    assert outcome.finished.reason == "length"


def test_requests_that_can_never_run(engine: Engine) -> None:
    limit = engine.capacity.max_context
    with pytest.raises(ContextOverflowError, match=f"{limit - 4} tokens.*together {limit + 1}"):
        engine.check(request("a", [5] * (limit - 4), max_tokens=5))
    engine.check(request("a", [5] * (limit - 4), max_tokens=4))
    with pytest.raises(RequestError, match="empty"):
        engine.check(request("a", []))
    for bad in (-1, 10**9):
        with pytest.raises(RequestError, match="token ids"):
            engine.check(request("a", [bad]))


def test_cancel_gives_one_terminal_event_and_frees(engine: Engine, runtime: Runtime) -> None:
    async def run() -> Outcome:
        outcome = Outcome([])
        async for _, event in engine.stream(request("a", [5, 6], max_tokens=400)):
            outcome.events.append(event)
            if len(outcome.events) == 3:
                engine.cancel("a")
                engine.cancel("a")
                engine.cancel("unknown")
        return outcome

    outcome = asyncio.run(run())
    assert outcome.finished.reason == "cancelled"
    assert len(outcome.tokens) < 400
    assert_empty(engine)


def test_closing_a_stream_cancels(engine: Engine) -> None:
    async def run() -> None:
        stream = engine.stream(*(request(f"r{i}", [5, 6], max_tokens=400) for i in range(6)))
        async for _ in stream:
            break
        stream.close()

    asyncio.run(run())
    assert_empty(engine)


def test_a_reader_whose_loop_has_closed_is_no_leak(engine: Engine) -> None:
    async def run() -> None:
        engine.stream(request("a", [5, 6], max_tokens=400))  # and leave without closing

    asyncio.run(run())
    assert_empty(engine)


def test_exception_fails_one_request_and_the_engine_lives(
    engine: Engine, runtime: Runtime, monkeypatch
) -> None:
    ids = runtime.tokenizer.encode("The quick")
    [before] = generate(engine, request("before", ids))

    def broken(token_ids: list[int]) -> None:
        if token_ids[:1] == [9]:
            raise RuntimeError("secret detail")

    before_forward(monkeypatch, engine.runner, broken)
    good, bad = generate(engine, request("good", ids), request("bad", [9, 9]))
    assert bad.events == [bad.terminal]
    assert isinstance(bad.terminal, Failed)
    assert "secret" not in bad.terminal.message
    assert good.events == before.events
    assert generate(engine, request("next", ids))[0].events == before.events
    assert engine.alive
    assert engine.ready
    assert_empty(engine)


def test_logits_that_are_not_finite_fail_the_request(engine: Engine, monkeypatch) -> None:
    run = engine.runner.run
    monkeypatch.setattr(engine.runner, "run", lambda works: [x * torch.nan for x in run(works)])
    for temperature in (0.0, 1.0):
        [outcome] = generate(engine, request("a", [5], temperature=temperature))
        assert isinstance(outcome.terminal, Failed)
        assert "not finite" in outcome.terminal.message


def test_scheduler_failure_fails_all_and_the_engine_lives(engine: Engine, monkeypatch) -> None:
    monkeypatch.setattr(engine.scheduler, "schedule", lambda now: 1 / 0)
    for outcome in generate(engine, request("a", [5]), request("b", [6])):
        assert isinstance(outcome.terminal, Failed)
    monkeypatch.undo()
    assert isinstance(generate(engine, request("c", [5]))[0].terminal, Finished)


def test_queue_is_bounded_and_ids_are_unique(runtime: Runtime) -> None:
    engine = Engine(runtime, EngineConfig(max_sequences=1, max_queue=2))
    engine._accepting = True  # intake without a thread: nothing moves
    engine.submit(request("a", [5]), lambda event: None)
    with pytest.raises(RequestError, match="in use"):
        engine.submit(request("a", [5]), lambda event: None)
    engine.submit(request("b", [5]), lambda event: None)
    with pytest.raises(QueueFullError):
        engine.submit(request("c", [5]), lambda event: None)


def test_drain_lets_running_requests_finish(engine: Engine) -> None:
    events: list[object] = []
    engine.submit(request("a", [5, 6], max_tokens=50), events.append)
    assert engine.drain(20)
    assert isinstance(events[-1], Finished)
    assert len(events) == 51
    assert not engine.ready
    with pytest.raises(StoppedError):
        engine.submit(request("b", [5]), events.append)


def test_abort_fails_what_is_live(engine: Engine) -> None:
    events: list[object] = []
    engine.submit(request("a", [5, 6], max_tokens=500), events.append)
    wait_until(lambda: len(events) > 2)
    assert not engine.drain(0)
    engine.abort()
    assert engine.drain(5)
    assert isinstance(events[-1], Failed)
    assert events[-1].shutdown
    assert sum(isinstance(event, Finished | Failed) for event in events) == 1


def test_stop_without_a_start(runtime: Runtime) -> None:
    assert Engine(runtime).stop()


def test_a_hung_step_is_not_ready(runtime: Runtime, monkeypatch) -> None:
    engine = Engine(runtime, EngineConfig(stall_seconds=0.1)).start()
    release = threading.Event()
    before_forward(monkeypatch, engine.runner, lambda token_ids: release.wait(20))
    assert engine.ready
    engine.submit(request("a", [5]), lambda event: None)
    wait_until(lambda: not engine.ready)
    release.set()
    assert engine.drain(10)
    assert engine.stop()


def test_explicit_context_is_a_promise(runtime: Runtime, monkeypatch) -> None:
    with pytest.raises(UsageError, match="not between 2 and the model's 512"):
        Engine(runtime, EngineConfig(max_context=513))
    monkeypatch.setattr("quantkit.serve.kv_cache._free_memory", lambda device: 2 * 512 * 100)
    with pytest.raises(UsageError, match="lower --max-context"):
        Engine(runtime, EngineConfig(max_context=101))
    # 2 (K and V) x 2 layers x 2 heads x 16 x 4 bytes = 512 bytes a token, half of memory.
    assert Engine(runtime).capacity.max_context == 100


def test_kv_dtype(native: Runtime, runtime: Runtime) -> None:
    item = request("a", [5 + i for i in range(80)], max_tokens=12, logprobs=0)
    answers, sizes = [], []
    for dtype in ("auto", "fp32", "int8"):
        with running(native, kv_cache_dtype=dtype) as engine:
            answers.append(generate(engine, item)[0].events)
            sizes.append(engine.runner.nbytes(PagedSequence(1, [0])))
            suffix = "" if dtype == "auto" else f"+kv-{dtype}"
            assert engine.runtime.fingerprint["kernels"] == f"reference/f32{suffix}"
    assert answers[0] == answers[1] != answers[2]
    assert sizes[0] == sizes[1] == 64 * 512 > sizes[2]
    with pytest.raises(UsageError, match="needs the native decoder"):
        Engine(runtime, EngineConfig(kv_cache_dtype="int8"))
    with pytest.raises(UsageError, match="'int4' is not auto"):
        Engine(native, EngineConfig(kv_cache_dtype="int4"))


def test_kv_cache_tokens_hold_the_longest_request(native: Runtime) -> None:
    engine = Engine(native, EngineConfig(max_context=100, kv_cache_tokens=300))
    assert (engine.capacity.max_context, engine.memory.total) == (100, 256)
    assert Engine(native, EngineConfig(kv_cache_tokens=300)).capacity.max_context == 300
    with pytest.raises(UsageError, match="not between one request's 100"):
        Engine(native, EngineConfig(max_context=100, kv_cache_tokens=99))


def test_a_policy_may_let_nobody_start_for_a_while(native: Runtime) -> None:
    class Gate(FirstCome):
        open = False

        def waiting_order(self, waiting, running, now):  # type: ignore[no-untyped-def]
            return super().waiting_order(waiting, running, now) if self.open else ()

    gate = Gate()
    events: list[object] = []
    with running(native, gate) as engine:
        engine.submit(request("a", [5]), events.append)
        time.sleep(0.05)
        assert (engine.running, engine.queued, events) == (0, 1, [])
        gate.open = True
        assert engine.drain(20)
    assert isinstance(events[-1], Finished)


def test_what_is_computed_one_by_one_stays(
    native: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes write their logits to the same memory; where one fails, each work has its own."""
    assert native.decoder is not None
    runner = DecoderRunner(native.decoder, 1024)
    together = runner.run([Work(runner.new_cache(), [5, 6]), Work(runner.new_cache(), [7])])
    expected = [result.clone() for result in together if isinstance(result, torch.Tensor)]
    logits = runner._paged.logits

    def one_at_a_time(works: list) -> list[torch.Tensor]:
        if len(works) > 1:
            raise RuntimeError("too many")
        return logits(works)

    monkeypatch.setattr(runner._paged, "logits", one_at_a_time)
    alone = runner.run([Work(runner.new_cache(), [5, 6]), Work(runner.new_cache(), [7])])
    assert len(expected) == len(alone) == 2
    for mine, theirs in zip(alone, expected, strict=True):
        assert isinstance(mine, torch.Tensor)
        assert torch.equal(mine, theirs)


def test_kv_bytes_are_what_the_config_says(runtime: Runtime) -> None:
    from quantkit.serve.kv_cache import bytes_per_token

    runner = ModuleRunner(runtime.model)
    cache = runner.new_cache()
    assert (len(cache), runner.nbytes(cache)) == (0, 0)
    runner.run([Work(cache, [5, 6, 7])])
    runner.run([Work(cache, [8])])
    assert (len(cache), runner.nbytes(cache)) == (4, 4 * bytes_per_token(runtime.model))
    runner.release(cache)
    assert (len(cache), runner.nbytes(cache)) == (0, 0)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    plan=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 12), st.integers(0, 20)), max_size=8)
)
def test_every_request_ends_exactly_once(engine: Engine, plan: list[tuple[int, int, int]]) -> None:
    """Whatever is asked and cancelled when: one terminal event each, and nothing left behind."""
    requests = [
        request(f"r{i}", [5 + i] * prompt, max_tokens=new)
        for i, (prompt, new, _) in enumerate(plan)
    ]

    async def run() -> list[Outcome]:
        outcomes = [Outcome([]) for _ in requests]
        seen = 0
        async for index, event in engine.stream(*requests):
            outcomes[index].events.append(event)
            seen += 1
            for i, (_, _, when) in enumerate(plan):
                if when == seen:
                    engine.cancel(f"r{i}")
        return outcomes

    for outcome, (_, new, _) in zip(asyncio.run(run()), plan, strict=True):
        assert outcome.finished.reason in {"stop", "length", "cancelled"}
        assert len(outcome.tokens) <= new
    assert_empty(engine)


def test_time_to_first_token_is_counted_once(engine: Engine) -> None:
    before = time.monotonic()
    generate(engine, request("a", [5] * 40, max_tokens=5))
    text = engine.metrics.render().decode()
    assert "quantkit_time_to_first_token_seconds_count 1.0" in text
    assert "quantkit_prompt_tokens_total 40.0" in text
    assert "quantkit_generated_tokens_total 5.0" in text
    assert 'quantkit_requests_total{outcome="length"} 1.0' in text
    assert "quantkit_kv_bytes 0.0" in text
    assert time.monotonic() - before < 30
