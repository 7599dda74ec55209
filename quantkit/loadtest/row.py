"""The figures of one test: latencies, throughput, goodput, cost. Seconds and tokens throughout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.loadtest.answer import Answer
from quantkit.loadtest.tiers import LoadTier

QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Quantiles:
    """Seconds that half, 90 % and 99 % of ``n`` times do not exceed."""

    n: int
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Figures:
    """What came of some answers.

    Attributes:
        requests: sent; ``done + shed + failed``.
        done: answered in full.
        shed: refused because of load.
        failed: without an answer for any other reason, a time-out among them.
        met: done, and within all that their tier promises.
        attainment: met of all requests; shed and failed ones are misses.
        requests_per_second: done, over the test's seconds.
        goodput: met, over the test's seconds.
        input_tokens_per_second, output_tokens_per_second: of those that are done.
        met_tokens: output tokens of those that met.
        ttft, tpot, itl, e2e: of those that are done; None where there is no such time.
    """

    requests: int
    done: int
    shed: int
    failed: int
    met: int
    attainment: float
    requests_per_second: float
    goodput: float
    input_tokens_per_second: float
    output_tokens_per_second: float
    met_tokens: int
    ttft: Quantiles | None
    tpot: Quantiles | None
    itl: Quantiles | None
    e2e: Quantiles | None


@dataclass(frozen=True)
class Row:
    """One test.

    Attributes:
        kind: ``poisson``, ``closed`` or ``trace``.
        load: requests a second that were sent on average, or clients of a closed loop.
        seconds: from the first due time to the last end.
        lag_p99: seconds that requests were sent late. Where it is not far below the times
            measured, the client was the bottleneck.
        total: of all tiers.
        tiers: by name, in the order given.
        cost_per_million_tokens: in the unit of the price, of output tokens whose answers met
            their objective; None without a price, or where none did.
        reasons: why requests were shed or failed, and how many of each.
    """

    kind: str
    load: float
    seconds: float
    lag_p99: float
    total: Figures
    tiers: dict[str, Figures]
    cost_per_million_tokens: float | None
    reasons: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_row(
    kind: str,
    load: float,
    answers: Sequence[Answer],
    tiers: Sequence[LoadTier],
    price_per_hour: float | None = None,
) -> Row:
    """Sum a test up.

    Args:
        kind, load: see `Row`.
        answers: to all asks of the test; at least one.
        tiers: all that the asks name.
        price_per_hour: of the machine that serves.
    """
    begin = min(a.due for a in answers)
    seconds = max(max([a.sent, a.over, *a.chunks]) for a in answers) - begin
    total = _figures(answers, tiers, seconds)
    by_tier = {
        tier.name: _figures([a for a in answers if a.ask.tier == tier.name], tiers, seconds)
        for tier in tiers
    }
    cost = None
    if price_per_hour is not None and total.met_tokens:
        cost = price_per_hour * seconds / 3600 / total.met_tokens * 1e6
    reasons: dict[str, int] = {}
    for answer in answers:
        if answer.reason:
            reasons[answer.reason] = reasons.get(answer.reason, 0) + 1
    lag = quantile([a.sent - a.due for a in answers], 0.99)
    return Row(kind, load, seconds, lag, total, by_tier, cost, reasons)


def _figures(answers: Sequence[Answer], tiers: Sequence[LoadTier], seconds: float) -> Figures:
    slos = {tier.name: tier.slo for tier in tiers}
    done = [a for a in answers if a.fate == "done"]
    met = [a for a in done if a.meets(slos[a.ask.tier])]

    def per_second(amount: int) -> float:
        # Where everything is refused at once no time passes, and nothing is done in it.
        return amount / seconds if seconds else 0.0

    return Figures(
        requests=len(answers),
        done=len(done),
        shed=sum(a.fate == "shed" for a in answers),
        failed=sum(a.fate == "failed" for a in answers),
        met=len(met),
        attainment=len(met) / len(answers) if answers else 1.0,
        requests_per_second=per_second(len(done)),
        goodput=per_second(len(met)),
        input_tokens_per_second=per_second(sum(len(a.ask.prompt_ids) for a in done)),
        output_tokens_per_second=per_second(sum(a.ask.output_tokens for a in done)),
        met_tokens=sum(a.ask.output_tokens for a in met),
        ttft=_quantiles(a.ttft for a in done),
        tpot=_quantiles(a.tpot for a in done if a.tpot is not None),
        itl=_quantiles(gap for a in done for gap in a.gaps),
        e2e=_quantiles(a.e2e for a in done),
    )


def _quantiles(values: Iterable[float]) -> Quantiles | None:
    found = list(values)
    return Quantiles(len(found), *(quantile(found, q) for q in QUANTILES)) if found else None


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    # 0.99 · 100 is 99.00000000000001 for no n that matters, but 0.07 · 100 is above 7.
    return ordered[max(0, math.ceil(round(share * len(ordered), 9)) - 1)]
