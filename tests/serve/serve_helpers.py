"""What the serving tests share beside fixtures."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from quantkit.models.runtime import Runtime
from quantkit.serve import speculation
from quantkit.serve.api.app import create_app
from quantkit.serve.api.server import Server, bind, url
from quantkit.serve.config import ServeConfig, open_config
from quantkit.serve.engine import Engine, EngineConfig
from quantkit.serve.events import Event, Failed, Finished, TokenEvent
from quantkit.serve.goodput import Credit, PassCost
from quantkit.serve.policy.order import Entry, Policy
from quantkit.serve.policy.tiered import Tiered
from quantkit.serve.request import Request, SamplingParams
from quantkit.serve.runner import DecoderRunner, ModuleRunner, Runner, Work


def assert_empty(engine: Engine) -> None:
    """Nothing live, nothing reserved."""
    wait_until(lambda: engine.live == 0)
    assert (engine.running, engine.queued, engine.memory.used) == (0, 0, 0)
    if engine.speculator is not None and engine.speculator.model is not None:
        assert engine.speculator.model.used_pages == 0


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@contextmanager
def running(
    runtime: Runtime,
    policy: Policy | None = None,
    draft: Runtime | None = None,
    **config: object,
) -> Iterator[Engine]:
    """An engine with its thread; stopped at the end, and nothing leaked."""
    engine = Engine(runtime, EngineConfig(**config), policy, draft).start()  # type: ignore[arg-type]
    try:
        yield engine
    finally:
        assert engine.stop(), "the engine thread did not end"
        assert_empty(engine)


class Scattered:
    """A policy without sense or mercy, that still says something valid each time."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def roll(self, below: int) -> int:
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 33) % below

    def waiting_order(self, waiting: Items[Entry], running: Items[Entry], now: float) -> list[int]:
        return sorted(range(len(waiting)), key=lambda i: self.roll(100))

    def prefill_order(self, running: Items[Entry], now: float) -> list[int]:
        prompts = [i for i, entry in enumerate(running) if entry.prompt_left]
        return sorted(prompts, key=lambda i: self.roll(100))

    def victim(self, running: Items[Entry], candidate: Entry | None, now: float) -> int | None:
        if candidate is not None and self.roll(3) == 0:
            return None
        return self.roll(len(running))

    def served(self, entry: Entry, tokens: int) -> None:
        assert tokens > 0


@dataclass
class Live:
    """A server on a real socket, in a thread."""

    engine: Engine
    server: Server
    url: str
    thread: threading.Thread


@contextmanager
def serving(
    runtime: Runtime,
    config: EngineConfig | None = None,
    *,
    drain_seconds: float = 10,
    access: ServeConfig | None = None,
    **options: object,
) -> Iterator[Live]:
    """A server; stopped at the end, and nothing leaked."""
    access = access or open_config()
    config = config or EngineConfig(max_sequences=4, prefill_chunk=16)
    engine = Engine(runtime, config, Tiered(access.tiers)).start()
    sock = bind("127.0.0.1", 0)
    up = threading.Event()
    app = create_app(engine, access=access, **options)  # type: ignore[arg-type]
    server = Server(app, engine, drain_seconds=drain_seconds, on_ready=up.set)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    assert up.wait(10)
    try:
        yield Live(engine, server, url(sock), thread)
    finally:
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive(), "the server did not end"
        assert engine.stop()
        assert_empty(engine)


@dataclass
class Outcome:
    """Everything that one request produced."""

    events: list[Event]

    @property
    def terminal(self) -> Finished | Failed:
        last = self.events[-1]
        assert isinstance(last, Finished | Failed)
        assert not any(isinstance(event, Finished | Failed) for event in self.events[:-1])
        return last

    @property
    def finished(self) -> Finished:
        assert isinstance(self.terminal, Finished), self.terminal
        return self.terminal

    @property
    def tokens(self) -> list[int]:
        return [event.token_id for event in self.events if isinstance(event, TokenEvent)]

    @property
    def text(self) -> str:
        return "".join(e.text for e in self.events if isinstance(e, TokenEvent | Finished))


def request(name: str, ids: list[int], **sampling: object) -> Request:
    """A request, greedy unless told otherwise."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, **sampling})  # type: ignore[arg-type]
    return Request(name, tuple(ids), params)


def generate(engine: Engine, *requests: Request) -> list[Outcome]:
    """Run requests at the same time and collect their events."""

    async def collect() -> list[Outcome]:
        outcomes = [Outcome([]) for _ in requests]
        async for index, event in engine.stream(*requests):
            outcomes[index].events.append(event)
        return outcomes

    return asyncio.run(asyncio.wait_for(collect(), 120))


def stepped(
    runtime: Runtime,
    policy: Policy | None = None,
    draft: Runtime | None = None,
    **config: object,
) -> Engine:
    """An engine without a thread: whoever tests it turns it."""
    engine = Engine(runtime, EngineConfig(**config), policy, draft)  # type: ignore[arg-type]
    engine._accepting = True
    return engine


def submit(engine: Engine, item: Request) -> Outcome:
    """Queue a request and collect its events as they come."""
    outcome = Outcome([])
    engine.submit(item, outcome.events.append)
    return outcome


def finish(engine: Engine) -> None:
    """Turn an engine without a thread until nothing is live."""
    while engine.live:
        engine._take_orders()
        engine.step()
    assert_empty(engine)


def always_guess(monkeypatch) -> None:
    """Guess whenever something can be guessed, whether it pays or not."""
    monkeypatch.setattr(speculation, "allot", lambda rates, limits, cost, **options: list(limits))
    monkeypatch.setattr(Credit, "open", True)
    monkeypatch.setattr(Credit, "affords", lambda self, seconds: True)
    monkeypatch.setattr(
        speculation.Speculator, "_prospect", lambda self, sequence, sequences: math.inf
    )
    monkeypatch.setattr(PassCost, "stale", lambda self, rows: False)


def oracle(runtime: Runtime, ids: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens from transformers itself."""
    prompt = torch.tensor([ids])
    output = runtime.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),  # else it hides every token equal to the padding
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return output[0, len(ids) :].tolist()


def before_forward(monkeypatch, runner: Runner, hook: Callable[[list[int]], None]) -> None:
    """Call ``hook`` with each work's token ids before a pass; what it raises breaks the pass."""
    if isinstance(runner, ModuleRunner):
        forward = runner._forward

        def one(work: Work) -> torch.Tensor:
            hook(list(work.token_ids))
            return forward(work)

        monkeypatch.setattr(runner, "_forward", one)
        return
    assert isinstance(runner, DecoderRunner)
    logits = runner._paged.logits

    def many(works) -> list[torch.Tensor]:
        for work in works:
            hook(list(work.token_ids))
        return logits(works)

    monkeypatch.setattr(runner._paged, "logits", many)
