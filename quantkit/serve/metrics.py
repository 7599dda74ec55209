"""Prometheus metrics of one engine, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

#: Seconds; small models on a GPU answer in milliseconds, long prompts on a CPU take minutes.
LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters that the engine thread moves; gauges read the engine when scraped."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "quantkit_requests", "Requests that ended, by outcome.", ["outcome"], registry=registry
        )
        self.prompt_tokens = Counter(
            "quantkit_prompt_tokens", "Prompt tokens read.", registry=registry
        )
        self.generated_tokens = Counter(
            "quantkit_generated_tokens", "Tokens generated.", registry=registry
        )
        self.ttft = Histogram(
            "quantkit_time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Register a gauge whose value is ``read()`` at scrape time."""
        Gauge(f"quantkit_{name}", text, registry=self.registry).set_function(read)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)
