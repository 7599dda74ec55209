"""Who runs next: properties of `Tiered` over random mixes, and of what it is made of."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.serve.policy.fairness import INPUT_WEIGHT, OUTPUT_WEIGHT, Counters
from quantkit.serve.policy.order import Entry, FirstCome, Policy
from quantkit.serve.policy.tiered import Tiered, _cost, _due
from quantkit.serve.policy.tiers import Tier

PAID, FREE, BULK = Tier("paid", 8.0, ttft=1.0), Tier("free", 2.0), Tier("bulk", 1.0)
TIERS = (PAID, FREE, BULK)
RANK = {tier.name: rank for rank, tier in enumerate(TIERS)}

#: No assertion on time: a busy machine is not a defect.
unhurried = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])


def entry(
    name: str,
    *,
    tier: str = "paid",
    tenant: str = "a",
    arrival: float = 0.0,
    prompt: int = 10,
    left: int | None = None,
    outputs: int = 0,
    max_tokens: int = 10,
    deadline: float | None = None,
) -> Entry:
    left = prompt if left is None else left
    return Entry(name, arrival, prompt, left, outputs, max_tokens, tenant, tier, deadline)


@st.composite
def mixes(draw: st.DrawFn, least: int = 0) -> list[Entry]:
    """Requests of three tiers and three tenants, somewhere on their way."""
    entries = []
    for i in range(draw(st.integers(least, 12))):
        prompt = draw(st.integers(1, 500))
        arrival = draw(st.floats(0, 100))
        entries.append(
            entry(
                f"r{i}",
                tier=draw(st.sampled_from([tier.name for tier in TIERS])),
                tenant=draw(st.sampled_from("abc")),
                arrival=arrival,
                prompt=prompt,
                left=draw(st.integers(0, prompt)),
                outputs=draw(st.integers(0, 50)),
                max_tokens=draw(st.integers(50, 200)),
                deadline=draw(st.none() | st.floats(0, 50).map(lambda s, a=arrival: a + s)),
            )
        )
    return entries


def serve(policy: Policy, entry: Entry) -> float:
    """Compute a whole request; its weighted tokens."""
    policy.served(entry, entry.prompt_left)
    read = entry._replace(prompt_left=0)
    for _ in range(entry.max_tokens):
        policy.served(read, 1)
    return INPUT_WEIGHT * entry.prompt_left + OUTPUT_WEIGHT * entry.max_tokens


@pytest.mark.parametrize("policy", [FirstCome(), Tiered(TIERS)])
@unhurried
@given(waiting=mixes(), running=mixes())
def test_everyone_has_a_place(policy: Policy, waiting: list[Entry], running: list[Entry]) -> None:
    order = policy.waiting_order(waiting, running, 200.0)
    assert sorted(order) == list(range(len(waiting)))
    prompts = policy.prefill_order(running, 200.0)
    assert sorted(prompts) == [i for i, e in enumerate(running) if e.prompt_left]
    for served in running:
        policy.served(served, 7)


def test_class_then_tenant_then_due_date() -> None:
    policy = Tiered(TIERS)
    policy.served(entry("x", tenant="a"), 100)
    waiting = [
        entry("free", tier="free", arrival=0.0),
        entry("a-late", tenant="a", arrival=1.0),
        entry("a-due", tenant="a", arrival=2.0, deadline=3.0),
        entry("b", tenant="b", arrival=9.0),
    ]
    # Nobody had waited before: the lift makes tenants equal, and arrivals decide between them.
    policy.waiting_order([waiting[1], waiting[3]], [], 10.0)
    policy.served(entry("y", tenant="a"), 50)
    order = policy.waiting_order(waiting, [], 10.0)
    assert [waiting[i].id for i in order] == ["b", "a-due", "a-late", "free"]


@unhurried
@given(waiting=mixes(2))
def test_tiers_keep_their_order_before_anything_was_served(waiting: list[Entry]) -> None:
    ranks = [RANK[waiting[i].tier] for i in Tiered(TIERS).waiting_order(waiting, [], 0.0)]
    assert ranks == sorted(ranks)


@unhurried
@given(waiting=mixes(2))
def test_a_tenants_requests_go_by_due_date(waiting: list[Entry]) -> None:
    waiting = [e._replace(tenant="a", tier="paid") for e in waiting]
    order = Tiered(TIERS).waiting_order(waiting, [], 0.0)
    due = [_due(waiting[i]) for i in order]
    assert due == sorted(due)


@unhurried
@given(
    prompts=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    outputs=st.integers(1, 60),
    tier=st.sampled_from([FREE, BULK]),
    own=st.tuples(st.integers(1, 300), st.integers(1, 60)),
)
def test_no_tier_starves(
    prompts: list[int], outputs: int, tier: Tier, own: tuple[int, int]
) -> None:
    """While paid requests always wait, a lower tier's goes first after cost / share tokens."""
    policy = Tiered(TIERS)
    lower = entry("low", tier=tier.name, tenant="z", prompt=own[0], max_tokens=own[1])
    share = tier.weight / (PAID.weight + tier.weight)
    largest = INPUT_WEIGHT * max(prompts) + OUTPUT_WEIGHT * outputs
    passed = 0.0
    for turn in range(100_000):
        paid = entry(f"p{turn}", prompt=prompts[turn % len(prompts)], max_tokens=outputs)
        waiting = [paid, lower]
        first = waiting[policy.waiting_order(waiting, [], float(turn))[0]]
        if first is lower:
            break
        passed += serve(policy, first)
    assert passed <= _cost(lower) / share + largest + 1e-6
    assert passed >= _cost(lower) / share - 1e-6, "and not before its share was due"


