"""Events reach their loop in order, a step's worth at once, whoever else is gone."""

from __future__ import annotations

import asyncio
import gc
import os
import threading

from serve_helpers import always_guess, request, stepped

from quantkit.models.runtime import Runtime
from quantkit.serve.events import Event, Finished, TokenEvent
from quantkit.serve.outbox import Bell, Outbox


class Reader:
    def __init__(self, fails: bool = False) -> None:
        self.events: list[tuple[int, Event]] = []
        self.closed = 0
        self.fails = fails

    def arrived(self, index: int, event: Event) -> None:
        if self.fails:
            raise RuntimeError("it cannot read")
        self.events.append((index, event))

    def close(self) -> None:
        self.closed += 1


def tokens(*ids: int) -> list[TokenEvent]:
    return [TokenEvent(i, str(i)) for i in ids]


def test_a_step_is_one_hand_over(native: Runtime, monkeypatch) -> None:
    """Three answers, one wake-up a step; the last events do not wait for a next step."""

    async def serve() -> list[tuple[int, Event]]:
        engine = stepped(native)
        wakes = 0
        ring = Bell.ring

        def counted(*arguments):
            nonlocal wakes
            wakes += 1
            return ring(*arguments)

        monkeypatch.setattr(Bell, "ring", counted)
        stream = engine.stream(
            *(request(name, [5, 6], max_tokens=4, ignore_eos=True) for name in "abc")
        )
        engine._take_orders()
        for step in range(3):
            engine.step()
            assert wakes == step
        engine.step()
        assert wakes == 3 + 3  # and the three ends
        return [item async for item in stream]

    events = asyncio.run(serve())
    for index in range(3):
        mine = [event for i, event in events if i == index]
        assert [type(event) for event in mine] == [TokenEvent] * 4 + [Finished]


def test_nothing_waits_for_a_draft_model(native: Runtime, monkeypatch) -> None:
    """Its passes come before the model's, and take their time."""
    always_guess(monkeypatch)

    async def serve() -> list[int]:
        engine = stepped(native, draft=native)
        guess, waiting = engine.speculator.model.guess, []  # type: ignore[union-attr]

        def watched(*arguments: list) -> list[list[int]]:
            waiting.append(len(engine.outbox._waiting))
            return guess(*arguments)

        monkeypatch.setattr(engine.speculator.model, "guess", watched)  # type: ignore[union-attr]
        engine.stream(request("a", [5, 6], max_tokens=9, ignore_eos=True))
        while engine.live:
            engine._take_orders()
            engine.step()
        return waiting

    waiting = asyncio.run(serve())
    assert waiting
    assert not any(waiting)


def test_one_who_cannot_read_disturbs_nobody(caplog) -> None:
    async def deliver() -> None:
        outbox, loop = Outbox(), asyncio.get_running_loop()
        for i, event in enumerate(tokens(1, 2, 3)):
            outbox.post(loop, bad if i == 1 else good, i, event)
        outbox.flush()
        outbox.flush()  # nothing twice
        await asyncio.sleep(0)

    good, bad = Reader(), Reader(fails=True)
    asyncio.run(deliver())
    assert [event.token_id for _, event in good.events] == [1, 3]
    assert "an event was not taken" in caplog.text


def test_events_come_in_order_from_another_thread() -> None:
    """More of them than the pipe holds rings, some while the loop is busy."""
    count = 70_000

    async def read() -> list[int]:
        outbox, loop = Outbox(), asyncio.get_running_loop()

        def post() -> None:
            for i in range(count):
                outbox.post(loop, reader, i, TokenEvent(i, ""))
                outbox.flush()

        writing = threading.Thread(target=post)
        writing.start()
        writing.join()
        while len(reader.events) < count:
            await asyncio.sleep(0)
        return [index for index, _ in reader.events]

    reader = Reader()
    assert asyncio.run(read()) == list(range(count))


def test_a_loop_that_is_gone_leaves_no_pipe() -> None:
    async def deliver() -> None:
        outbox.post(asyncio.get_running_loop(), Reader(), 0, *tokens(1))
        outbox.flush()
        await asyncio.sleep(0)

    def pipes() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    outbox, before = Outbox(), pipes()
    for _ in range(3):
        asyncio.run(deliver())
    assert pipes() == before


def test_readers_of_a_closed_loop_are_closed_once() -> None:
    outbox, reader = Outbox(), Reader()
    loop = asyncio.new_event_loop()
    for event in tokens(1, 2):
        outbox.post(loop, reader, 0, event)
    loop.close()
    outbox.flush()
    assert (reader.closed, reader.events) == (1, [])
