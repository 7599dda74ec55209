"""What became of an ask: when its tokens came, or why they did not."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from quantkit.loadtest.ask import Ask
from quantkit.loadtest.tiers import Slo

#: ``shed``: refused because of load (429, 503). ``failed``: everything else that is no answer.
Fate = Literal["done", "shed", "failed"]


@dataclass
class Answer:
    """One request, over. Times are seconds from the start of the test.

    Latencies count from ``due``, not from ``sent``: a client that falls behind must not make the
    server look fast (coordinated omission).

    Attributes:
        ask: what was asked.
        due: when it should have been sent.
        sent: when it was.
        chunks: when each piece of the answer came. A piece may hold several tokens.
        over: when it ended, however it did.
        fate: how it ended.
        reason: status and message, where it is not done.
    """

    ask: Ask
    due: float
    sent: float
    chunks: list[float] = field(default_factory=list)
    over: float = 0.0
    fate: Fate = "done"
    reason: str = ""

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.chunks[0] - self.due

    @property
    def e2e(self) -> float:
        """Time to the last token."""
        return self.chunks[-1] - self.due

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None where there is no other."""
        if self.ask.output_tokens < 2:
            return None
        return (self.chunks[-1] - self.chunks[0]) / (self.ask.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: between one piece and the next."""
        return [b - a for a, b in pairwise(self.chunks)]

    def meets(self, slo: Slo) -> bool:
        """It is done and in time."""
        if self.fate != "done":
            return False
        found = (self.ttft, slo.ttft), (self.tpot, slo.tpot), (self.e2e, slo.e2e)
        return all(value is None or most is None or value <= most for value, most in found)
