"""What each tier is owed, so that a lower one is delayed but never starved.

Higher tiers go first. A tier that waits ages meanwhile, in tokens: each token computed for
another tier gives it its share, ``weight / sum of weights`` of the tiers that have work. Once
that pays for its first request, this request goes before everybody. So it waits for at most
``cost / share`` tokens of others.

Ageing by the clock would promote a whole backlog at once when a server is overloaded, and with
that the tiers would be gone. Counted in tokens, at most one request of a tier is promoted at a
time, however long it waited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantkit.serve.policy.tiers import Tier


class Shares:
    """Credit of tiers, in weighted tokens."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self._weight = {tier.name: tier.weight for tier in tiers}
        self._heads: dict[str, float] = {}
        self._credit: dict[str, float] = {}

    def share(self, tier: str, among: Sequence[str]) -> float:
        """The guaranteed share of a tier beside others that have work."""
        return self._weight[tier] / sum(self._weight[name] for name in {tier, *among})

    def wait(self, heads: Mapping[str, float]) -> None:
        """Say what the first request of each tier that waits costs.

        Credit is kept only while a tier waits, and never beyond one request: a hoard of it would
        come back as a burst in front of the tiers above.
        """
        self._heads = dict(heads)
        self._credit = {
            tier: min(self._credit.get(tier, 0.0), cost) for tier, cost in heads.items()
        }

    def charge(self, tier: str, tokens: float) -> None:
        """Count weighted tokens computed for a tier."""
        for other, cost in self._heads.items():
            if other == tier:
                self._credit[other] = max(0.0, self._credit[other] - tokens)
            else:
                earned = tokens * self.share(other, [*self._heads, tier])
                self._credit[other] = min(self._credit[other] + earned, cost)

    def due(self, tier: str) -> bool:
        """The tier has waited for its share: its first request goes before everybody."""
        return tier in self._heads and self._credit[tier] >= self._heads[tier]
