"""Figures of answers whose times were made up: by hand."""

from __future__ import annotations

import pytest

from quantkit.loadtest.answer import Answer
from quantkit.loadtest.ask import Ask
from quantkit.loadtest.row import Figures, make_row, quantile
from quantkit.loadtest.session import sustained_rate
from quantkit.loadtest.tiers import LoadTier, Slo

PAID, FREE = LoadTier("paid", 0.5, Slo(ttft=1.0, tpot=0.25)), LoadTier("free", 0.5, Slo(ttft=10.0))


def answer(tier: LoadTier, due: float, chunks: list[float], tokens: int, **more: object) -> Answer:
    ask = Ask(due, tier.name, (1, 2, 3), tokens)
    return Answer(ask, due, due + 0.125, chunks, **more)  # type: ignore[arg-type]


def test_latencies_count_from_the_due_time() -> None:
    one = answer(PAID, 2.0, [2.5, 3.0, 4.5], 5)
    assert (one.ttft, one.e2e, one.tpot, one.gaps) == (0.5, 2.5, 0.5, [0.5, 1.5])
    assert answer(PAID, 0.0, [1.0], 1).tpot is None


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (Slo(), True),
        (Slo(ttft=0.5), True),
        (Slo(ttft=0.49), False),
        (Slo(tpot=0.49), False),
        (Slo(e2e=2.49), False),
        (Slo(0.5, 0.5, 2.5), True),
    ],
)
def test_what_meets_an_objective(slo: Slo, met: bool) -> None:
    assert answer(PAID, 2.0, [2.5, 3.0, 4.5], 5).meets(slo) is met


def test_shed_and_failed_are_misses() -> None:
    for fate in ("shed", "failed"):
        assert not answer(FREE, 0.0, [0.1], 1, fate=fate).meets(Slo())


def test_a_row_by_hand() -> None:
    answers = [
        answer(PAID, 0.0, [0.5, 1.0], 5),  # met: TPOT is 0.5 s over 4 tokens
        answer(PAID, 1.0, [3.0, 4.0], 5),  # too late
        answer(FREE, 1.0, [2.0, 10.0], 2),  # met: no promise of a TPOT
        answer(FREE, 2.0, [], 2, fate="shed", reason="status 503"),
    ]
    row = make_row("poisson", 2.0, answers, [PAID, FREE], price_per_hour=3.6)
    total, paid, free = row.total, row.tiers["paid"], row.tiers["free"]
    assert row.seconds == 10.0
    assert (total.requests, total.done, total.shed, total.failed, total.met) == (4, 3, 1, 0, 2)
    assert (total.attainment, paid.attainment, free.attainment) == (0.5, 0.5, 0.5)
    assert (total.requests_per_second, total.goodput) == (0.3, 0.2)
    assert (total.input_tokens_per_second, total.output_tokens_per_second) == (0.9, 1.2)
    assert paid.ttft is not None
    assert (paid.ttft.n, paid.ttft.p50, paid.ttft.p99) == (2, 0.5, 2.0)
    assert row.lag_p99 == 0.125
    assert row.reasons == {"status 503": 1}
    # 3.6 an hour is 0.01 for 10 s, in which 7 tokens met their objective.
    assert row.cost_per_million_tokens == pytest.approx(0.01 / 7 * 1e6)


def test_when_everything_is_shed_nothing_is_made_up() -> None:
    refused = [answer(PAID, 0.0, [], 5, fate="shed", reason="busy")]
    row = make_row("closed", 1, refused, [PAID], price_per_hour=1.0)
    assert row.total.ttft is row.total.itl is row.cost_per_million_tokens is None
    assert row.total.attainment == row.total.goodput == 0.0


def test_a_request_without_an_answer_takes_its_time() -> None:
    """One done after 1 s, one given up after 30: the rates are over all of it."""
    lost = answer(FREE, 0.0, [], 2, fate="failed", reason="no end after 30 s", over=30.0)
    row = make_row("closed", 2, [answer(FREE, 0.0, [0.5, 1.0], 2, over=1.0), lost], [FREE])
    assert row.seconds == 30.0
    assert row.total.output_tokens_per_second == pytest.approx(2 / 30)


@pytest.mark.parametrize(
    ("share", "rank"), [(0.5, 50), (0.9, 90), (0.99, 99), (0.07, 7), (1.0, 100), (0.001, 1)]
)
def test_quantiles_are_nearest_ranks(share: float, rank: int) -> None:
    assert quantile([float(i) for i in range(100, 0, -1)], share) == rank


def test_the_sustained_rate_ends_at_the_first_that_breaks() -> None:
    def row(rate: float, met: int) -> object:
        answers = [answer(FREE, 0.0, [1.0 if i < met else 11.0], 1) for i in range(10)]
        return make_row("poisson", rate, answers, [FREE])

    rows = [row(1, 10), row(2, 9), row(3, 8), row(4, 10)]
    assert sustained_rate(rows, 0.9) == 2  # type: ignore[arg-type]
    assert sustained_rate(rows[2:], 0.9) is None  # type: ignore[arg-type]
    assert isinstance(rows[0].total, Figures)  # type: ignore[attr-defined]
