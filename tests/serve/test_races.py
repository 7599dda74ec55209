"""What happens between two steps: names used again, ends that fail, prompts stopped half scored."""

from __future__ import annotations

import pytest
from serve_helpers import always_guess, finish, generate, request, running, stepped, submit

from quantkit.models.runtime import Runtime
from quantkit.serve.detokenizer import Detokenizer
from quantkit.serve.events import Failed


def test_a_late_cancellation_stops_nobody_else(native: Runtime) -> None:
    """It is asked for while the last token is made; the name is free again before it is read."""
    engine = stepped(native)
    first = submit(engine, request("a", [5, 6], max_tokens=1))
    engine._take_orders()
    engine.worker.begin = lambda sequence: (engine.cancel("a"), engine._begin(sequence))[1]
    engine.step()
    assert first.finished.reason == "length"
    second = submit(engine, request("a", [5, 6], max_tokens=1))
    engine.worker.begin = engine._begin
    finish(engine)
    assert second.finished.reason == "length"


def test_a_cancelled_text_that_cannot_be_finished_fails_alone(native: Runtime, monkeypatch) -> None:
    def broken(self: Detokenizer) -> str:
        raise RuntimeError("no text")

    engine = stepped(native)
    outcome = submit(engine, request("a", [5, 6], max_tokens=50))
    other = submit(engine, request("b", [5, 6], max_tokens=3))
    engine._take_orders()
    engine.step()
    engine.cancel("a")
    with monkeypatch.context() as patched:
        patched.setattr(Detokenizer, "finish", broken)
        engine._take_orders()
    assert "internal error" in outcome.terminal.message  # type: ignore[union-attr]
    finish(engine)
    assert other.finished.reason == "length"


def test_an_end_is_told_even_where_memory_is_unsound(native: Runtime, monkeypatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no such page")

    engine = stepped(native)
    outcomes = [submit(engine, request(name, [5, 6], max_tokens=50)) for name in "ab"]
    engine._take_orders()
    engine.step()
    monkeypatch.setattr(engine.memory, "release", broken)
    with pytest.raises(RuntimeError, match="no such page"):
        engine._fail_all(Failed("a step failed"))
    for outcome in outcomes:
        assert outcome.terminal.message == "a step failed"  # type: ignore[union-attr]
    assert engine.live == 0


def test_every_step_of_an_end_is_tried(native: Runtime, monkeypatch) -> None:
    """Memory that is unsound leaves the draft nothing to hold on to, and nobody waiting."""

    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no such page")

    always_guess(monkeypatch)
    engine = stepped(native, draft=native)
    outcome = submit(engine, request("a", [5, 6, 7], max_tokens=50))
    engine._take_orders()
    for _ in range(3):
        engine.step()
    draft = engine.speculator.model  # type: ignore[union-attr]
    assert draft.used_pages  # type: ignore[union-attr]
    monkeypatch.setattr(engine.scheduler, "remove", broken)
    with pytest.raises(RuntimeError, match="no such page"):
        engine._fail_all(Failed("a step failed"))
    assert draft.used_pages == 0  # type: ignore[union-attr]
    assert outcome.terminal.message == "a step failed"  # type: ignore[union-attr]
    assert engine.live == 0


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_prompt_stopped_half_scored_is_scored_as_if_it_had_not_been(
    native: Runtime, steps: int
) -> None:
    ids = [5 + i % 300 for i in range(150)]
    item = request("a", ids, max_tokens=3, logprobs=2, echo=True)
    with running(native, prefill_chunk=48) as threaded:
        [alone] = generate(threaded, item)
    engine = stepped(native, prefill_chunk=48)
    outcome = submit(engine, item)
    engine._take_orders()
    for _ in range(steps):
        engine.step()
    [sequence] = engine.scheduler.running
    assert 0 < len(sequence.prompt_logprobs) < len(ids)
    engine.scheduler._preempt(sequence)
    finish(engine)
    assert outcome.events[:-1] == alone.events[:-1]
    assert outcome.finished.prompt_tokens == 150
