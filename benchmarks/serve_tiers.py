"""Tiers under overload on the real engine: what paid requests notice of free ones.

    python -m benchmarks.serve_tiers CKPT [--seconds 60] [--load 1.5] [--json]

Paid requests are 20 % of the arrivals, a Poisson process at a multiple of what the engine can
finish, which is measured first. Times are from the scheduled arrival, through `serve.door.Door`:
admission, policy and engine as in a server, without HTTP. The same arrivals are served one way
after the other:

    paid alone   the tiers' policy with nobody else there: the unloaded value
    first come   first come, first served
    tiers        the tiers' policy, everybody let in
    + admission  the same, and requests that would be late are refused at the door

What still waits when the time is up is cancelled and counts as that old; so the times of an
overloaded tier are lower bounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.serve_tiers_simulation import quantile
from quantkit.models.load import load_runtime
from quantkit.models.runtime import Runtime
from quantkit.serve.config import ServeConfig
from quantkit.serve.door import Door, RefusedError
from quantkit.serve.engine import Engine, EngineConfig
from quantkit.serve.events import Finished, TokenEvent
from quantkit.serve.policy.order import FirstCome, Policy
from quantkit.serve.policy.tiered import Tiered
from quantkit.serve.policy.tiers import Tenant, Tier
from quantkit.serve.request import Request, SamplingParams

PAID_SHARE = 0.2
FREE_TENANTS = 4


@dataclass
class Arrival:
    """A request to send, and what became of it; times are seconds from the start."""

    at: float
    tenant: str
    prompt_ids: tuple[int, ...]
    answer_tokens: int
    ttft: float | None = None
    refused: bool = False
    tokens: int = 0

    @property
    def tier(self) -> str:
        return self.tenant.partition("-")[0]


def make_arrivals(options: argparse.Namespace, vocab: int, rate: float) -> list[Arrival]:
    """Random token ids, no two prompts alike: the prefix cache has nothing to find."""
    rng = random.Random(options.seed)
    arrivals, now = [], 0.0
    while (now := now + rng.expovariate(rate)) < options.seconds:
        paid = rng.random() < PAID_SHARE
        tenant = "paid-0" if paid else f"free-{rng.randrange(FREE_TENANTS)}"
        ids = tuple(rng.randrange(vocab) for _ in range(options.prompt_tokens))
        mean = options.answer_tokens
        length = min(1 + int(rng.expovariate(1 / mean)), 4 * mean)
        arrivals.append(Arrival(now, tenant, ids, length))
    return arrivals


def make_access(ttft: float | None) -> ServeConfig:
    """Two tiers; ``ttft`` is promised to the paid one, and twenty times that to the other."""
    tiers = (Tier("paid", 8.0, ttft), Tier("free", 1.0, None if ttft is None else 20 * ttft))
    names = ["paid-0", *(f"free-{i}" for i in range(FREE_TENANTS))]
    tenants = tuple(Tenant(name, name.partition("-")[0]) for name in names)
    return ServeConfig(tiers, tenants, (), frozenset())


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
                if arrival.ttft is None:
                    arrival.ttft = time.monotonic() - start - arrival.at
            elif isinstance(event, Finished):
                assert arrival.tokens == arrival.answer_tokens, "an answer of another length"
    finally:
        stream.close()


async def serve(engine: Engine, access: ServeConfig, arrivals: list[Arrival], end: float) -> float:
    """Serve arrivals for ``end`` seconds at most; the seconds that it took."""
    door, start = Door(engine, access), time.monotonic()
    tasks = [
        asyncio.create_task(send(door, access, arrival, start, f"r{i}"))
        for i, arrival in enumerate(arrivals)
    ]
    done, waiting = await asyncio.wait(tasks, timeout=end)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    while engine.live:
        await asyncio.sleep(0.01)
    for task in done:
        task.result()
    return time.monotonic() - start


def run(
    runtime: Runtime,
    options: argparse.Namespace,
    arrivals: Sequence[Arrival],
    policy: Policy,
    ttft: float | None,
    end: float,
) -> tuple[list[Arrival], float]:
    """A fresh engine serves copies of the arrivals."""
    limits = EngineConfig(max_sequences=options.max_sequences, prefill_chunk=options.prefill_chunk)
    engine = Engine(runtime, limits, policy).start()
    mine = [replace(arrival) for arrival in arrivals]
    try:
        seconds = asyncio.run(serve(engine, make_access(ttft), mine, end))
    finally:
        engine.stop()
    return mine, seconds


def summary(arrivals: Sequence[Arrival], end: float) -> dict[str, dict[str, float]]:
    """Tier → requests, refused, and times to the first token of the others."""
    rows = {}
    for tier in ("paid", "free"):
        mine = [a for a in arrivals if a.tier == tier]
        served = [end - a.at if a.ttft is None else a.ttft for a in mine if not a.refused]
        if served:
            waiting = sum(a.ttft is None and not a.refused for a in mine)
            rows[tier] = {"requests": len(mine), "refused": len(mine) - len(served)}
            rows[tier] |= {"waiting": waiting}
            rows[tier] |= {f"ttft_p{int(100 * q)}": quantile(served, q) for q in (0.5, 0.9, 0.99)}
    return rows


def compare(runtime: Runtime, options: argparse.Namespace) -> dict[str, dict]:
    vocab = int(runtime.model.config.get_text_config().vocab_size)
    tiers = make_access(None).tiers
    # A lone request tells the promise; everybody at once tells the saturation.
    one = [replace(make_arrivals(options, vocab, 1.0)[0], at=0.0, tenant="paid-0")]
    run(runtime, options, one, FirstCome(), None, 600.0)  # warm
    [lone], _ = run(runtime, options, one, FirstCome(), None, 600.0)
    crowd = [replace(a, at=0.0) for a in make_arrivals(options, vocab, 10.0)][: options.crowd]
    _, seconds = run(runtime, options, crowd, FirstCome(), None, 600.0)
    full = len(crowd) / seconds
    arrivals = make_arrivals(options, vocab, options.load * full)
    assert lone.ttft is not None
    paid = [a for a in arrivals if a.tier == "paid"]
    end = options.seconds
    ways = {
        "paid alone": (paid, Tiered(tiers), None),
        "first come": (arrivals, FirstCome(), None),
        "tiers": (arrivals, Tiered(tiers), None),
        "+ admission": (arrivals, Tiered(tiers), 3 * lone.ttft),
    }
    found = {name: summary(run(runtime, options, *way, end)[0], end) for name, way in ways.items()}
    return {"alone": {"ttft": lone.ttft, "saturation": full}} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--load", type=float, default=1.5, help="multiple of saturation")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--answer-tokens", type=int, default=64, help="mean")
    parser.add_argument("--max-sequences", type=int, default=16)
    parser.add_argument("--prefill-chunk", type=int, default=128)
    parser.add_argument("--crowd", type=int, default=32, help="requests that tell saturation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = compare(load_runtime(options.checkpoint), options)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    alone = results.pop("alone")
    print(f"one request alone: TTFT {alone['ttft']:.2f} s; saturation {alone['saturation']:.2f}/s")
    print(f"{'':12} tier   sent refused waiting    p50    p90    p99  TTFT (s)")
    for name, tiers in results.items():
        for tier, row in tiers.items():
            times = "".join(f"{row[f'ttft_p{q}']:7.2f}" for q in (50, 90, 99))
            counts = f"{row['requests']:6} {row['refused']:7} {row['waiting']:7}"
            print(f"{name:12} {tier:5} {counts} {times}")


if __name__ == "__main__":
    main()
