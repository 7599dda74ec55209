"""Service received, a number for each tenant: Virtual Token Counters.

Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, Algorithm 2. The tenant with
the smallest counter goes first; every token computed for it is added, weighted by what it costs.
A tenant that had nothing waiting is lifted to the smallest counter of those that do, so idle time
earns no credit. Between two tenants that always have requests waiting, counters differ by at most
what their admitted requests still cost (Theorem 4.4 there).
"""

from __future__ import annotations

from collections.abc import Collection

#: What a prompt token and a generated token count (section 3.1 there; the ratio of usual prices).
INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0


class Counters:
    """Virtual token counters of tenants."""

    def __init__(self) -> None:
        self._count: dict[str, float] = {}
        self._waiting: set[str] = set()
        self._last = 0.0  # the counter of who last had its queue become empty

    def __getitem__(self, tenant: str) -> float:
        return self._count.get(tenant, 0.0)

    def queue(self, waiting: Collection[str]) -> None:
        """Say which tenants have requests waiting now; lifts those that had none before."""
        tenants = set(waiting)
        self._last = max((self[tenant] for tenant in self._waiting - tenants), default=self._last)
        stayed = self._waiting & tenants
        floor = min((self[tenant] for tenant in stayed), default=self._last)
        for tenant in tenants - stayed:
            self._count[tenant] = max(self[tenant], floor)
        self._waiting = tenants

    def charge(self, tenant: str, tokens: float) -> None:
        """Add weighted tokens that were computed for a tenant."""
        self._count[tenant] = self[tenant] + tokens
