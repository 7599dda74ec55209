"""What the door sees, as Prometheus metrics: by tier, by tenant, and against what was promised.

Label values come from the configuration alone, never from requests: tiers are at most
`config.MAX_TIERS`, and tenants beyond the first `MAX_TENANT_LABELS` count as ``other``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram

from quantkit.serve.metrics import LATENCY_BUCKETS

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from quantkit.serve.capture import Capture
    from quantkit.serve.config import ServeConfig
    from quantkit.serve.policy.tiers import Tenant

MAX_TENANT_LABELS = 100
OTHER = "other"
#: Requests that the attainment of a tier is taken over.
ATTAINMENT_WINDOW = 1000
ITL_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Traffic:
    """Metrics of requests at the API. Only the event loop calls it."""

    def __init__(
        self,
        registry: CollectorRegistry,
        config: ServeConfig,
        waiting: Callable[[str], int],
        capture: Capture | None = None,
    ) -> None:
        self._tenants = {tenant.name for tenant in config.tenants[:MAX_TENANT_LABELS]}
        self._gaps: dict[str, Histogram] = {}  # to look a label up takes as long as to observe
        self._met: dict[str, deque[bool]] = {
            tier.name: deque(maxlen=ATTAINMENT_WINDOW) for tier in config.tiers if tier.ttft
        }

        def counter(name: str, text: str, labels: Sequence[str]) -> Counter:
            return Counter(f"quantkit_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"quantkit_{name}", text, ["tier"], buckets=buckets, registry=registry)

        self.requests = counter(
            "tier_requests", "Requests by tier and how they ended.", ["tier", "outcome"]
        )
        self.tenant_requests = counter(
            "tenant_requests", "Requests by tenant and how they ended.", ["tenant", "outcome"]
        )
        self.tenant_tokens = counter(
            "tenant_tokens", "Tokens by tenant: of prompts and generated.", ["tenant", "kind"]
        )
        self.ttft = histogram(
            "tier_time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            LATENCY_BUCKETS,
        )
        self.itl = histogram(
            "tier_inter_token_latency_seconds", "Between a token and the next.", ITL_BUCKETS
        )
        waits = Gauge(
            "quantkit_tier_requests_waiting",
            "Requests without their first token.",
            ["tier"],
            registry=registry,
        )
        attained = Gauge(
            "quantkit_tier_slo_attainment",
            f"Share of the last {ATTAINMENT_WINDOW} requests whose first token came in time; "
            "refused and failed ones did not, nor those whose client gave up when it was late.",
            ["tier"],
            registry=registry,
        )
        if capture is not None:
            rows = Gauge(
                "quantkit_capture_rows",
                "Captured rows: written, dropped because the disk was slow, or failed.",
                ["outcome"],
                registry=registry,
            )
            for outcome in ("written", "dropped", "failed"):
                rows.labels(outcome).set_function(partial(getattr, capture, outcome))
        for tier in config.tiers:
            waits.labels(tier.name).set_function(partial(waiting, tier.name))
        promised = Gauge(
            "quantkit_tier_slo_ttft_seconds",
            "Seconds from arrival to first token that the tier promises.",
            ["tier"],
            registry=registry,
        )
        for tier in config.tiers:
            if tier.ttft:
                promised.labels(tier.name).set(tier.ttft)
        for name in self._met:
            attained.labels(name).set_function(partial(self.attainment, name))

    def attainment(self, tier: str) -> float:
        """Share of a tier's latest requests that met its promise; 1 before the first."""
        met = self._met[tier]
        return sum(met) / len(met) if met else 1.0

    def first_token(self, tenant: Tenant, seconds: float) -> None:
        """A request got its first token so long after it came."""
        self.ttft.labels(tenant.tier).observe(seconds)

    def next_token(self, tenant: Tenant, seconds: float) -> None:
        """A request got another token so long after the one before."""
        found = self._gaps.get(tenant.tier)
        if found is None:
            found = self._gaps[tenant.tier] = self.itl.labels(tenant.tier)
        found.observe(seconds)

    def ended(self, tenant: Tenant, outcome: str, in_time: bool | None) -> None:
        """A request is over or was refused.

        ``in_time`` is whether its first token was; None is neither: the client left before it
        was due, or a limit of the tenant's own refused it.
        """
        self.requests.labels(tenant.tier, outcome).inc()
        self.tenant_requests.labels(self._label(tenant), outcome).inc()
        if in_time is not None and tenant.tier in self._met:
            self._met[tenant.tier].append(in_time)

    def computed(self, tenant: Tenant, prompt: int, generated: int) -> None:
        """Tokens that a request has cost."""
        self.tenant_tokens.labels(self._label(tenant), "prompt").inc(prompt)
        self.tenant_tokens.labels(self._label(tenant), "generated").inc(generated)

    def _label(self, tenant: Tenant) -> str:
        return tenant.name if tenant.name in self._tenants else OTHER
