"""Scheduling rules under arbitrary arrivals, ends and cancellations."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from serve_helpers import request

from quantkit.serve.kv_cache import TokenBudget
from quantkit.serve.request import Sequence
from quantkit.serve.scheduler import PrefillChunk, Scheduler

CHUNK = 16
BUDGET = 100


def sequence(name: str, prompt: int, new: int) -> Sequence:
    return Sequence(request(name, [5] * prompt, max_tokens=new), lambda event: None)


def scheduler(max_sequences: int = 3) -> Scheduler:
    return Scheduler(max_sequences=max_sequences, prefill_chunk=CHUNK, budget=TokenBudget(BUDGET))


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
def test_rules_hold(jobs: list[tuple[int, int, int, int | None]], max_sequences: int) -> None:
    subject = scheduler(max_sequences)
    sequences = [sequence(f"s{i}", prompt, new) for i, (prompt, new, _, _) in enumerate(jobs)]
    arrivals = sorted(range(len(jobs)), key=lambda i: jobs[i][2])
    chunks: dict[Sequence, list[PrefillChunk]] = {item: [] for item in sequences}
    admitted: list[Sequence] = []
    ended: set[Sequence] = set()
    now = 0
    while len(ended) < len(jobs):
        for i in arrivals:
            if jobs[i][2] == now:
                subject.add(sequences[i])
            if jobs[i][2] <= now and jobs[i][3] == now and sequences[i] not in ended:
                subject.remove(sequences[i])
                ended.add(sequences[i])
        was_decoding = [item for item in subject.running if item.decoding]
        step = subject.schedule()
        admitted += [item for item in subject.running if item not in admitted]

        assert len(subject.running) <= max_sequences
        assert subject.budget.used <= BUDGET
        assert subject.budget.used == sum(s.request.max_length for s in subject.running)
        assert list(step.decodes) == was_decoding  # each of them, each step, once
        assert sum(chunk.end - chunk.start for chunk in step.prefills) <= CHUNK
        if subject.running:
            assert step, "running sequences, and none moves"
        elif subject.waiting:
            raise AssertionError("everything is free, and nobody is admitted")

        for item in step.decodes:
            item.output_ids.append(0)
        for chunk in step.prefills:
            assert chunk.start == chunk.sequence.prefilled
            chunk.sequence.prefilled = chunk.end
            chunks[chunk.sequence].append(chunk)
            if chunk.sequence.decoding and chunk.sequence.request.sampling.max_tokens:
                chunk.sequence.output_ids.append(0)
        for item in list(subject.running):
            if item.decoding and len(item.output_ids) >= item.request.sampling.max_tokens:
                subject.remove(item)
                ended.add(item)
        now += 1
        assert now < 10_000, "somebody starves"

    assert subject.budget.used == 0
    assert not subject.running
    assert not subject.waiting
    # First come, first served.
    order = [sequences.index(item) for item in admitted]
    assert order == [i for i in arrivals if i in order]
    # Chunks depend on the prompt alone.
    for item, parts in chunks.items():
        if item.decoding:
            length = len(item.request.prompt_ids)
            expected = [(a, min(a + CHUNK, length)) for a in range(0, length, CHUNK)]
            assert [(part.start, part.end) for part in parts] == expected


def test_a_long_prompt_does_not_stall_a_running_answer() -> None:
    subject = scheduler()
    running, long = sequence("a", 4, 20), sequence("b", 50, 1)
    subject.add(running)
    subject.schedule()
    running.prefilled = 4
    subject.add(long)
    for start in range(0, 50, CHUNK):
        step = subject.schedule()
        assert step.decodes == (running,)
        assert step.prefills == (PrefillChunk(long, start, min(start + CHUNK, 50)),)
        long.prefilled = step.prefills[0].end


def test_short_prompts_share_a_step() -> None:
    subject = scheduler()
    for name in "abc":
        subject.add(sequence(name, 6, 1))
    assert [chunk.sequence.request.id for chunk in subject.schedule().prefills] == ["a", "b"]


def test_nothing_overtakes_a_request_that_does_not_fit_yet() -> None:
    subject = scheduler()
    big, bigger, small = sequence("a", 50, 10), sequence("b", 50, 10), sequence("c", 1, 1)
    for item in (big, bigger, small):
        subject.add(item)
    subject.schedule()
    assert subject.running == [big]
    subject.remove(big)
    subject.schedule()
    assert subject.running == [bigger, small]


def test_removing_twice_or_a_stranger_changes_nothing() -> None:
    subject = scheduler()
    item = sequence("a", 5, 5)
    subject.remove(item)
    subject.add(item)
    subject.schedule()
    subject.remove(item)
    subject.remove(item)
    assert (subject.budget.used, subject.running) == (0, [])
