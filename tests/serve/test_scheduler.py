"""Scheduling rules under arbitrary arrivals, ends, cancellations, policies and page counts."""

from __future__ import annotations

from collections.abc import Sequence as Items

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_helpers import Scattered, finish, request, stepped, submit

from quantkit.models.page_pool import PagePool
from quantkit.models.runtime import Runtime
from quantkit.ops.page_store import PAGE_TOKENS
from quantkit.serve.counters import Counters
from quantkit.serve.memory import Memory, PageMemory, ReservedMemory
from quantkit.serve.policy.order import Entry, FirstCome
from quantkit.serve.request import Sequence
from quantkit.serve.scheduler import MAX_BARREN, Chunk, Scheduler

CHUNK = 16
BUDGET = 100


class NoRunner:
    """A runner of caches that hold nothing."""

    def new_cache(self) -> object:
        return object()

    def release(self, cache: object) -> None:
        assert cache is not None

    def nbytes(self, cache: object) -> int:
        return 0

    def run(self, works: object) -> list[Exception]:
        raise AssertionError("scheduling runs nothing")


def sequence(name: str, prompt: int, new: int) -> Sequence:
    return Sequence(request(name, [5] * prompt, max_tokens=new), lambda event: None)


def reserved() -> ReservedMemory:
    return ReservedMemory(NoRunner(), BUDGET)  # type: ignore[arg-type]


def scheduler(memory: Memory | None = None, max_sequences: int = 3) -> Scheduler:
    return Scheduler(max_sequences=max_sequences, prefill_chunk=CHUNK, memory=memory or reserved())


def advance(chunk: Chunk, token: int = 0) -> None:
    """What a worker does with a chunk whose guesses are all wrong."""
    item = chunk.sequence
    if item.cache is not None and hasattr(item.cache, "length"):
        assert len(item.cache.pages) * PAGE_TOKENS >= chunk.end + len(chunk.guesses)
        item.cache.length = chunk.end + len(chunk.guesses)
    item.computed = chunk.end
    if item.left == 0 and item.request.sampling.max_tokens:
        item.tokens.append(token)
        item.barren = 0


def over(item: Sequence) -> bool:
    return (
        item.left <= 1
        and item.output_tokens >= item.request.sampling.max_tokens
        and (item.left == 0 or item.output_tokens > 0)
    )


@settings(deadline=None)
@given(
    jobs=st.lists(
        st.tuples(
            st.integers(1, 60),  # prompt tokens
            st.integers(0, 40),  # new tokens
            st.integers(0, 30),  # step at which it arrives
            st.none() | st.integers(0, 40),  # step at which it is cancelled
        ),
        max_size=12,
    ),
    max_sequences=st.integers(1, 4),
)
def test_rules_hold_with_reservations(
    jobs: list[tuple[int, int, int, int | None]], max_sequences: int
) -> None:
    """First come, first served, chunks of the prompt alone: transformers' modules need it."""
    memory = reserved()
    subject = scheduler(memory, max_sequences)
    sequences = [sequence(f"s{i}", prompt, new) for i, (prompt, new, _, _) in enumerate(jobs)]
    arrivals = sorted(range(len(jobs)), key=lambda i: jobs[i][2])
    chunks: dict[Sequence, list[Chunk]] = {item: [] for item in sequences}
    admitted: list[Sequence] = []
    ended: set[Sequence] = set()
    now = 0
    while len(ended) < len(jobs):
        for i in arrivals:
            if jobs[i][2] == now:
                object.__setattr__(sequences[i].request, "arrival", now + i / 1000)
                subject.add(sequences[i])
            if jobs[i][2] <= now and jobs[i][3] == now and sequences[i] not in ended:
                subject.remove(sequences[i])
                ended.add(sequences[i])
        was_decoding = [item for item in subject.running if item.decoding]
        step = subject.schedule(now)
        admitted += [item for item in subject.running if item not in admitted]

        assert len(subject.running) <= max_sequences
        assert memory.used <= BUDGET
        assert memory.used == sum(s.request.max_length for s in subject.running)
        assert [c.sequence for c in step.decodes] == was_decoding  # each of them, each step, once
        assert sum(len(chunk) for chunk in step.prefills) <= CHUNK
        if subject.running:
            assert step, "running sequences, and none moves"
        elif subject.waiting:
            raise AssertionError("everything is free, and nobody is admitted")

        for chunk in step.prefills:
            assert chunk.start == chunk.sequence.computed
            chunks[chunk.sequence].append(chunk)
        for chunk in step.chunks:
            advance(chunk)
        for item in [item for item in subject.running if over(item)]:
            subject.remove(item)
            ended.add(item)
        now += 1
        assert now < 10_000, "somebody starves"

    assert (memory.used, subject.running, subject.waiting) == (0, [], [])
    # First come, first served.
    order = [sequences.index(item) for item in admitted]
    assert order == [i for i in arrivals if i in order]
    # Chunks depend on the prompt alone.
    for item, parts in chunks.items():
        length = len(item.request.prompt_ids)
        if item.computed >= length:
            expected = [(a, min(a + CHUNK, length)) for a in range(0, length, CHUNK)]
            assert [(part.start, part.end) for part in parts] == expected


