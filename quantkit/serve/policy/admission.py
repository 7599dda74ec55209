"""Who is let in: quotas of a tenant, and whether its tier's promise can be kept.

A request that would come too late is refused when it arrives, not after it has waited. One that
breaks its tenant's own limits gets 429; one that the server cannot serve in time gets 503. Both
say when to try again.

The wait for the first token is estimated as the prompt tokens in front, each tier's divided by its
measured `throughput.Throughput`. In front are the requests of higher tiers, those of the same
tenant, and of every other tenant of the tier as much as fairness lets pass (`fairness.Counters`):
no more than this tenant has itself. So a tenant that floods a tier is refused, and the others are
not. A tier that has measured nothing yet refuses nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantkit.serve.policy.quota import REQUEST_BURST, TOKEN_BURST, Bucket
from quantkit.serve.policy.throughput import Throughput
from quantkit.serve.policy.tiers import Tenant, Tier

#: Nobody is told to come back later than this: a longer estimate is no estimate.
MAX_RETRY_AFTER = 60.0
#: Requests that may wait in a tier that says nothing.
MAX_QUEUE = 1024


@dataclass(frozen=True)
class Refusal:
    """Why a request is not let in.

    Attributes:
        status: 429, the tenant's own limits; 503, the server's; 400, it can never be let in.
        code: the kind: ``rate_limit``, ``concurrency``, ``queue_full`` or ``too_slow``.
        message: value and rule.
        retry_after: whole seconds, at least 1; 0 with status 400.
    """

    status: int
    code: str
    message: str
    retry_after: int


@dataclass(frozen=True)
class _Admitted:
    tenant: Tenant
    prompt_tokens: int


class Admission:
    """The ledger of requests that are in. One thread calls it.

    `knock` before a prompt is read, `admit` a batch or refuse it; for each request that is in, say
    when it `started` (first token), if it did, and once when it `ended`.
    """

    def __init__(self, tiers: Sequence[Tier], tenants: Sequence[Tenant], now: float) -> None:
        self._tiers = {tier.name: tier for tier in tiers}
        self._rank = {tier.name: rank for rank, tier in enumerate(tiers)}
        self._throughput = {tier.name: Throughput() for tier in tiers}
        self._requests = {
            t.name: Bucket(
                t.requests_per_second, max(1.0, t.requests_per_second * REQUEST_BURST), now
            )
            for t in tenants
            if t.requests_per_second is not None
        }
        self._tokens = {
            t.name: Bucket(t.tokens_per_second, t.tokens_per_second * TOKEN_BURST, now)
            for t in tenants
            if t.tokens_per_second is not None
        }
        self._live: Counter[str] = Counter()
        self._waiting: dict[str, _Admitted] = {}
        self._started: dict[str, _Admitted] = {}

    def knock(self, tenant: Tenant, now: float, *, charge: bool = False) -> Refusal | None:
        """Refuse a tenant that is over a limit already, whatever it asks.

        ``charge`` takes a request from its rate, which is else `admit`'s to do.
        """
        refusal = self._over_concurrency(tenant, 1) or self._over_rate(tenant, 1, 0, now)
        if charge and refusal is None:
            self._take(self._requests, tenant, 1, now)
        return refusal

    def admit(self, tenant: Tenant, prompts: Mapping[str, int], now: float) -> Refusal | None:
        """Let requests in, all or none.

        Args:
            tenant: whose they are.
            prompts: request id → prompt tokens.
            now: seconds of the monotonic clock.
        """
        tokens = sum(prompts.values())
        refusal = (
            self._over_concurrency(tenant, len(prompts))
            or self._over_rate(tenant, len(prompts), tokens, now)
            or self._queue_full(tenant, len(prompts))
            or self._too_slow(tenant, tokens)
        )
        if refusal is not None:
            return refusal
        self._take(self._requests, tenant, len(prompts), now)
        self._take(self._tokens, tenant, tokens, now)
        self._live[tenant.name] += len(prompts)
        for request_id, prompt_tokens in prompts.items():
            self._waiting[request_id] = _Admitted(tenant, prompt_tokens)
            self._throughput[tenant.tier].arrive(now)
        return None

    def started(self, request_id: str, now: float) -> None:
        """A request got its first token."""
        if admitted := self._waiting.pop(request_id, None):
            self._started[request_id] = admitted
            self._throughput[admitted.tenant.tier].leave(admitted.prompt_tokens, now)

    def ended(self, request_id: str, output_tokens: int, now: float) -> None:
        """A request is over, however it ended; said again, it does nothing."""
        waited = self._waiting.pop(request_id, None)
        admitted = waited or self._started.pop(request_id, None)
        if admitted is None:
            return
        if waited:
            self._throughput[waited.tenant.tier].leave(0, now)
        self._live[admitted.tenant.name] -= 1
        self._take(self._tokens, admitted.tenant, output_tokens, now)

    def waiting(self, tier: str) -> int:
        """Requests of a tier without their first token."""
        return sum(admitted.tenant.tier == tier for admitted in self._waiting.values())

    def wait(self, tenant: Tenant, tokens: int) -> float | None:
        """Estimated seconds to the first token of ``tokens`` more; None if nothing is measured."""
        own = self._throughput[tenant.tier].rate
        if own is None:
            return None
        above: Counter[str] = Counter()
        beside: Counter[str] = Counter()
        for admitted in self._waiting.values():
            other = admitted.tenant
            if other.tier == tenant.tier:
                beside[other.name] += admitted.prompt_tokens
            elif self._rank[other.tier] < self._rank[tenant.tier]:
                above[other.tier] += admitted.prompt_tokens
        mine = beside.pop(tenant.name, 0) + tokens
        seconds = (mine + sum(min(theirs, mine) for theirs in beside.values())) / own
        for tier, pending in above.items():
            # Unmeasured, it counts at this tier's speed; higher tiers are faster.
            seconds += pending / (self._throughput[tier].rate or own)
        return seconds

    def _over_concurrency(self, tenant: Tenant, count: int) -> Refusal | None:
        limit, live = tenant.concurrency, self._live[tenant.name]
        if limit is None or live + count <= limit:
            return None
        if count > limit:
            message = f"{count} answers were asked for at once; this key allows {limit}"
            return Refusal(400, "concurrency", message, 0)
        message = f"{live} requests run and {count} more were sent; this key allows {limit} at once"
        return Refusal(429, "concurrency", message, 1)

    def _over_rate(self, tenant: Tenant, count: int, tokens: int, now: float) -> Refusal | None:
        for buckets, need, unit in (
            (self._requests, count, "requests"),
            (self._tokens, tokens, "tokens"),
        ):
            bucket = buckets.get(tenant.name)
            wait = bucket.wait(need, now) if bucket else 0.0
            if bucket and wait:
                message = f"over this key's {bucket.rate:g} {unit} a second"
                # Known to the second, however long: nothing is estimated here.
                return Refusal(429, "rate_limit", message, max(1, math.ceil(wait)))
        return None

    def _queue_full(self, tenant: Tenant, count: int) -> Refusal | None:
        limit = self._tiers[tenant.tier].max_queue or MAX_QUEUE
        if count > limit:
            message = (
                f"{count} answers were asked for at once; the queue of tier {tenant.tier!r} "
                f"holds {limit}"
            )
            return Refusal(400, "queue_full", message, 0)
        waiting = self.waiting(tenant.tier)
        if waiting + count <= limit or not self._waits(tenant):
            return None
        message = f"{waiting} requests of tier {tenant.tier!r} wait already; it allows {limit}"
        return Refusal(503, "queue_full", message, _whole(self.wait(tenant, 0) or 1.0))

    def _too_slow(self, tenant: Tenant, tokens: int) -> Refusal | None:
        target, wait = self._tiers[tenant.tier].ttft, self.wait(tenant, tokens)
        # Alone, it is let in: no waiting would make it faster, and it brings the next measurement.
        alone = not any(
            self._rank[admitted.tenant.tier] <= self._rank[tenant.tier]
            for admitted in self._waiting.values()
        )
        if target is None or wait is None or wait <= target or alone:
            return None
        message = (
            f"the first token would take about {wait:.1f} s; tier {tenant.tier!r} promises "
            f"{target:g} s"
        )
        return Refusal(503, "too_slow", message, _whole(wait - target))

    def _waits(self, tenant: Tenant) -> bool:
        """A tenant with nothing waiting is let into a full queue: another one filled it."""
        return any(admitted.tenant.name == tenant.name for admitted in self._waiting.values())

    @staticmethod
    def _take(buckets: Mapping[str, Bucket], tenant: Tenant, amount: float, now: float) -> None:
        if bucket := buckets.get(tenant.name):
            bucket.take(amount, now)


def _whole(seconds: float) -> int:
    return max(1, math.ceil(min(seconds, MAX_RETRY_AFTER)))
