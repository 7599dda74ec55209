"""The load of two tiers that the real engine and the simulation share, and its table."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from quantkit.loadtest.row import quantile
from quantkit.serve.policy.tiers import Tenant, Tier

QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Workload:
    """What arrives. Answers have a geometric length, cut at four times the mean."""

    paid_share: float = 0.2
    prompt_tokens: int = 512
    answer_tokens: int = 64
    free_tenants: int = 4

    @property
    def longest(self) -> int:
        """Tokens of an answer at most."""
        return 4 * self.answer_tokens

    def arrivals(self, rng: random.Random, rate: float) -> Iterator[tuple[float, str, int]]:
        """Seconds, tenant and answer tokens of a Poisson process without end."""
        now = 0.0
        while True:
            now += rng.expovariate(rate)
            paid = rng.random() < self.paid_share
            tenant = "paid" if paid else f"free-{rng.randrange(self.free_tenants)}"
            yield now, tenant, min(1 + int(rng.expovariate(1 / self.answer_tokens)), self.longest)

    @property
    def tenants(self) -> tuple[Tenant, ...]:
        """One that pays, and those that do not."""
        free = [f"free-{i}" for i in range(self.free_tenants)]
        return tuple(Tenant(name, tier_of(name)) for name in ["paid", *free])


def make_tiers(paid: float | None, free: float | None) -> tuple[Tier, Tier]:
    """Both tiers and the seconds to the first token that they are promised."""
    return Tier("paid", 8.0, paid), Tier("free", 1.0, free)


def tier_of(tenant: str) -> str:
    return tenant.partition("-")[0]


class Served(Protocol):
    """A request that is over, or was given up."""

    @property
    def tier(self) -> str: ...

    @property
    def refused(self) -> bool: ...

    @property
    def ttft(self) -> float:
        """Seconds from arrival to first token; how long it waited if there is none."""
        ...


def summary(served: Sequence[Served]) -> dict[str, dict[str, float]]:
    """Tier → requests, how many were refused, and the time to the first token of the others."""
    rows = {}
    for tier in ("paid", "free"):
        mine = [one for one in served if one.tier == tier]
        times = [one.ttft for one in mine if not one.refused]
        if mine:
            rows[tier] = {"requests": len(mine), "refused": len(mine) - len(times)}
        if times:
            rows[tier] |= {f"ttft_p{int(100 * q)}": quantile(times, q) for q in QUANTILES}
    return rows


def show(ways: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """A line for each tier of each way to serve."""
    print(f"{'':12} {'tier':5} {'sent':>5} {'refused':>7}    p50    p90    p99    max  TTFT (s)")
    for name, tiers in ways.items():
        for tier, row in tiers.items():
            found = [row.get(f"ttft_p{int(100 * q)}") for q in QUANTILES]
            times = "".join("      -" if t is None else f"{t:7.2f}" for t in found)
            print(f"{name:12} {tier:5} {row['requests']:5} {row['refused']:7} {times}")
