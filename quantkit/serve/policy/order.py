"""What a scheduler asks a policy, and the simplest answer: first come, first served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Entry(NamedTuple):
    """A request as a policy sees it. Many are made a step, while the model waits.

    Attributes:
        id: the request's.
        arrival: when it came, in seconds of the monotonic clock.
        prompt_tokens: length of its prompt.
        prompt_left: prompt tokens that are not read yet.
        output_tokens: tokens generated so far.
        max_tokens: tokens it may generate.
        tenant: whose it is.
        tier: class of service.
        deadline: when its first token is due, on the same clock; None is never.
    """

    id: str
    arrival: float
    prompt_tokens: int
    prompt_left: int
    output_tokens: int
    max_tokens: int
    tenant: str = ""
    tier: str = ""
    deadline: float | None = None


class Policy(Protocol):
    """Orders requests. A scheduler calls it from one thread; ``now`` is the monotonic clock.

    Each step asks for `waiting_order` first, also when nothing waits; but once it has been asked
    with nothing waiting and no prompt being read, not again until that changes.
    """

    def waiting_order(
        self, waiting: Sequence[Entry], running: Sequence[Entry], now: float
    ) -> Sequence[int]:
        """Indices into ``waiting``, best first. One left out waits whatever else is free."""
        ...

    def prefill_order(self, running: Sequence[Entry], now: float) -> Sequence[int]:
        """Indices into ``running`` of prompts to read in this step, first served first."""
        ...

    def victim(self, running: Sequence[Entry], candidate: Entry | None, now: float) -> int | None:
        """Index of the running request to stop for ``candidate``, which waits or, None, for the
        others that run and lack memory. None is nobody, allowed only when there is a candidate."""
        ...

    def served(self, entry: Entry, tokens: int) -> None:
        """``tokens`` were computed for this request, which was as ``entry`` says before: what
        fairness counts. Tokens found in a cache are not computed."""
        ...


class FirstCome:
    """First come, first served; who came last makes room."""

    def waiting_order(
        self, waiting: Sequence[Entry], running: Sequence[Entry], now: float
    ) -> Sequence[int]:
        return sorted(range(len(waiting)), key=lambda i: waiting[i].arrival)

    def prefill_order(self, running: Sequence[Entry], now: float) -> Sequence[int]:
        prompts = [i for i, entry in enumerate(running) if entry.prompt_left]
        return sorted(prompts, key=lambda i: running[i].arrival)

    def victim(self, running: Sequence[Entry], candidate: Entry | None, now: float) -> int | None:
        if candidate is not None or not running:
            return None
        return max(range(len(running)), key=lambda i: running[i].arrival)

    def served(self, entry: Entry, tokens: int) -> None:
        pass