@settings(deadline=None)
@given(
    jobs=st.lists(
        st.tuples(
            st.integers(1, 150),  # prompt tokens
            st.integers(0, 100),  # new tokens
            st.integers(0, 30),  # step at which it arrives
            st.none() | st.integers(0, 60),  # step at which it is cancelled
            st.integers(0, 2),  # tenant
            st.integers(0, 4),  # guesses a step
        ),
        max_size=10,
    ),
    max_sequences=st.integers(1, 5),
    pages=st.integers(4, 9),  # the longest request fills four
    caching=st.booleans(),
    seed=st.none() | st.integers(0, 2**32),
)
def test_every_request_ends_whatever_the_policy_and_the_memory(
    jobs: list[tuple[int, int, int, int | None, int, int]],
    max_sequences: int,
    pages: int,
    caching: bool,
    seed: int | None,
) -> None:
    pool, counters = PagePool(pages), Counters()
    memory = PageMemory(pool, counters, prefix_caching=caching)
    guesses = {f"s{i}": job[5] for i, job in enumerate(jobs)}
    subject = Scheduler(
        max_sequences=max_sequences,
        prefill_chunk=CHUNK,
        memory=memory,
        policy=FirstCome() if seed is None else Scattered(seed),
        counters=counters,
        propose=lambda items: [
            [1]
            * min(
                guesses[item.request.id],
                item.request.sampling.max_tokens - item.output_tokens - 1,
            )
            for item in items
        ],
    )
    sequences = [sequence(f"s{i}", job[0], job[1]) for i, job in enumerate(jobs)]
    for item, job in zip(sequences, jobs, strict=True):
        object.__setattr__(item.request, "tenant", str(job[4]))
    ended: set[Sequence] = set()
    now = spoken = 0
    while len(ended) < len(jobs):
        for item, (_, _, arrives, cancelled, _, _) in zip(sequences, jobs, strict=True):
            if arrives == now:
                subject.add(item)
            if arrives <= now and cancelled == now and item not in ended:
                subject.remove(item)
                ended.add(item)
        step = subject.schedule(now)
        if subject.running:
            assert step, "running sequences, and none moves"
        else:
            assert not subject.waiting, "everything is free, and nobody is admitted"
        assert len({chunk.sequence for chunk in step.chunks}) == len(step.chunks)
        assert {chunk.sequence for chunk in step.chunks} <= set(subject.running)
        assert all(item.barren <= MAX_BARREN for item in sequences)
        for chunk in step.chunks:
            assert chunk.start == chunk.sequence.computed == chunk.sequence.cache.length
            advance(chunk)
            if chunk.sequence.left <= 1:
                memory.settle(chunk.sequence)
        owned = {page for item in subject.running for page in item.cache.pages}
        assert pool.used == len(owned)
        spoken = sum(item.output_tokens for item in sequences)
        for item in [item for item in subject.running if over(item)]:
            subject.remove(item)
            ended.add(item)
        now += 1
        assert now < 100 * (len(jobs) + spoken + 1), "somebody starves"
    assert (pool.used, memory.used, subject.running, subject.waiting) == (0, 0, [], [])
    for item, job in zip(sequences, jobs, strict=True):
        assert item.output_tokens == job[1] or job[3] is not None


def test_a_long_prompt_does_not_stall_a_running_answer() -> None:
    subject = scheduler()
    running, long = sequence("a", 4, 20), sequence("b", 50, 1)
    subject.add(running)
    advance(subject.schedule(0).prefills[0])
    subject.add(long)
    for start in range(0, 50, CHUNK):
        step = subject.schedule(0)
        assert [chunk.sequence for chunk in step.decodes] == [running]
        assert step.prefills == (Chunk(long, start, min(start + CHUNK, 50)),)
        for chunk in step.chunks:
            advance(chunk)


@pytest.mark.parametrize(("paged", "expected"), [(False, "ab"), (True, "abc")])
def test_short_prompts_share_a_step(paged: bool, expected: str) -> None:
    """Pages let a prompt be cut anywhere, so the third begins with the four tokens left."""
    subject = scheduler(PageMemory(PagePool(8), Counters()) if paged else None)
    for name in "abc":
        subject.add(sequence(name, 6, 1))
    prefills = subject.schedule(0).prefills
    assert [chunk.sequence.request.id for chunk in prefills] == list(expected)
    assert sum(map(len, prefills)) == (CHUNK if paged else 12)


def test_nothing_overtakes_a_request_that_does_not_fit_yet() -> None:
    subject = scheduler()
    big, bigger, small = sequence("a", 50, 10), sequence("b", 50, 10), sequence("c", 1, 1)
    for item in (big, bigger, small):
        subject.add(item)
    subject.schedule(0)
    assert subject.running == [big]
    subject.remove(big)
    subject.schedule(0)
    assert subject.running == [bigger, small]


