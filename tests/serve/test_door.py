"""The books on requests: what is measured, and what counts as late. An engine on command, and a
clock that is set."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
from serve_helpers import request

from quantkit.serve.config import ServeConfig
from quantkit.serve.door import Door
from quantkit.serve.events import Event, Failed, Finished, FinishReason, TokenEvent
from quantkit.serve.metrics import Metrics
from quantkit.serve.outbox import Outbox
from quantkit.serve.policy.tiers import Tenant, Tier
from quantkit.serve.request import Request, Sink

TENANT = Tenant("acme", "only")
PROMPT = [1] * 1000


class Commanded:
    """An engine that says what it is told to."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.grammars = self
        self.outbox = Outbox()
        self.sinks: dict[str, Sink] = {}

    def check(self, request: Request) -> None:
        pass

    async def attach_soon(self, request: Request) -> Request:
        return request

    def transcript(self, request: Request) -> Callable[[Event], Event]:
        return lambda event: event

    def enqueue(self, request: Request, sink: Sink) -> None:
        self.sinks[request.id] = sink

    def cancel(self, request_id: str) -> None:
        pass


class Case:
    """A door with one tenant; `at` says what the engine emits when."""

    def __init__(self) -> None:
        self.now = 0.0
        self.engine = Commanded()
        config = ServeConfig((Tier("only", ttft=1.5),), (TENANT,), (), frozenset())
        self.door = Door(self.engine, config, clock=lambda: self.now)  # type: ignore[arg-type]

    async def open(self, name: str, **sampling: object) -> None:
        asked = replace(request(name, PROMPT, **sampling), arrival=self.now)
        await self.door.open(TENANT, [asked], [None])

    async def at(self, now: float, name: str, *events: Event) -> None:
        self.now = now
        for event in events:
            self.engine.sinks[name](event)
        self.engine.outbox.flush()
        await asyncio.sleep(0)  # the event loop takes them


def finished(reason: FinishReason, tokens: int = 0) -> Finished:
    return Finished(reason, "", prompt_tokens=len(PROMPT), completion_tokens=tokens)


def play(script: Callable[[Case], Coroutine[Any, Any, None]]) -> Case:
    case = Case()
    asyncio.run(script(case))
    return case


def test_scored_prompts_are_measured_as_others_are() -> None:
    """They have no first token; counted as time without tokens they would shut everybody out."""

    async def script(case: Case) -> None:
        for i in range(60):
            name = f"r{i}"
            await case.open(name, max_tokens=0 if i else 1, logprobs=0, echo=True)
            await case.at(
                i + 1.0, name, *([] if i else [TokenEvent(5, "a")]), finished("length", int(not i))
            )

    admission = play(script).door.admission
    assert admission.wait(TENANT, len(PROMPT)) == pytest.approx(1.0)
    assert admission.waiting("only") == 0


def test_a_prompt_that_was_given_up_measures_nothing() -> None:
    async def script(case: Case) -> None:
        await case.open("r")
        await case.at(1.0, "r", finished("cancelled"))

    assert play(script).door.admission.wait(TENANT, 1) is None


@pytest.mark.parametrize(
    ("end", "now", "attained"),
    [
        (finished("cancelled"), 1.4, 1.0),  # nobody knows whether it would have been in time
        (finished("cancelled"), 1.6, 0.0),
        (finished("length"), 1.6, 1.0),  # scored: no token was promised
        (Failed("broken"), 0.1, 0.0),
        (Failed("its own fault", invalid=True), 0.1, 1.0),
    ],
)
def test_who_gives_up_when_it_is_late_was_let_down(
    end: Finished | Failed, now: float, attained: float
) -> None:
    async def script(case: Case) -> None:
        await case.open("r")
        await case.at(now, "r", end)

    assert play(script).door.traffic.attainment("only") == attained


@pytest.mark.parametrize(("first", "attained"), [(1.4, 1.0), (1.6, 0.0)])
def test_a_first_token_decides(first: float, attained: float) -> None:
    """Whatever comes after it."""

    async def script(case: Case) -> None:
        await case.open("r")
        await case.at(first, "r", TokenEvent(5, "a"))
        await case.at(9.0, "r", finished("cancelled", 1))

    assert play(script).door.traffic.attainment("only") == attained
