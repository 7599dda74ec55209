"""Guesses change how many passes an answer takes, and not one of its tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_helpers import generate, request, running

from quantkit.errors import UsageError
from quantkit.models.runtime import Runtime
from quantkit.serve.counters import Counters
from quantkit.serve.request import Sequence
from quantkit.serve.speculation import (
    FIRST_PAUSE,
    Draft,
    PromptLookup,
    SpeculativeConfig,
    Speculator,
    StepCost,
)

#: Looks single tokens up, so that a random model's answers are guessed at all.
EAGER = SpeculativeConfig(num_speculative_tokens=5, prompt_lookup_min=1)


def slow_lookup(tokens: list[int], count: int, shortest: int, longest: int) -> list[int]:
    for n in range(longest, shortest - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[-n:]:
                grown = list(tokens)
                for place in range(end, end + count):
                    grown.append(grown[place])
                return grown[len(tokens) :]
    return []


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    first=st.integers(1, 60),
    count=st.integers(1, 6),
    shortest=st.integers(1, 3),
)
def test_lookup_equals_the_slow_form(
    tokens: list[int], first: int, count: int, shortest: int
) -> None:
    """Called at every length from ``first`` on, as a growing answer does."""
    lookup = PromptLookup(shortest, 4)
    for length in range(min(first, len(tokens)), len(tokens) + 1):
        known = tokens[:length]
        assert lookup(known, count) == slow_lookup(known, count, shortest, 4)


@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("caching", [True, False])
def test_answers_are_the_same_bits_with_and_without(
    native: Runtime, monkeypatch, kv: str, caching: bool
) -> None:
    """Greedy, sampled, penalized, stopped by a string; right and wrong guesses in each."""
    monkeypatch.setattr(StepCost, "break_even", lambda self, sequences: 0.0)
    loop = [5, 6, 7, 8, 9, 10, 11, 12] * 12
    options: list[dict[str, object]] = [
        {},
        {"temperature": 0.7, "seed": 3},
        {"temperature": 1.0, "seed": 4, "top_k": 4, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.2, "min_tokens": 30},
        {"stop": ("e",)},
    ]
    requests = [
        request(f"r{i}", loop[i : i + 60 + 9 * i], max_tokens=70, logprobs=1, **more)
        for i, more in enumerate(options)
    ]
    config = {"kv_cache_dtype": kv, "enable_prefix_caching": caching, "prefill_chunk": 64}
    with running(native, **config) as engine:
        plain = generate(engine, *requests)
    with running(native, speculative_config=EAGER, **config) as engine:
        guessed = generate(engine, *requests)
        counters = engine.counters
        assert 0 < counters.accepted_tokens < counters.draft_tokens
        text = engine.metrics.render().decode()
        assert f"quantkit_spec_decode_draft_tokens {counters.draft_tokens}.0" in text
    for mine, theirs in zip(guessed, plain, strict=True):
        assert mine.events[:-1] == theirs.events[:-1]
        assert mine.finished.reason == theirs.finished.reason


def test_right_guesses_save_passes(native: Runtime, monkeypatch) -> None:
    monkeypatch.setattr(StepCost, "break_even", lambda self, sequences: 0.0)
    passes = []
    with running(native, speculative_config=SpeculativeConfig()) as engine:
        run = engine.runner.run
        monkeypatch.setattr(
            engine.runner, "run", lambda works: (passes.append(len(works)), run(works))[1]
        )
        [outcome] = generate(engine, request("a", [5], max_tokens=41, logit_bias={9: 100}))
    assert outcome.tokens == [9] * 41
    # The prompt, two until a pair was seen before, seven of five tokens and one of the last three.
    assert len(passes) == 1 + 2 + 7 + 1
    assert engine.counters.draft_tokens == engine.counters.accepted_tokens


def test_guesses_are_never_too_many() -> None:
    speculator = Speculator(EAGER, Counters())
    for asked, expected in ((1, 0), (2, 1), (4, 3), (20, 5)):
        sequence = Sequence(request("a", [5, 6] * 8, max_tokens=asked), lambda event: None)
        assert len(speculator.propose(sequence)) == expected


def test_what_does_not_pay_makes_a_pause() -> None:
    speculator = Speculator(EAGER, Counters())
    for rows in (1, 4) * 10:
        speculator.observe(1, rows, 1.0 + 0.25 * rows)  # a row costs a fifth of a lone step
    assert speculator.cost.break_even(1) == pytest.approx(0.2, abs=0.01)
    assert speculator.cost.break_even(8) == pytest.approx(2 / 3, abs=0.01)
    good = Sequence(request("good", [5, 6] * 8, max_tokens=999), lambda event: None)
    bad = Sequence(request("bad", [5, 6] * 8, max_tokens=999), lambda event: None)
    pauses = []
    for written in range(600):
        for sequence, right in ((good, 2), (bad, 0)):
            guesses = speculator.propose(sequence)
            if guesses:
                speculator.verified(sequence, len(guesses), right)
            sequence.tokens.append(5 + written % 2)
            if sequence is bad:
                pauses.append(not guesses)
    assert good.draft is not None
    assert good.draft.pause == FIRST_PAUSE  # never made one
    assert pauses.count(False) < 30
    assert speculator.propose(good)
    assert speculator.counters.draft_tokens > speculator.counters.accepted_tokens > 0


def test_steps_of_one_size_say_nothing() -> None:
    cost = StepCost()
    unknown = cost.break_even(1)
    for _ in range(20):
        cost.observe(4, 1.0)
    assert 0 < cost.break_even(1) < unknown < 1
    assert cost.break_even(4) == pytest.approx(0.25)


def test_pauses_grow() -> None:
    draft = Draft(PromptLookup(1, 2))
    ends = []
    for _ in range(7):
        draft.rest(0)
        ends.append(draft.resume)
    assert ends == [16, 32, 64, 128, 256, 512, 512]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "eagle"},
        {"num_speculative_tokens": 0},
        {"num_speculative_tokens": 17},
        {"prompt_lookup_min": 0},
        {"prompt_lookup_min": 5},
    ],
)
def test_settings_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        SpeculativeConfig(**options)  # type: ignore[arg-type]


def test_modules_do_not_speculate(runtime: Runtime) -> None:
    with (
        pytest.raises(UsageError, match="needs the native decoder"),
        running(runtime, speculative_config=EAGER),
    ):
        pass
