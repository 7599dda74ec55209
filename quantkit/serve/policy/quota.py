"""What a tenant may ask for: a leaky bucket for each rate, and a count of what it has running."""

from __future__ import annotations

#: A tenant may use so many seconds' worth of its rate at once.
REQUEST_BURST = 1.0
TOKEN_BURST = 10.0


class Bucket:
    """Fills with ``rate`` units a second up to ``capacity``; may be overdrawn.

    Overdrawn, because nobody knows how long an answer will be: what it cost is taken when it is
    over, and the next request waits until the debt is paid. Over any time ``t``, requests are let
    in for ``rate · t + capacity`` units at most, and whatever those let in overdraw.
    """

    def __init__(self, rate: float, capacity: float, now: float) -> None:
        self.rate = rate
        self.capacity = capacity
        self._level = capacity
        self._at = now

    def wait(self, need: float, now: float) -> float:
        """Seconds until the bucket holds ``need``, at most its capacity; 0 is now."""
        short = min(need, self.capacity) - self._fill(now)
        return max(0.0, short / self.rate)

    def take(self, amount: float, now: float) -> None:
        """Take units, more than there are if need be."""
        self._level = min(self.capacity, self._fill(now) - amount)

    def _fill(self, now: float) -> float:
        # A clock that was set back neither takes nor gives.
        self._level = min(self.capacity, self._level + self.rate * max(0.0, now - self._at))
        self._at = now
        return self._level
