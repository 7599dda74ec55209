"""Faults against a server, one after the other, and what must hold after each of them.

    python -m benchmarks.soak CKPT [--minutes 30] [--clients 6] [--seed 0]

The real server answers on a socket. Clients ask it the same questions all the time, greedily, so
their answers are known to the letter. Beside them a round injects one of `soak_faults.FAULTS`. In
each round:

- a client gets its known answer, or, where the fault breaks the engine, an error, and never half
  an answer that looks whole;
- every request has exactly one terminal event, and nothing after it;
- when all is quiet, nothing is live, runs or waits, and every page has gone back;
- from the first pass through all faults on, memory, threads and open files no longer grow;
- the server is ready, unless work does not move forward: then it says so, and lives.

In the end SIGTERM comes while answers stream: they are finished, and the server ends. The first
thing that does not hold ends the run with exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx

from benchmarks.soak_faults import BREAKING, FAULTS
from benchmarks.soak_server import (
    COMPLETIONS,
    BrokenError,
    Footprint,
    Soak,
    body_of,
    hold,
    replaced,
    serving,
    wait_for,
)
from quantkit.models.load import load_runtime
from quantkit.models.runtime import Runtime

PROMPTS = tuple(f"Question {i}: what is the capital of country {i}? Answer:" for i in range(8))
NOBODY_WAITS = 'quantkit_tier_requests_waiting{tier="default"} 0.0'


async def ask(soak: Soak, prompt: str, *, stream: bool) -> str | None:
    """An answer's text, or None where the server says that it failed."""
    async with soak.client() as client:
        response = await client.post(COMPLETIONS, json=body_of(prompt, stream=stream))
    if response.status_code == 500:
        return None
    hold(response.status_code == 200, f"status {response.status_code}: {response.text[:200]}")
    if not stream:
        return response.json()["choices"][0]["text"]
    hold(response.text.endswith("data: [DONE]\n\n"), "a stream without its end")
    events = [json.loads(s[6:]) for s in response.text.splitlines() if s.startswith("data: {")]
    if any("error" in event for event in events):
        return None
    choices = [choice for event in events for choice in event["choices"]]
    ends = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    hold(ends == ["length"], f"a stream with the ends {ends}")
    return "".join(choice["text"] for choice in choices)


async def talk(soak: Soak, stop: asyncio.Event, may_fail: bool) -> None:
    """One client: a question, its answer, the next one, until it is told to stop."""
    while not stop.is_set():
        prompt = soak.rng.choice(PROMPTS)
        text = await ask(soak, prompt, stream=soak.rng.random() < 0.5)
        if text is None:
            hold(may_fail, "a request failed, and no fault explains it")
            soak.answers["failed"] += 1
        else:
            hold(text == soak.expected[prompt], f"{prompt!r} got another answer: {text!r}")
            soak.answers["right"] += 1