def test_a_reading_prompt_of_a_lower_tier_does_not_starve() -> None:
    policy = Tiered(TIERS)
    low = entry("low", tier="free", prompt=200)
    for turn in range(1000):
        running = [entry(f"p{turn}", prompt=100), low]
        policy.waiting_order([], running, float(turn))
        chosen = running[policy.prefill_order(running, float(turn))[0]]
        policy.served(chosen, 50)
        if chosen is low:
            low = low._replace(prompt_left=low.prompt_left - 50)
        if not low.prompt_left:
            break
    assert low.prompt_left == 0
    assert turn > 4, "the paid prompts went first"


def test_a_lower_tier_earns_nothing_while_it_runs_on_spare_capacity() -> None:
    """Credit from hours of plenty would come back as a burst in front of the paid tier."""
    policy = Tiered(TIERS)
    free = entry("f", tier="free", max_tokens=5)
    for _ in range(100):
        policy.waiting_order([], [free._replace(prompt_left=0)], 0.0)
        policy.served(entry("p", prompt=1000), 1000)
    assert list(policy.waiting_order([free, entry("p")], [], 0.0)) == [1, 0]


@unhurried
@given(
    sizes=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    outputs=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    turns=st.integers(10, 200),
)
def test_tenants_get_equal_service(
    sizes: tuple[int, int], outputs: tuple[int, int], turns: int
) -> None:
    """Theorem 4.4 of the paper: two that always wait differ by one request's cost at most."""
    policy = Tiered(TIERS)
    got = {"a": 0.0, "b": 0.0}
    for turn in range(turns):
        waiting = [
            entry(f"{turn}{t}", tenant=t, arrival=turn, prompt=sizes[i], max_tokens=outputs[i])
            for i, t in enumerate("ab")
        ]
        first = waiting[policy.waiting_order(waiting, [], 0.0)[0]]
        got[first.tenant] += serve(policy, first)
    largest = max(INPUT_WEIGHT * s + OUTPUT_WEIGHT * o for s, o in zip(sizes, outputs, strict=True))
    assert abs(got["a"] - got["b"]) <= largest + 1e-6


@unhurried
@given(idle=st.floats(0, 1e6), busy=st.floats(0, 1e6))
def test_idle_time_earns_no_credit(idle: float, busy: float) -> None:
    counters = Counters()
    counters.queue({"busy"})
    counters.charge("idle", idle)
    counters.charge("busy", busy)
    counters.queue({"busy", "idle"})
    assert counters["idle"] == max(idle, counters["busy"])


def test_a_newcomer_meets_the_last_one_who_left() -> None:
    counters = Counters()
    counters.queue({"a"})
    counters.charge("a", 70.0)
    counters.queue(set())
    counters.queue({"b"})
    assert counters["b"] == 70.0


@unhurried
@given(running=mixes(1), candidate=mixes(1))
def test_who_makes_room(running: list[Entry], candidate: list[Entry]) -> None:
    policy = Tiered(TIERS)
    count = {tier.name: sum(e.tier == tier.name for e in running) for tier in TIERS}
    found = policy.victim(running, candidate[0], 0.0)
    if found is not None:
        victim = running[found]
        assert RANK[victim.tier] > RANK[candidate[0].tier], "never its own tier or a better one"
        assert count[victim.tier] > 1, "a tier is never emptied"
        assert victim.arrival == max(e.arrival for e in running if e.tier == victim.tier)
    else:
        below = {e.tier for e in running if RANK[e.tier] > RANK[candidate[0].tier]}
        among = {e.tier for e in running} | {candidate[0].tier}
        total = sum(tier.weight for tier in TIERS if tier.name in among)
        for name in below:
            share = TIERS[RANK[name]].weight / total
            assert count[name] <= max(1, share * len(running)), "nothing to spare"
    found = policy.victim(running, None, 0.0)
    assert found is not None
    same = [e.arrival for e in running if e.tier == running[found].tier]
    assert running[found].arrival == max(same)
    assert policy.victim([], None, 0.0) is None


def test_an_unknown_tier_is_the_last_one() -> None:
    waiting = [entry("x", tier="gold"), entry("free", tier="free")]
    assert list(Tiered(TIERS).waiting_order(waiting, [], 0.0)) == [1, 0]


@unhurried
@given(times=st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=20), waiting=mixes(1))
def test_a_clock_that_jumps_changes_nothing(times: list[float], waiting: list[Entry]) -> None:
    policy = Tiered(TIERS)
    expected = list(policy.waiting_order(waiting, [], 0.0))
    for now in times:
        assert list(policy.waiting_order(waiting, [], now)) == expected
        policy.prefill_order(waiting, now)
        policy.victim(waiting, None, now)
