"""Tiers under overload on the real engine: what paid requests notice of free ones.

    python -m benchmarks.serve_tiers CKPT [--rounds 6] [--seconds 60] [--load 1.5] [-o FILE]

Paid requests are 20 % of the arrivals, a Poisson process at a multiple of what the engine can
finish, which is measured first: while requests wait, so that all slots are taken; what the
overloaded engine finished then tells whether that held (``load_measured``). Times are from
the scheduled arrival, through `serve.door.Door`: admission, policy and engine as in a server,
without HTTP. In a round the same arrivals are served one way after the other, in turn, so that
what is compared runs within minutes:

    paid alone   the tiers' policy with nobody else there: the unloaded value
    first come   first come, first served
    tiers        the tiers' policy, everybody let in
    + admission  the same, and requests that would be late are refused at the door

A round begins with free requests that wait already, and its first seconds do not count: an
overload that has only begun is none. It ends when every paid request that counts has its first
token, so the times of the paid tier are exact; after ``--patience`` seconds more, or for the free
tier, what still waits counts as that old, which is a lower bound. A p99 needs some hundred paid
requests: about ``rounds · (seconds − settle) · load · saturation / 5``. The ratio's bounds resample
the paid requests that counted, each with its time alone and beside the others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from pathlib import Path

from benchmarks.tier_load import Workload, make_tiers, show, summary, tier_of
from quantkit.loadtest.draw import draw_ids
from quantkit.loadtest.row import quantile
from quantkit.models.load import load_runtime
from quantkit.models.runtime import Runtime
from quantkit.ops.measure import cpu_name
from quantkit.serve.config import ServeConfig
from quantkit.serve.door import Door, RefusedError
from quantkit.serve.engine import Engine, EngineConfig
from quantkit.serve.events import Finished, TokenEvent
from quantkit.serve.policy.order import FirstCome, Policy
from quantkit.serve.policy.tiered import Tiered
from quantkit.serve.request import Request, SamplingParams

#: Samples of the ratio's bounds.
BOOTSTRAP = 2000


@dataclass
class Arrival:
    """A request to send, and what became of it; times are seconds from the start."""

    at: float
    tenant: str
    prompt_ids: tuple[int, ...]
    answer_tokens: int
    counts: bool = True
    first: float | None = None
    end: float | None = None
    given_up: float | None = None
    refused: bool = False
    tokens: int = 0

    @property
    def tier(self) -> str:
        return tier_of(self.tenant)

    @property
    def ttft(self) -> float:
        until = self.given_up if self.first is None else self.first
        assert until is not None, "it is neither answered nor given up"
        return until - self.at


def make_arrivals(
    workload: Workload, options: argparse.Namespace, vocab: int, rate: float, seed: str
) -> list[Arrival]:
    """Free requests that wait from the start, then a Poisson process; no two prompts alike."""
    rng = random.Random(seed)
    waiting = make_crowd(workload, vocab, options.backlog, rng)
    drawn = takewhile(lambda one: one[0] < options.seconds, workload.arrivals(rng, rate))
    later = [
        Arrival(at, who, draw_ids(rng, workload.prompt_tokens, vocab), answer, at >= options.settle)
        for at, who, answer in drawn
    ]
    return waiting + later


def make_crowd(workload: Workload, vocab: int, count: int, rng: random.Random) -> list[Arrival]:
    """Free requests that are all there at once; they do not count."""
    return [
        Arrival(
            0.0,
            f"free-{i % workload.free_tenants}",
            draw_ids(rng, workload.prompt_tokens, vocab),
            answer,
            counts=False,
        )
        for i, (_, _, answer) in enumerate(islice(workload.arrivals(rng, 1.0), count))
    ]


async def send(door: Door, access: ServeConfig, arrival: Arrival, start: float, name: str) -> None:
    """Wait for its time, send it, and note when its tokens come."""
    await asyncio.sleep(max(0.0, start + arrival.at - time.monotonic()))
    sampling = SamplingParams(temperature=0, max_tokens=arrival.answer_tokens, ignore_eos=True)
    request = Request(name, arrival.prompt_ids, sampling, arrival=start + arrival.at)
    tenant = next(t for t in access.tenants if t.name == arrival.tenant)
    try:
        stream = await door.open(tenant, [request], [None])
    except RefusedError:
        arrival.refused = True
        return
    try:
        async for _, event in stream:
            if isinstance(event, TokenEvent):
                arrival.tokens += 1
                if arrival.first is None:
                    arrival.first = time.monotonic() - start
            elif isinstance(event, Finished):
                assert arrival.tokens == arrival.answer_tokens, "an answer of another length"
                arrival.end = time.monotonic() - start
    finally:
        stream.close()


async def serve(
    engine: Engine, access: ServeConfig, arrivals: Sequence[Arrival], patience: float | None
) -> None:
    """Serve arrivals: all to their end, or until those paid that count have their first token."""
    door, start = Door(engine, access), time.monotonic()
    tasks = [
        asyncio.create_task(send(door, access, arrival, start, f"r{i}"))
        for i, arrival in enumerate(arrivals)
    ]
    latest = None if patience is None else max(a.at for a in arrivals) + patience

    def open_still(arrival: Arrival) -> bool:
        wanted = latest is None or (arrival.counts and arrival.tier == "paid")
        over = arrival.end if latest is None else arrival.first
        return wanted and over is None and not arrival.refused

    while any(map(open_still, arrivals)):
        now = time.monotonic() - start
        if latest is not None and now > latest:
            break
        for task in tasks:
            if task.done():
                task.result()  # an error ends the benchmark
        await asyncio.sleep(0.02)
    gave_up = time.monotonic() - start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    while engine.live:
        await asyncio.sleep(0.01)
    for arrival in arrivals:
        if arrival.first is None and not arrival.refused:
            arrival.given_up = max(gave_up, arrival.at)


def run(
    runtime: Runtime,
    options: argparse.Namespace,
    arrivals: Iterable[Arrival],
    policy: Policy,
    promise: float | None = None,
    patience: float | None = None,
) -> list[Arrival]:
    """A fresh engine serves copies of the arrivals."""
    limits = EngineConfig(
        max_sequences=options.max_sequences,
        prefill_chunk=options.prefill_chunk,
        max_queue=sys.maxsize,  # whom to refuse is the door's business here
    )
    tiers = make_tiers(promise, None if promise is None else 20 * promise)
    access = ServeConfig(tiers, Workload().tenants, (), frozenset())
    engine = Engine(runtime, limits, policy).start()
    mine = [replace(arrival) for arrival in arrivals]
    try:
        asyncio.run(serve(engine, access, mine, patience))
    finally:
        engine.stop()
    return mine


def measure_saturation(served: Sequence[Arrival]) -> float:
    """Requests a second of a crowd, while more of it waited.

    From the first end on, when slots were taken by requests of every age, until the last one got
    its first token: what fills the slots at first and empties them at last is no saturation.
    """
    ends = sorted(a.end for a in served if a.end is not None)
    begin, end = ends[0], max(a.first for a in served if a.first is not None)
    return sum(begin < t <= end for t in ends) / (end - begin)


def bounds(alone: Sequence[float], beside: Sequence[float], share: float) -> tuple[float, float]:
    """95 % of the bootstrap of a ratio of quantiles; times of the same requests, in one order."""
    rng, pairs = random.Random(0), list(zip(beside, alone, strict=True))
    ratios = []
    for _ in range(BOOTSTRAP):
        drawn = rng.choices(pairs, k=len(pairs))
        ratios.append(
            quantile([b for b, _ in drawn], share) / quantile([a for _, a in drawn], share)
        )
    return quantile(ratios, 0.025), quantile(ratios, 0.975)


def compare(runtime: Runtime, options: argparse.Namespace) -> dict:
    """Everything that is measured, as `main` prints it."""
    workload = Workload(prompt_tokens=options.prompt_tokens, answer_tokens=options.answer_tokens)
    vocab = int(runtime.model.config.get_text_config().vocab_size)
    tiers, rng = make_tiers(None, None), random.Random("crowd")
    # A lone request tells the promise; it is sent twice, and the first one warms up.
    for _ in range(2):
        [lone] = run(runtime, options, make_crowd(workload, vocab, 1, rng), FirstCome())
    crowd = make_crowd(workload, vocab, options.crowd, rng)
    full = measure_saturation(run(runtime, options, crowd, FirstCome()))
    print(f"alone: TTFT {lone.ttft:.2f} s; saturation {full:.2f}/s", file=sys.stderr, flush=True)
    ways = {
        "paid alone": (lambda: Tiered(tiers), None),
        "first come": (FirstCome, None),
        "tiers": (lambda: Tiered(tiers), None),
        "+ admission": (lambda: Tiered(tiers), 3 * lone.ttft),
    }
    served: dict[str, list[Arrival]] = {name: [] for name in ways}
    for number in range(options.rounds):
        arrivals = make_arrivals(workload, options, vocab, options.load * full, f"round {number}")
        paid = [a for a in arrivals if a.tier == "paid"]
        order = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        for name in order:
            policy, promise = ways[name]
            given = paid if name == "paid alone" else arrivals
            served[name] += run(runtime, options, given, policy(), promise, options.patience)
            print(f"round {number + 1} {name}", file=sys.stderr, flush=True)
    counted = {name: [a for a in rows if a.counts] for name, rows in served.items()}
    paid_times = {
        name: [a.ttft for a in rows if a.tier == "paid"]
        for name, rows in counted.items()
        if name != "+ admission"
    }
    unloaded = quantile(paid_times["paid alone"], 0.99)
    ratios = {}
    for name in ("first come", "tiers"):
        low, high = bounds(paid_times["paid alone"], paid_times[name], 0.99)
        ratio = quantile(paid_times[name], 0.99) / unloaded
        ratios[name] = {"p99": ratio, "lower": low, "upper": high}
    span = options.rounds * (options.seconds - options.settle)
    finished = {
        name: sum(options.settle < (a.end or 0.0) <= options.seconds for a in served[name]) / span
        for name in ways
    }
    if not finished["first come"]:
        raise SystemExit("nothing was finished in the seconds that count; raise --seconds")
    late = {n: sum(a.first is None and not a.refused for a in r) for n, r in counted.items()}
    return {
        "settings": vars(options) | {"checkpoint": Path(options.checkpoint).name, "output": None},
        "host": {"cpu": cpu_name()},
        "kernels": runtime.fingerprint.get("kernels"),
        "alone": {"ttft": lone.ttft, "saturation": full},
        "ways": {name: summary(rows) for name, rows in counted.items()},
        "finished_per_second": finished,
        "load_measured": options.load * full / finished["first come"],
        "without_token": late,
        "paid_p99_over_alone": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=60.0, help="of a round, each way")
    parser.add_argument("--settle", type=float, default=10.0, help="of those, not counted")
    parser.add_argument("--backlog", type=int, default=32, help="free requests that wait at first")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds after a round")
    parser.add_argument("--load", type=float, default=1.5, help="multiple of saturation")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--answer-tokens", type=int, default=64, help="mean")
    parser.add_argument("--max-sequences", type=int, default=16)
    parser.add_argument("--prefill-chunk", type=int, default=128)
    parser.add_argument("--crowd", type=int, default=96, help="requests that tell saturation")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = compare(load_runtime(options.checkpoint), options)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    if options.json:
        print(json.dumps(results, indent=1))
        return
    alone = results["alone"]
    print(f"{results['host']['cpu']}; {results['kernels']}")
    print(f"one request alone: TTFT {alone['ttft']:.2f} s; saturation {alone['saturation']:.2f}/s")
    show(results["ways"])
    print(f"load, by what first come finished: {results['load_measured']:.2f} times saturation")
    for name, ratio in results["paid_p99_over_alone"].items():
        least = "at least " if results["without_token"][name] and name == "first come" else ""
        print(
            f"{name}: paid p99 is {least}{ratio['p99']:.2f} times its unloaded value "
            f"(95 %: {ratio['lower']:.2f} … {ratio['upper']:.2f})"
        )


if __name__ == "__main__":
    main()