def test_pages_are_taken_as_they_are_needed() -> None:
    """Two answers of 100 tokens would not fit together; they start together all the same."""
    pool, counters = PagePool(3), Counters()
    subject = Scheduler(
        max_sequences=2,
        prefill_chunk=CHUNK,
        memory=PageMemory(pool, counters),
        counters=counters,
    )
    first, second = sequence("a", 8, 100), sequence("b", 8, 100)
    for item in (first, second):
        subject.add(item)
    for _ in range(56):
        for chunk in subject.schedule(0).chunks:
            advance(chunk)
    assert (subject.running, pool.used, counters.preemptions) == ([first, second], 2, 0)
    for _ in range(2):
        for chunk in subject.schedule(0).chunks:
            advance(chunk)
    # One page was left: the first took it, and the second made room for itself.
    assert (subject.running, subject.waiting, counters.preemptions) == ([first], [second], 1)
    assert (second.computed, second.output_tokens, pool.used) == (0, 57, 2)


def test_guesses_stop_nobody() -> None:
    """One page is left: the first answer's guesses would reach into it, the second needs it."""
    pool, counters = PagePool(4), Counters()
    subject = Scheduler(
        max_sequences=2,
        prefill_chunk=200,
        memory=PageMemory(pool, counters),
        counters=counters,
        propose=lambda items: [[1] * 4 for _ in items],
    )
    first, second = sequence("a", 61, 50), sequence("b", 63, 50)
    for item in (first, second):
        subject.add(item)
    for _ in range(2):  # the prompts; tokens 62 and 64, and the guesses behind them
        for chunk in subject.schedule(0).chunks:
            advance(chunk)
            if chunk.sequence.left <= 1:
                subject.memory.settle(chunk.sequence)
    pool.take()
    step = subject.schedule(0)
    assert [chunk.sequence for chunk in step.decodes] == [first, second]
    assert [len(chunk.guesses) for chunk in step.decodes] == [0, 4]
    assert counters.preemptions == 0


def test_a_candidate_may_stop_who_runs() -> None:
    class Newest(FirstCome):
        def waiting_order(
            self, waiting: Items[Entry], running: Items[Entry], now: float
        ) -> list[int]:
            return sorted(range(len(waiting)), key=lambda i: -waiting[i].arrival)

        def victim(self, running: Items[Entry], candidate: Entry | None, now: float) -> int | None:
            older = [
                i for i, e in enumerate(running) if candidate and e.arrival < candidate.arrival
            ]
            return older[0] if older else None

    memory = PageMemory(PagePool(8), Counters())
    subject = Scheduler(max_sequences=1, prefill_chunk=CHUNK, memory=memory, policy=Newest())
    old, new = sequence("old", 5, 5), sequence("new", 5, 5)
    subject.add(old)
    subject.schedule(0)
    subject.add(new)
    subject.schedule(0)
    assert (subject.running, subject.waiting) == ([new], [old])
    assert (old.cache, old.computed, old.preempted) == (None, 0, True)


def test_requests_cannot_chase_each_other_away_for_ever() -> None:
    """Whoever waits stops whoever runs, before a prompt was ever read to its end."""

    class Ruthless(FirstCome):
        def victim(self, running: Items[Entry], candidate: Entry | None, now: float) -> int | None:
            return 0

    counters = Counters()
    subject = Scheduler(
        max_sequences=1,
        prefill_chunk=CHUNK,
        memory=PageMemory(PagePool(8), counters),
        policy=Ruthless(),
        counters=counters,
    )
    rivals = [sequence("a", 100, 5), sequence("b", 100, 5)]
    for item in rivals:
        subject.add(item)
    for _ in range(200):
        for chunk in subject.schedule(0).chunks:
            advance(chunk)
        for item in [item for item in subject.running if over(item)]:
            subject.remove(item)
    assert [item.output_tokens for item in rivals] == [5, 5]
    assert 0 < counters.preemptions <= MAX_BARREN * 10


def test_removing_twice_or_a_stranger_changes_nothing() -> None:
    subject = scheduler()
    item = sequence("a", 5, 5)
    subject.remove(item)
    subject.add(item)
    subject.schedule(0)
    subject.remove(item)
    subject.remove(item)
    assert (subject.memory.used, subject.running) == (0, [])


def test_a_policy_is_not_asked_while_nothing_changes(native: Runtime) -> None:
    """Once it knows that nothing waits and nobody reads, until somebody comes."""

    class Asked(FirstCome):
        count = 0

        def waiting_order(self, waiting, running, now):  # type: ignore[no-untyped-def]
            self.count += 1
            return super().waiting_order(waiting, running, now)

    policy = Asked()
    engine = stepped(native, policy)
    submit(engine, request("a", [5, 6], max_tokens=30, ignore_eos=True))
    counts = []
    for turn in range(12):
        if turn == 6:
            submit(engine, request("b", [5, 6], max_tokens=30, ignore_eos=True))
        engine._take_orders()
        engine.step()
        counts.append(policy.count)
    assert counts == [1, 2, 2, 2, 2, 2, 3, 4, 4, 4, 4, 4]
    finish(engine)
