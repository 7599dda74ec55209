"""Who is let in: quotas, promises, and that one tenant's flood is its own."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.serve.policy.admission import MAX_QUEUE, MAX_RETRY_AFTER, Admission
from quantkit.serve.policy.quota import Bucket
from quantkit.serve.policy.throughput import Throughput
from quantkit.serve.policy.tiers import Tenant, Tier

PAID, FREE = Tier("paid", 8.0, ttft=2.0, max_queue=8), Tier("free", 1.0)
ACME, OTHER, GUEST = Tenant("acme", "paid"), Tenant("other", "paid"), Tenant("guest", "free")
names = itertools.count()

#: No assertion on time: a busy machine is not a defect.
unhurried = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])


def admission(*tenants: Tenant) -> Admission:
    return Admission((PAID, FREE), tenants or (ACME, OTHER, GUEST), now=0.0)


def measured(seconds_per_token: float = 0.01, *, now: float = 0.0) -> Admission:
    """One that has seen a prompt of 100 tokens in each tier."""
    found = admission()
    for tenant in (ACME, GUEST):
        assert found.admit(tenant, {"first": 100}, now) is None
        now += 100 * seconds_per_token
        found.started("first", now)
        found.ended("first", 0, now)
    return found


@unhurried
@given(
    rate=st.floats(0.1, 100),
    capacity=st.floats(1, 100),
    steps=st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 5)), max_size=60),
)
def test_a_bucket_bounds_any_window(
    rate: float, capacity: float, steps: list[tuple[float, float]]
) -> None:
    bucket = Bucket(rate, capacity, 0.0)
    now, taken = 0.0, [(0.0, 0.0)]
    for gap, amount in steps:
        now += gap
        if not bucket.wait(amount, now):
            bucket.take(amount, now)
            taken.append((now, amount))
    largest = max((amount for _, amount in steps), default=0.0)
    for i, (start, _) in enumerate(taken):
        inside = sum(amount for _, amount in taken[i:])
        # A need beyond the capacity is let in when the bucket is full and overdraws it.
        assert inside <= rate * (now - start) + capacity + largest + 1e-6


@unhurried
@given(debt=st.floats(1, 1e4), rate=st.floats(0.1, 1e3))
def test_a_bucket_says_when_it_lets_in(debt: float, rate: float) -> None:
    bucket = Bucket(rate, 10.0, 0.0)
    bucket.take(debt, 0.0)
    wait = bucket.wait(1.0, 0.0)
    assert bucket.wait(1.0, wait + 1e-6) <= 1e-6
    assert wait == pytest.approx(max(0.0, (debt - 9.0) / rate))


def test_a_clock_set_back_gives_nothing() -> None:
    bucket = Bucket(1.0, 10.0, 100.0)
    bucket.take(10.0, 100.0)
    assert bucket.wait(5.0, 50.0) == 5.0
    assert bucket.wait(5.0, 50.0) == 5.0
    assert bucket.wait(5.0, 55.0) == 0.0


def test_rate_of_requests() -> None:
    tenant = Tenant("t", "free", requests_per_second=0.5)
    found = admission(tenant)
    assert found.admit(tenant, {"a": 5}, 0.0) is None
    refusal = found.admit(tenant, {"b": 5}, 0.5)
    assert refusal is not None
    assert (refusal.status, refusal.code, refusal.retry_after) == (429, "rate_limit", 2)
    assert found.admit(tenant, {"b": 5}, 2.0) is None


def test_a_long_wait_is_told_as_it_is() -> None:
    tenant = Tenant("t", "free", requests_per_second=0.001)
    found = admission(tenant)
    assert found.admit(tenant, {"a": 5}, 0.0) is None
    refusal = found.admit(tenant, {"b": 5}, 0.0)
    assert refusal is not None
    assert refusal.retry_after == 1000


def test_answers_count_when_they_are_over() -> None:
    tenant = Tenant("t", "free", tokens_per_second=10)  # a burst of 100
    found = admission(tenant)
    assert found.admit(tenant, {"a": 50}, 0.0) is None
    found.ended("a", 250, 0.0)  # 200 in debt
    refusal = found.admit(tenant, {"b": 50}, 0.0)
    assert refusal is not None
    assert (refusal.status, refusal.retry_after) == (429, 25)
    assert "10 tokens a second" in refusal.message
    assert found.admit(tenant, {"b": 50}, 25.0) is None


def test_concurrency() -> None:
    tenant = Tenant("t", "free", concurrency=2)
    found = admission(tenant)
    assert found.admit(tenant, {"a": 1, "b": 1}, 0.0) is None
    refusal = found.admit(tenant, {"c": 1}, 0.0)
    assert refusal is not None
    assert (refusal.status, refusal.code) == (429, "concurrency")
    found.started("a", 0.1)
    found.ended("a", 3, 0.2)
    assert found.admit(tenant, {"c": 1}, 0.3) is None
    never = found.admit(tenant, {"d": 1, "e": 1, "f": 1}, 0.3)
    assert never is not None
    assert never.status == 400, "no waiting would help"


def test_who_is_over_a_limit_need_not_come_in() -> None:
    tenant = Tenant("t", "free", requests_per_second=1, tokens_per_second=10, concurrency=2)
    found = admission(tenant)
    assert found.knock(tenant, 0.0) is None
    assert found.knock(tenant, 0.0, charge=True) is None, "the first one cost nothing"
    refusal = found.knock(tenant, 0.0)
    assert refusal is not None
    assert (refusal.status, refusal.code, refusal.retry_after) == (429, "rate_limit", 1)
    assert found.admit(tenant, {"a": 100}, 1.0) is None
    assert found.admit(tenant, {"b": 0}, 2.0) is None
    refusal = found.knock(tenant, 3.0)
    assert refusal is not None
    assert refusal.code == "concurrency"
    found.ended("a", 100, 3.0)  # 20 have come in since, so 80 are owed
    refusal = found.knock(tenant, 3.0)
    assert refusal is not None
    assert (refusal.code, refusal.retry_after) == ("rate_limit", 8)
    assert found.knock(tenant, 11.1) is None


def test_a_promise_that_cannot_be_kept_is_refused_at_once() -> None:
    found = measured()  # 0.01 s a token; paid promises 2 s
    assert found.admit(ACME, {"a": 150}, 10.0) is None
    refusal = found.admit(ACME, {"b": 100}, 10.0)
    assert refusal is not None
    assert (refusal.status, refusal.code, refusal.retry_after) == (503, "too_slow", 1)
    assert "2.5 s" in refusal.message
    assert found.admit(ACME, {"b": 40}, 10.0) is None, "a shorter one is in time"
    assert found.admit(GUEST, {"c": 10_000}, 10.0) is None, "nothing is promised to it"


def test_nothing_is_refused_before_anything_was_measured() -> None:
    found = admission()
    assert found.wait(ACME, 10) is None
    for i in range(PAID.max_queue or 0):
        assert found.admit(ACME, {f"r{i}": 10_000}, 0.0) is None


def test_alone_it_is_let_in_however_slow_the_server_was() -> None:
    found = measured(seconds_per_token=1.0)
    assert found.admit(ACME, {"a": 100}, 500.0) is None
    assert found.admit(ACME, {"b": 100}, 500.0) is not None


def test_a_flood_is_its_own_tenants() -> None:
    found = measured()
    flood = (found.admit(ACME, {f"f{i}": 100}, 10.0) for i in range(50))
    refused = [refusal for refusal in flood if refusal]
    assert len(refused) > 40
    assert {refusal.status for refusal in refused} == {503}
    assert found.admit(OTHER, {"o": 100}, 10.0) is None


def test_a_full_queue_lets_in_who_has_nothing_there() -> None:
    found = admission()
    for i in range(8):
        assert found.admit(ACME, {f"f{i}": 1}, 0.0) is None
    refusal = found.admit(ACME, {"more": 1}, 0.0)
    assert refusal is not None
    assert (refusal.status, refusal.code) == (503, "queue_full")
    assert found.admit(OTHER, {"o": 1}, 0.0) is None
    assert found.admit(OTHER, {"p": 1}, 0.0) is not None


def batch(name: str, count: int) -> dict[str, int]:
    return {f"{name}{i}": 1 for i in range(count)}


def test_a_tier_that_says_nothing_has_a_queue_of_its_own() -> None:
    found = admission()
    assert found.admit(GUEST, batch("g", MAX_QUEUE), 0.0) is None
    refusal = found.admit(GUEST, batch("more", 1), 0.0)
    assert refusal is not None
    assert (refusal.status, refusal.code) == (503, "queue_full")
    assert found.admit(ACME, batch("a", 8), 0.0) is None, "another tier's queue is another one"


def test_a_batch_counts_as_what_it_is() -> None:
    found = admission()
    assert found.admit(ACME, batch("a", 6), 0.0) is None
    refusal = found.admit(ACME, batch("b", 3), 0.0)
    assert refusal is not None
    assert (refusal.status, refusal.code) == (503, "queue_full")
    assert found.admit(ACME, batch("c", 2), 0.0) is None


def test_a_batch_that_no_queue_holds_is_never_let_in() -> None:
    found = admission()
    for tenant, limit in ((ACME, 8), (GUEST, MAX_QUEUE)):
        refusal = found.admit(tenant, batch("x", limit + 1), 0.0)
        assert refusal is not None
        assert (refusal.status, refusal.code, refusal.retry_after) == (400, "queue_full", 0)
    assert found.waiting("paid") == found.waiting("free") == 0


@unhurried
@given(tokens=st.lists(st.integers(1, 2000), min_size=2, max_size=2), pending=st.integers(0, 5))
def test_more_work_never_takes_less(tokens: list[int], pending: int) -> None:
    found = measured()
    for i in range(pending):
        found.admit(GUEST, {f"g{i}": 100}, 10.0)
    waits = [found.wait(GUEST, n) for n in sorted(tokens)]
    assert waits == sorted(waits)
    found.admit(ACME, {"above": 50}, 10.0)
    after = found.wait(GUEST, 10)
    assert after is not None
    assert after >= (found.wait(ACME, 0) or 0.0), "higher tiers come first"


@unhurried
@given(
    events=st.lists(
        st.tuples(
            st.sampled_from(["admit", "start", "end"]),
            st.integers(0, 5),
            st.floats(-100, 100),
        ),
        max_size=80,
    )
)
def test_the_ledger_survives_any_order_of_events_and_any_clock(
    events: list[tuple[str, int, float]],
) -> None:
    tenant = Tenant("t", "paid", requests_per_second=5, tokens_per_second=100, concurrency=4)
    found = admission(tenant)
    live: set[str] = set()
    now = 0.0
    for what, i, gap in events:
        now += gap  # also backwards
        if what == "admit":
            name = f"r{next(names)}"
            refusal = found.admit(tenant, {name: 10 * i + 1}, now)
            if refusal is None:
                live.add(name)
            else:
                assert 1 <= refusal.retry_after <= MAX_RETRY_AFTER
        elif live:
            name = sorted(live)[i % len(live)]
            if what == "start":
                found.started(name, now)
            else:
                found.ended(name, i, now)
                found.ended(name, i, now)  # said twice
                live.discard(name)
        assert found.waiting("paid") <= len(live) <= 4
        assert (found.wait(tenant, 5) or 0.0) >= 0.0
    for name in live:
        found.ended(name, 0, now)
    assert found.waiting("paid") == 0
    later = max(now, 0.0) + 1e6
    assert found.admit(tenant, {f"{i}": 1 for i in range(4)}, later) is None


def test_idle_time_is_not_measured() -> None:
    throughput = Throughput()
    throughput.arrive(0.0)
    throughput.leave(100, 1.0)
    throughput.arrive(1000.0)
    throughput.leave(100, 1001.0)
    assert throughput.rate == pytest.approx(100.0, rel=0.1)
