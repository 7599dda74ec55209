"""Whether guesses pay: tokens a second with and without them, from what passes really took.

The goodput of a pass is the tokens that come out of it over the seconds that it takes (Liu et al.,
"Optimizing Speculative Decoding for Serving Large Language Models Using Goodput", 2024, section 4).
A guess adds a row to the pass, and with a probability that is counted, a token. Pure bookkeeping:
no tensors, no clocks, no threads.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

#: Seconds of a pass of so many rows.
Cost = Callable[[int], float]

#: Passes of one size that are remembered, and after how many others one is out of date.
RECENT, STALE = 9, 128
#: Of a lone row's pass, what another row adds while no measurement can tell.
UNKNOWN_SHARE = 0.25
#: A pass that took longer than so many usual ones was held up by something else.
OUTLIER = 2.0
#: Of the time without guesses, what may be lost to them, a draft model's reading included.
LOSS_SHARE = 0.01
#: Guesses that `allot` weighs against each other in one pass.
MAX_WEIGHED = 64
#: Weight that old outcomes keep at each new one, and of what is expected beside them.
FADE, PRIOR = 0.95, 4.0


class PassCost:
    """Seconds of a pass by its rows: medians of the last few of each size, straight lines between.

    Few enough sizes to meet each again: above 15 rows, only the first four binary digits count.
    """

    def __init__(self) -> None:
        self._recent: dict[int, deque[float]] = {}
        self._seen: dict[int, int] = {}
        self._passes = 0
        self._sizes: list[int] = []
        self._seconds: list[float] = []

    def observe(self, rows: int, seconds: float) -> None:
        """A pass of so many rows took so long."""
        size = _size(rows)
        recent = self._recent.setdefault(size, deque(maxlen=RECENT))
        recent.append(seconds)
        self._passes += 1
        self._seen[size] = self._passes
        place = bisect_left(self._sizes, size)
        if len(recent) == 1:
            self._sizes.insert(place, size)
            self._seconds.insert(place, seconds)
        else:
            self._seconds[place] = median(recent)

    @property
    def known(self) -> bool:
        """Something was measured."""
        return bool(self._sizes)

    def stale(self, rows: int) -> bool:
        """No pass of that size was seen lately."""
        seen = self._seen.get(_size(rows))
        return seen is None or self._passes - seen >= STALE

    def __call__(self, rows: int) -> float:
        """Expected seconds; in units of a lone row's before the first measurement."""
        if rows <= 0:
            return 0.0
        sizes, seconds = self._sizes, self._seconds
        if not sizes:
            return 1.0 + UNKNOWN_SHARE * (rows - 1)
        size = _size(rows)
        place = bisect_left(sizes, size)
        if place < len(sizes) and sizes[place] == size:
            return seconds[place]
        if 0 < place < len(sizes):
            low, high = sizes[place - 1], sizes[place]
            part = (size - low) / (high - low)
            return seconds[place - 1] + part * (seconds[place] - seconds[place - 1])
        # Beyond what was measured: the nearest, and what rows are thought to add.
        near = 0 if place == 0 else -1
        unit = seconds[near] / (1.0 + UNKNOWN_SHARE * (sizes[near] - 1))
        return max(seconds[near] + UNKNOWN_SHARE * unit * (size - sizes[near]), 0.1 * seconds[near])


def _size(rows: int) -> int:
    shift = max(0, rows.bit_length() - 4)
    return rows >> shift << shift


def allot(
    rates: Sequence[float],
    limits: Sequence[int],
    cost: Cost,
    *,
    sequences: int,
    drafted: Sequence[bool] = (),
    draft_cost: Cost = lambda rows: 0.0,
) -> list[int]:
    """How many guesses each answer gets, so that the pass has the highest goodput.

    The k-th guess of an answer is right with the k-th power of its rate: all before it must be.
    Guesses are added in the order of these probabilities, and of all beginnings of that order the
    best one is taken, none among them. Without a draft model that is the best of all choices.

    Args:
        rates: of each answer that can be guessed, how likely a guess is right after right ones.
        limits: how many guesses it may have.
        cost: of a pass of the model.
        sequences: answers in the pass, those that cannot be guessed among them.
        drafted: whose guesses a draft model makes, one pass of it a guess, side by side.
        draft_cost: of such a pass.
    """
    chances = sorted(
        (
            (rate**place, i, place)
            for i, (rate, limit) in enumerate(zip(rates, limits, strict=True))
            for place in range(1, limit + 1)
        ),
        key=lambda chance: (-chance[0], chance[2]),
    )[:MAX_WEIGHED]
    tokens, seconds = float(sequences), cost(sequences)
    best, length = tokens / seconds, 0
    drafting = 0.0
    depth: dict[int, int] = {}  # place of a guess → answers that have one there from the draft
    for count, (chance, i, place) in enumerate(chances, start=1):
        tokens += chance
        if drafted and drafted[i]:
            together = depth.get(place, 0)
            drafting += draft_cost(together + 1) - draft_cost(together)
            depth[place] = together + 1
        goodput = tokens / (cost(sequences + count) + drafting)
        if goodput > best:
            best, length = goodput, count
    counts = [0] * len(rates)
    for _, i, place in chances[:length]:
        counts[i] = max(counts[i], place)
    return counts


class Rate:
    """How often a guess was right after right ones; old outcomes fade."""

    def __init__(self) -> None:
        self.asked = self.right = 0.0

    def observe(self, proposed: int, accepted: int) -> None:
        """The first ``accepted`` of a row of guesses were right; behind a wrong one none counts."""
        self.asked = self.asked * FADE + accepted + (accepted < proposed)
        self.right = self.right * FADE + accepted

    def expected(self, prior: float) -> float:
        """The rate, where ``prior`` counts as much as `PRIOR` outcomes."""
        return (self.right + PRIOR * prior) / (self.asked + PRIOR)


class Credit:
    """Seconds that guesses may lose before there are none for a while.

    Each pass brings a share of what it would take without guesses, and what its guesses won
    or lost. So over any time, what is bought on credit loses no more than that share, the most that
    is kept, and what the last purchase cost beyond it, however wrong every expectation was.

    Args:
        passes: how many passes' worth is kept at most: what a change for the worse can cost.
        share: of a pass without guesses.
    """

    def __init__(self, passes: float, share: float = LOSS_SHARE) -> None:
        self.seconds = 0.0
        self._passes = passes
        self._share = share
        self._most = 0.0

    @property
    def open(self) -> bool:
        """There is some."""
        return self.seconds > 0

    @property
    def full(self) -> bool:
        """Enough to try what is not expected to pay."""
        return self.open and self.seconds >= self._most

    def affords(self, seconds: float) -> bool:
        """So much may be spent at once."""
        return self.seconds >= seconds

    def book(self, plain: float, won: float) -> float:
        """A pass is over that would have taken ``plain`` seconds, and guesses won ``won``.

        Returns:
            Seconds beyond the most that is kept.
        """
        self._most = self._passes * plain
        seconds = self.seconds + self._share * plain + won
        self.seconds = min(seconds, self._most)
        return seconds - self.seconds

    def spend(self, seconds: float) -> None:
        """Something was bought between two passes."""
        self.seconds -= seconds


def winnings(plain: float, taken: float, sequences: int, tokens: int) -> float:
    """Seconds that the guesses of a pass won; below zero, what they lost.

    Args:
        plain: seconds that it would take without guesses.
        taken: seconds that it took, with the making of the guesses.
        sequences: answers in it, each of which got a token in any case.
        tokens: that came out of it beyond those.
    """
    return tokens * plain / sequences - (taken - plain)
