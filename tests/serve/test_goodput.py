"""Guesses where they pay, and never much where they do not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Items

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_helpers import request

from quantkit.serve.counters import Counters
from quantkit.serve.goodput import (
    LOSS_SHARE,
    OUTLIER,
    STALE,
    UNKNOWN_SHARE,
    Credit,
    PassCost,
    Rate,
    allot,
    winnings,
)
from quantkit.serve.request import Sequence
from quantkit.serve.speculation import DRAFTED, GUESS_CREDIT, SpeculativeConfig, Speculator

shares = st.floats(0, 1)


def goodput(rates: list[float], counts: tuple[int, ...], cost, sequences: int) -> float:
    tokens = sequences + sum(
        rate**place
        for rate, count in zip(rates, counts, strict=True)
        for place in range(1, count + 1)
    )
    return tokens / cost(sequences + sum(counts))


@settings(deadline=None)
@given(
    answers=st.lists(st.tuples(shares, st.integers(0, 3)), min_size=1, max_size=3),
    others=st.integers(0, 4),
    steps=st.lists(st.floats(0, 1), min_size=16, max_size=16),
)
def test_no_choice_is_better(
    answers: list[tuple[float, int]], others: int, steps: list[float]
) -> None:
    """Against all of them, whatever shape the cost has."""
    rates, limits = [rate for rate, _ in answers], [limit for _, limit in answers]
    seconds = [1.0, *itertools.accumulate(steps, initial=1.0)]
    sequences = len(answers) + others

    def cost(rows: int) -> float:
        return seconds[rows]

    counts = allot(rates, limits, cost, sequences=sequences)
    assert all(count <= limit for count, limit in zip(counts, limits, strict=True))
    best = max(
        goodput(rates, choice, cost, sequences)
        for choice in itertools.product(*(range(limit + 1) for limit in limits))
    )
    assert goodput(rates, tuple(counts), cost, sequences) == pytest.approx(best)


@settings(deadline=None)
@given(
    rates=st.lists(shares, min_size=1, max_size=4),
    row=st.floats(0, 1),
    draft=st.floats(0, 2),
)
def test_a_draft_that_costs_more_than_it_brings_is_not_asked(
    rates: list[float], row: float, draft: float
) -> None:
    n = len(rates)
    counts = allot(
        rates,
        [4] * n,
        lambda rows: 1 + row * (rows - 1),
        sequences=n,
        drafted=[True] * n,
        draft_cost=lambda rows: draft * (0.5 + 0.5 * rows) if rows else 0.0,
    )
    passes = [sum(count >= place for count in counts) for place in range(1, 5)]
    drafting = sum(draft * (0.5 + 0.5 * rows) for rows in passes if rows)
    plain = 1 + row * (n - 1)
    tokens = n + sum(
        rate**place for rate, c in zip(rates, counts, strict=True) for place in range(1, c + 1)
    )
    assert tokens / (plain + row * sum(counts) + drafting) >= n / plain * (1 - 1e-9)
    if draft >= plain:  # a pass of its own would bring a token for sure
        assert not any(counts)


def test_cost_is_measured_and_between_sizes_straight() -> None:
    cost = PassCost()
    assert cost(0) == 0
    assert cost(5) == 1 + 4 * UNKNOWN_SHARE
    for rows, seconds in ((2, 1.0), (6, 3.0), (6, 3.2), (6, 90.0)):
        cost.observe(rows, seconds)
    assert cost(2) == 1.0
    assert cost(6) == 3.2  # the median: one pass was held up
    assert cost(3) == pytest.approx(1.55)
    assert cost(7) > cost(6)
    assert 0 < cost(1) < cost(2)
    assert cost(100) == cost(103)  # one size


def test_what_was_long_not_seen_is_stale() -> None:
    cost = PassCost()
    assert cost.stale(1)
    cost.observe(1, 1.0)
    for _ in range(STALE - 1):
        assert not cost.stale(1)
        cost.observe(5, 2.0)
    cost.observe(5, 2.0)
    assert cost.stale(1)
    assert not cost.stale(5)


def test_rates_fade_and_begin_at_what_is_expected() -> None:
    rate = Rate()
    assert rate.expected(0.3) == pytest.approx(0.3)
    rate.observe(4, 2)  # two right, one wrong, and nobody knows of the fourth
    assert (rate.asked, rate.right) == (3, 2)
    for _ in range(100):
        rate.observe(4, 4)
    assert rate.expected(0.0) > 0.94
    for _ in range(100):
        rate.observe(4, 0)
    assert rate.expected(1.0) < 0.3


def test_credit_is_earned_slowly_and_kept_within_bounds() -> None:
    credit = Credit(2.0)
    assert not credit.open
    assert not credit.full
    credit.book(1.0, 0.0)
    assert credit.open
    assert credit.seconds == LOSS_SHARE
    assert credit.book(1.0, 50.0) == pytest.approx(48 + 2 * LOSS_SHARE)
    assert credit.full
    assert credit.seconds == 2.0
    assert credit.affords(2.0)
    assert not credit.affords(2.1)
    credit.spend(3.0)
    assert not credit.open


def test_a_token_more_wins_one_of_a_pass_without() -> None:
    assert winnings(plain=1.0, taken=1.5, sequences=1, tokens=3) == 2.5
    assert winnings(plain=1.0, taken=1.5, sequences=4, tokens=1) == -0.25


def simulate(
    speculator: Speculator, seconds, right: list[int], sequences: int, steps: int
) -> tuple[float, float]:
    """Seconds of so many steps with guesses, and of the same tokens without. In step i, at most
    ``right[i % len]`` guesses of each answer are right."""
    items = [
        Sequence(request(f"r{i}", [5, 6] * 8, max_tokens=10**6), lambda event: None)
        for i in range(sequences)
    ]
    for item in items:
        item.answer = Anything()  # type: ignore[assignment]
    took = plain = 0.0
    for step in range(steps):
        proposals = speculator.propose(items)
        rows = sequences + sum(map(len, proposals))
        accepted = 0
        for i, (item, guesses) in enumerate(zip(items, proposals, strict=True)):
            kept = min(len(guesses), right[(step + i) % len(right)])
            if guesses:
                speculator.verified(item, len(guesses), kept, kept)
            accepted += kept
            for _ in range(1 + kept):
                item.tokens.append(5 + len(item.tokens) % 2)
        speculator.observe(sequences, rows, seconds(rows))
        took += seconds(rows)
        plain += seconds(sequences) * (1 + accepted / sequences)
    return took, plain


class Anything:
    """An answer that may be anything."""

    def possible(self, guesses: list[int]) -> list[int]:
        return guesses


@settings(deadline=None, max_examples=40)
@given(
    right=st.lists(st.integers(0, 4), min_size=1, max_size=200),
    row=st.floats(0, 1),
    jump=st.floats(0, 1),
    sequences=st.integers(1, 4),
)
def test_the_loss_is_bounded_whatever_is_right_when(
    right: list[int], row: float, jump: float, sequences: int
) -> None:
    """Costs that are straight but for a jump at five rows; outcomes that nobody can foresee."""

    def seconds(rows: int) -> float:
        return 1 + row * (rows - 1) + jump * (rows > 4)

    speculator = Speculator(SpeculativeConfig(), Counters(), clock=lambda: 0.0)
    took, plain = simulate(speculator, seconds, right, sequences, 400)
    # Beyond the share: what is kept, one pass of guesses, and what outliers hide of a first pass.
    slack = GUESS_CREDIT + 2 * OUTLIER
    assert took <= (1 + LOSS_SHARE) * plain + slack * seconds(5 * sequences)


@pytest.mark.parametrize("sequences", [1, 3])
def test_right_guesses_are_taken(sequences: int) -> None:
    speculator = Speculator(SpeculativeConfig(), Counters(), clock=lambda: 0.0)
    took, plain = simulate(speculator, lambda rows: 1 + 0.1 * rows, [4], sequences, 300)
    assert took < 0.5 * plain


def test_wrong_guesses_are_given_up_and_tried_again() -> None:
    counters = Counters()
    speculator = Speculator(SpeculativeConfig(), counters, clock=lambda: 0.0)
    took, plain = simulate(speculator, lambda rows: 1 + 0.2 * (rows - 1), [0], 1, 2000)
    assert took < (1 + 1.5 * LOSS_SHARE) * plain
    before = counters.drafts
    assert 3 < before < 100
    simulate(speculator, lambda rows: 1 + 0.2 * (rows - 1), [0], 1, 2000)
    assert counters.drafts > before


def test_right_guesses_that_end_their_answers_win_nothing() -> None:
    """Answers of two tokens, the last of which is always guessed, and always right."""
    counters = Counters()
    speculator = Speculator(SpeculativeConfig(), counters, clock=lambda: 0.0)
    took = plain = 0.0
    for _ in range(2000):
        item = Sequence(request("a", [5, 6, 7, 8, 5], max_tokens=50), lambda event: None)
        item.answer = Anything()  # type: ignore[assignment]
        item.tokens.append(6)
        [guesses] = speculator.propose([item])
        rows = 1 + len(guesses)
        if guesses:
            assert guesses[0] == 7
            speculator.verified(item, len(guesses), accepted=1, won=0)
        speculator.observe(1, rows, 1 + 0.2 * (rows - 1))
        took += 1 + 0.2 * (rows - 1)
        plain += 1
    assert counters.accepted_tokens == counters.drafts > 3
    assert took < (1 + 1.5 * LOSS_SHARE) * plain


class Drafting:
    """A draft model that moves a clock: a pass of it takes 0.1 s, and to read a text ``price``."""

    share, read_tokens = 0.1, 256

    def __init__(self, price: float) -> None:
        self.now, self.price = 0.0, price
        self.cost = PassCost()
        self.known: dict[Sequence, int] = {}

    def behind(self, item: Sequence) -> int:
        return len(item.tokens) - self.known.get(item, 0)

    def read(self, item: Sequence) -> int:
        read = self.behind(item) - 1
        self.now += self.price
        self.cost.observe(read, self.price)
        self.known[item] = len(item.tokens) - 1
        return read

    def guess(self, items: Items[Sequence], counts: Items[int]) -> list[list[int]]:
        self.now += 0.1 * max(counts)
        self.cost.observe(len(items), 0.1)
        self.known |= {item: len(item.tokens) for item in items}
        return [[7] * count for count in counts]


@pytest.mark.parametrize(
    ("price", "texts"),
    [
        # Answers that end when their texts have been read; what is looked up is wrong, too.
        (2.0, [(2, 400, 0)]),
        # What a draft wins is lost by reading a text in vain, and again by guesses looked up.
        (0.7, [(10**6, 2, 2), (2, 1, 0)]),
    ],
)
def test_the_bound_holds_with_a_draft_that_reads(
    price: float, texts: list[tuple[int, int, int]]
) -> None:
    """Texts one after the other: after how many tokens they repeat themselves, their steps, and how
    many drafted guesses are right."""
    model = Drafting(price)
    speculator = Speculator(
        SpeculativeConfig(),
        Counters(),
        model,  # type: ignore[arg-type]
        clock=lambda: model.now,
    )
    plain = 0
    for period, steps, right in itertools.cycle(texts):
        prompt = [5 + i % period for i in range(100)]
        item = Sequence(request("a", prompt, max_tokens=10**6), lambda event: None)
        item.answer = Anything()  # type: ignore[assignment]
        for _ in range(steps):
            [guesses] = speculator.propose([item])
            rows, kept = 1 + len(guesses), 0
            if guesses:
                drafted = item.draft is not None and item.draft.kind == DRAFTED
                kept = min(len(guesses), right) if drafted else 0
                speculator.verified(item, len(guesses), kept, kept)
            seconds = 1 + 0.1 * (rows - 1)
            model.now += seconds
            speculator.observe(1, rows, seconds)
            plain += 1 + kept
            item.tokens += [5 + (len(item.tokens) + i) % period for i in range(1 + kept)]
            if item in model.known and not right:
                break
        if plain > 3000:
            break
    assert model.known, "nothing was read"
    assert model.now <= (1 + LOSS_SHARE) * plain + (GUESS_CREDIT + 2 * OUTLIER) * 1.4 + price


def test_making_guesses_is_a_cost_too() -> None:
    """A clock that moves at each look: the lookup takes as long as a pass."""
    times = itertools.count()
    counters = Counters()
    speculator = Speculator(SpeculativeConfig(), counters, clock=lambda: float(next(times)))
    simulate(speculator, lambda rows: 1.0, [0], 1, 500)
    assert counters.drafts < 15
