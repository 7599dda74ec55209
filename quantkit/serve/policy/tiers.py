"""Classes of service and those who use them: plain data."""

from __future__ import annotations

from dataclasses import dataclass

#: What a server without a configuration file gives everybody.
DEFAULT = "default"


@dataclass(frozen=True)
class Tier:
    """A class of service.

    Attributes:
        name: for messages and metrics.
        weight: its guaranteed share of the work, relative to the other tiers that have some.
        ttft: seconds from arrival to first token that are promised; None promises nothing.
        max_queue: requests that may wait for their first token; None is 1024.
    """

    name: str
    weight: float = 1.0
    ttft: float | None = None
    max_queue: int | None = None


@dataclass(frozen=True)
class Tenant:
    """Who sends requests, and how much of that is too much. None is no limit.

    Attributes:
        name: for messages and metrics.
        tier: the name of its tier.
        requests_per_second: sustained rate; a second's worth may come at once.
        tokens_per_second: of prompts and answers together; ten seconds' worth may come at once.
        concurrency: requests that wait or run.
    """

    name: str
    tier: str
    requests_per_second: float | None = None
    tokens_per_second: float | None = None
    concurrency: int | None = None
