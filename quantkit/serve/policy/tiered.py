"""The policy of a server with tiers: class, then tenant, then due date.

1. Tiers in the order of the configuration; one that waited for its guaranteed share goes first
   with one request (`shares.Shares`).
2. Within a tier, the tenant that got the fewest tokens (`fairness.Counters`).
3. Within a tenant, the request whose first token is due first. A due date moves a request among
   its own tenant's only, or tight ones would be a way to take other tenants' share.

A request makes room for one of a higher tier, the latest of the lowest tier first, but a tier
keeps its share of the running requests, and never less than one. Whoever is oldest there is never
stopped for a newcomer, so it gets to its end.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from quantkit.serve.policy.fairness import INPUT_WEIGHT, OUTPUT_WEIGHT, Counters
from quantkit.serve.policy.order import Entry
from quantkit.serve.policy.shares import Shares
from quantkit.serve.policy.tiers import Tier

#: A request without a deadline is due so many seconds after it came, to be ordered beside others.
PATIENCE = 60.0


class Tiered:
    """Implements `order.Policy`. Entries of an unknown tier belong to the last one."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self._names = [tier.name for tier in tiers]
        self._rank = {name: rank for rank, name in enumerate(self._names)}
        self._counters = Counters()
        self._shares = Shares(tiers)

    def waiting_order(
        self, waiting: Sequence[Entry], running: Sequence[Entry], now: float
    ) -> Sequence[int]:
        reading = [entry for entry in running if entry.prompt_left]
        pending: dict[str, float] = defaultdict(float)
        for entry in reading:
            pending[entry.tenant] += INPUT_WEIGHT * entry.prompt_left
        self._counters.queue({entry.tenant for entry in waiting})
        tiers = self._fair(waiting, range(len(waiting)), pending)
        # A tier that was promoted and still reads its prompt waits for nothing else.
        promoted = {self._tier(entry) for entry in reading}
        heads = {self._tier(entry): entry for entry in reading}
        heads |= {tier: waiting[order[0]] for tier, order in tiers.items()}
        self._shares.wait({tier: _cost(entry) for tier, entry in heads.items()})
        return self._by_class(tiers, promoted)

    def prefill_order(self, running: Sequence[Entry], now: float) -> Sequence[int]:
        prompts = [i for i, entry in enumerate(running) if entry.prompt_left]
        return self._by_class(self._fair(running, prompts, {}), set())

    def victim(self, running: Sequence[Entry], candidate: Entry | None, now: float) -> int | None:
        lowest_first = sorted(
            range(len(running)),
            key=lambda i: (self._rank[self._tier(running[i])], running[i].arrival),
            reverse=True,
        )
        above = -1 if candidate is None else self._rank[self._tier(candidate)]
        spare = self._above_share(running, candidate)
        for i in lowest_first:
            tier = self._tier(running[i])
            if self._rank[tier] > above and tier in spare:
                return i
        return lowest_first[0] if candidate is None and lowest_first else None

    def served(self, entry: Entry, tokens: int) -> None:
        cost = tokens * (INPUT_WEIGHT if entry.prompt_left else OUTPUT_WEIGHT)
        self._counters.charge(entry.tenant, cost)
        self._shares.charge(self._tier(entry), cost)

    def _tier(self, entry: Entry) -> str:
        return entry.tier if entry.tier in self._rank else self._names[-1]

    def _above_share(self, running: Sequence[Entry], candidate: Entry | None) -> set[str]:
        """Tiers that run more requests than they are guaranteed."""
        count: dict[str, int] = defaultdict(int)
        for entry in running:
            count[self._tier(entry)] += 1
        among = [*count, *([self._tier(candidate)] if candidate else [])]
        return {
            tier
            for tier, n in count.items()
            if n > max(1, int(self._shares.share(tier, among) * len(running)))
        }

    def _fair(
        self, entries: Sequence[Entry], indices: Iterable[int], pending: dict[str, float]
    ) -> dict[str, list[int]]:
        """Tier → indices in the order of rules 2 and 3.

        ``pending`` is what tenants are sure to be charged for already. Each request in the order
        counts for those behind it as if its prompt had been read.
        """
        queues: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for i in indices:
            queues[self._tier(entries[i])][entries[i].tenant].append(i)
        return {
            tier: list(self._take_turns(entries, tenants, pending))
            for tier, tenants in queues.items()
        }

    def _take_turns(
        self, entries: Sequence[Entry], tenants: dict[str, list[int]], pending: dict[str, float]
    ) -> Iterator[int]:
        for queue in tenants.values():
            queue.sort(key=lambda i: (_due(entries[i]), entries[i].arrival), reverse=True)
        turns = [
            (self._counters[tenant] + pending.get(tenant, 0.0), entries[queue[-1]].arrival, tenant)
            for tenant, queue in tenants.items()
        ]
        heapq.heapify(turns)
        while turns:
            count, _, tenant = heapq.heappop(turns)
            queue = tenants[tenant]
            i = queue.pop()
            yield i
            if queue:
                count += INPUT_WEIGHT * entries[i].prompt_left
                heapq.heappush(turns, (count, entries[queue[-1]].arrival, tenant))

    def _by_class(self, tiers: dict[str, list[int]], promoted: set[str]) -> list[int]:
        """Rule 1: promoted heads, then tier by tier."""
        ranked = [tiers[name] for name in self._names if name in tiers]
        first = [
            tiers[name][0]
            for name in self._names[1:]
            if name in tiers and name not in promoted and self._shares.due(name)
        ]
        return first + [i for order in ranked for i in order if i not in first]


def _due(entry: Entry) -> float:
    return entry.arrival + PATIENCE if entry.deadline is None else entry.deadline


def _cost(entry: Entry) -> float:
    """Weighted tokens of a request at worst: nobody knows when it will end."""
    left = max(0, entry.max_tokens - entry.output_tokens)
    return INPUT_WEIGHT * entry.prompt_left + OUTPUT_WEIGHT * left