async def play(soak: Soak, name: str, clients: int) -> None:
    """One fault beside the traffic; then silence, and what must hold in it."""
    stop = asyncio.Event()
    tasks = [asyncio.create_task(talk(soak, stop, name in BREAKING)) for _ in range(clients)]
    fault = asyncio.create_task(_fault(soak, name))
    try:
        # A client that found something wrong ends at once, and so does the round.
        done, _ = await asyncio.wait([fault, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        stop.set()
        await asyncio.gather(fault, *tasks)
    finally:
        for task in (fault, *tasks):
            task.cancel()
        await asyncio.gather(fault, *tasks, return_exceptions=True)
    await check_quiet(soak)


async def _fault(soak: Soak, name: str) -> None:
    """Once requests are under way."""
    await wait_for(lambda: soak.engine.running > 0)
    await FAULTS[name](soak)


async def check_quiet(soak: Soak) -> None:
    """Nothing is left of what was."""
    engine, ledger = soak.engine, soak.ledger
    await wait_for(lambda: engine.live == 0)
    left = (engine.running, engine.queued, engine.memory.used)
    hold(left == (0, 0, 0), f"running, queued and tokens held when quiet: {left}")
    hold(not ledger.open, f"without a terminal event: {sorted(ledger.open)[:5]}")
    hold(not ledger.late, f"events after the terminal one: {ledger.late[:5]}")
    twice = [name for name, count in ledger.ended.items() if count != 1]
    hold(not twice, f"several terminal events: {twice[:5]}")
    async with soak.client() as client:
        hold((await client.get("/ready")).status_code == 200, "quiet, and not ready")
        # The event loop hears of an end a moment after the engine said it.
        for _ in range(200):
            if NOBODY_WAITS in (await client.get("/metrics")).text:
                return
            await asyncio.sleep(0.01)
    hold(False, "requests wait in the books of the door, and nowhere else")


async def end_by_signal(soak: Soak, streams: int) -> None:
    """SIGTERM while answers stream: they are finished, and the server ends."""
    run = soak.engine.runner.run

    def slow(works: Any) -> Any:
        time.sleep(0.05)
        return run(works)

    # Slow enough that all are in before the first is over: who comes later finds nobody.
    with replaced(soak.engine.runner, "run", slow):
        asked = [
            asyncio.create_task(ask(soak, PROMPTS[i % len(PROMPTS)], stream=True))
            for i in range(streams)
        ]
        await wait_for(lambda: soak.engine.live == streams)
        soak.server.handle_exit(signal.SIGTERM, None)
        texts = await asyncio.gather(*asked)
    for i, text in enumerate(texts):
        hold(text == soak.expected[PROMPTS[i % len(PROMPTS)]], "a drained answer is another one")
    await asyncio.to_thread(soak.thread.join, 60)
    hold(not soak.thread.is_alive(), "the server did not end")
    hold(soak.server.cut == 0, f"{soak.server.cut} answers were cut")
    hold(not soak.ledger.open, "requests without a terminal event")


def run(
    runtime: Runtime,
    *,
    seconds: float,
    clients: int,
    seed: int,
    told: Callable[[str], None] = lambda line: None,
) -> Counter[str]:
    """Soak a server, every fault at least once; what clients got, by outcome.

    Raises:
        BrokenError: something that must hold does not.
    """

    async def everything(soak: Soak) -> None:
        for prompt in PROMPTS:
            text = await ask(soak, prompt, stream=False)
            hold(text is not None, "an idle server failed")
            soak.expected[prompt] = str(text)
        began, rounds = time.monotonic(), 0
        first: Footprint | None = None
        while rounds < len(FAULTS) or time.monotonic() - began < seconds:
            left = rounds % len(FAULTS)
            if left == 0:
                order = soak.rng.sample(list(FAULTS), len(FAULTS))
            await play(soak, order[left], clients)
            rounds += 1
            held = Footprint.now()
            if rounds % len(FAULTS) == 0:
                first = first or held
                grown = held.exceeds(first)
                hold(grown is None, f"quiet after {rounds} rounds: {grown}")
            told(
                f"{time.monotonic() - began:6.0f} s  round {rounds} {order[left]}: "
                f"{dict(soak.answers)}, {len(soak.ledger.ended)} requests, "
                f"{held.memory / 1e6:.0f} MB"
            )
        await end_by_signal(soak, 6)
        watched = len(soak.ledger.ended)
        hold(watched > soak.answers.total(), f"{watched} requests were watched, fewer than asked")

    with serving(runtime, seed) as soak:
        asyncio.run(everything(soak))
        return soak.answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        answers = run(
            load_runtime(options.checkpoint),
            seconds=60 * options.minutes,
            clients=options.clients,
            seed=options.seed,
            told=lambda line: print(line, flush=True),
        )
    except (BrokenError, httpx.HTTPError) as error:
        sys.exit(f"broken: {type(error).__name__}: {error}")
    print(f"all held: {dict(answers)}")


if __name__ == "__main__":
    main()
