"""How fast prompts get their first token: measured, never assumed."""

from __future__ import annotations

import math

#: Seconds of waiting after which a measurement counts 1/e. Short enough to follow a server that
#: runs out of slots, long enough to hold several prompts.
MEMORY = 30.0


class Throughput:
    """Prompt tokens that reach their first token, per second in which some wait for theirs.

    Slots that are taken, answers that share the steps and a slow machine all show in it, because
    each keeps prompts waiting. Idle time does not count.
    """

    def __init__(self) -> None:
        self._pending = 0
        self._since: float | None = None
        self._tokens = 0.0
        self._seconds = 0.0

    def arrive(self, now: float) -> None:
        """One more request waits for its first token."""
        self._pass(now)
        self._pending += 1

    def leave(self, tokens: int, now: float) -> None:
        """One got its first token after a prompt of ``tokens``, or gave up (0)."""
        self._pass(now)
        self._pending -= 1
        self._tokens += tokens

    @property
    def rate(self) -> float | None:
        """Tokens a second; None before anything was measured."""
        if not (self._tokens and self._seconds):
            return None
        return self._tokens / self._seconds

    def _pass(self, now: float) -> None:
        elapsed = max(0.0, now - self._since) if self._since is not None else 0.0
        self._since = now
        if self._pending and elapsed:
            keep = math.exp(-elapsed / MEMORY)
            self._tokens *= keep
            self._seconds = self._seconds * keep + elapsed
