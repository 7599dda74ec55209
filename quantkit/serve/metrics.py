"""Prometheus metrics of one engine, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from quantkit.serve.engine import Engine

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


def watch(engine: Engine) -> Metrics:
    """The metrics of an engine whose parts have been made."""
    metrics, counters, memory = Metrics(), engine.counters, engine.memory
    scheduler, runner = engine.scheduler, engine.runner

    def kv_bytes() -> float:
        caches = (sequence.cache for sequence in list(scheduler.running))
        return sum(runner.nbytes(cache) for cache in caches if cache is not None)

    gauges: dict[str, tuple[str, Callable[[], float]]] = {
        "requests_running": ("Requests admitted.", lambda: engine.running),
        "requests_queued": ("Requests waiting for admission.", lambda: engine.queued),
        "kv_reserved_tokens": ("Cache tokens in use.", lambda: memory.used),
        "kv_total_tokens": ("Cache tokens there are.", lambda: memory.total),
        "kv_bytes": ("Bytes of KV cache held.", kv_bytes),
        "prefix_cache_queries": ("Prompt tokens looked up.", lambda: counters.prefix_queries),
        "prefix_cache_hits": ("Prompt tokens found there.", lambda: counters.prefix_hits),
        "preemptions": ("Requests stopped for others.", lambda: counters.preemptions),
        "spec_decode_drafts": ("Passes of an answer with guesses.", lambda: counters.drafts),
        "spec_decode_draft_tokens": ("Tokens proposed.", lambda: counters.draft_tokens),
        "spec_decode_accepted_tokens": ("Of those, chosen.", lambda: counters.accepted_tokens),
    }
    for name, (text, read) in gauges.items():
        metrics.gauge(name, text, read)
    return metrics
