"""Guesses change how many passes an answer takes, and not one of its tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_helpers import always_guess, finish, generate, request, running, stepped, submit

from quantkit.errors import UsageError
from quantkit.models.runtime import Runtime
from quantkit.serve.answer import Answer
from quantkit.serve.counters import Counters
from quantkit.serve.lookup import Found, PromptLookup, follow
from quantkit.serve.request import Sequence
from quantkit.serve.speculation import SpeculativeConfig, Speculator

#: Looks single tokens up, so that a random model's answers are guessed at all.
EAGER = SpeculativeConfig(num_speculative_tokens=5, prompt_lookup_min=1)


def slow_lookup(
    tokens: list[int], ends: range, shortest: int, longest: int
) -> tuple[int, int] | None:
    """Length and end of the longest run that ended at one of ``ends``, the last of them."""
    for n in range(longest, shortest - 1, -1):
        for end in reversed(ends):
            if end >= n and tokens[end - n : end] == tokens[-n:]:
                return n, end
    return None


def slow_guesses(tokens: list[int], end: int, count: int) -> list[int]:
    grown = list(tokens)
    for place in range(end, end + count):
        grown.append(grown[place])
    return grown[len(tokens) :]


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    first=st.integers(1, 60),
    count=st.integers(1, 6),
    shortest=st.integers(1, 3),
    prompt=st.integers(0, 60),
)
def test_lookup_equals_the_slow_form(
    tokens: list[int], first: int, count: int, shortest: int, prompt: int
) -> None:
    """Called at every length from ``first`` on, as a growing answer does."""
    lookup = PromptLookup(shortest, 4, prompt)
    for length in range(min(first, len(tokens)), len(tokens) + 1):
        known = tokens[:length]
        places = {True: range(min(prompt, length)), False: range(prompt, length)}
        slow = {
            quoted: found
            for quoted, ends in places.items()
            if (found := slow_lookup(known, ends, shortest, 4)) is not None
        }
        found = lookup.find(known)
        assert {f.quoted: (f.length, f.end) for f in found} == slow
        for f in found:
            assert follow(known, f.end, count) == slow_guesses(known, f.end, count)


def test_kinds_tell_prompt_and_answer_apart() -> None:
    """ "a b" stood in the prompt and, with something else behind it, in the answer."""
    a, b, c, d = range(4)
    found = PromptLookup(1, 4, 3).find([a, b, c, a, b, d, a, b])
    assert found == [Found(2, 2, quoted=True), Found(2, 5, quoted=False)]
    assert [f.kind for f in found] == [2, -2]


@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("caching", [True, False])
def test_answers_are_the_same_bits_with_and_without(
    native: Runtime, monkeypatch, kv: str, caching: bool
) -> None:
    """Greedy, sampled, penalized, stopped by a string; right and wrong guesses in each."""
    always_guess(monkeypatch)
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
        assert counters.drafts <= counters.draft_tokens
        text = engine.metrics.render().decode()
        assert f"quantkit_spec_decode_draft_tokens {counters.draft_tokens}.0" in text
    for mine, theirs in zip(guessed, plain, strict=True):
        assert mine.events[:-1] == theirs.events[:-1]
        assert mine.finished.reason == theirs.finished.reason


def test_right_guesses_save_passes(native: Runtime, monkeypatch) -> None:
    always_guess(monkeypatch)
    passes = []
    with running(native, speculative_config=SpeculativeConfig(prompt_lookup_min=2)) as engine:
        run = engine.runner.run
        monkeypatch.setattr(
            engine.runner, "run", lambda works: (passes.append(len(works)), run(works))[1]
        )
        [outcome] = generate(engine, request("a", [5], max_tokens=41, logit_bias={9: 100}))
    assert outcome.tokens == [9] * 41
    # The prompt, two until a pair was seen before, seven of five tokens and one of the last three.
    assert len(passes) == 1 + 2 + 7 + 1
    assert engine.counters.draft_tokens == engine.counters.accepted_tokens


def test_guesses_are_never_too_many(monkeypatch) -> None:
    always_guess(monkeypatch)
    speculator = Speculator(EAGER, Counters())
    for asked, expected in ((1, 0), (2, 1), (4, 3), (20, 5)):
        sequence = Sequence(request("a", [5, 6] * 8, max_tokens=asked), lambda event: None)
        sequence.answer = Possible(99)  # type: ignore[assignment]
        assert [len(guesses) for guesses in speculator.propose([sequence])] == [expected]


def test_what_ends_an_answer_is_not_guessed(runtime: Runtime) -> None:
    answer = Answer(request("a", [5]), runtime.tokenizer, {9}, 384, "cpu")
    assert answer.possible([5, 6, 9, 7]) == [5, 6]
    assert answer.possible([9]) == []
    assert answer.possible([5, 6]) == [5, 6]


def test_a_right_guess_that_ends_an_answer_wins_no_token(native: Runtime, monkeypatch) -> None:
    """A stop string is seen only once its last token is chosen."""
    always_guess(monkeypatch)
    engine = stepped(native, speculative_config=SpeculativeConfig(prompt_lookup_min=2))
    booked, verified = [], engine.speculator.verified  # type: ignore[union-attr]

    def book(sequence: Sequence, *counts: int) -> None:
        booked.append(counts)
        verified(sequence, *counts)

    monkeypatch.setattr(engine.speculator, "verified", book)
    stop = native.tokenizer.decode([9] * 12)
    outcome = submit(engine, request("a", [5], max_tokens=41, logit_bias={9: 100}, stop=(stop,)))
    finish(engine)
    assert outcome.finished.reason == "stop"
    # Three tokens until a pair was seen before, five, and four of the five that the pass foresaw.
    assert outcome.tokens == [9] * 12
    assert booked == [(4, 4, 4), (4, 4, 3)]


class Possible:
    """An answer whose form allows so many tokens more."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def possible(self, guesses: list[int]) -> list[int]:
        if self.tokens < 0:
            raise RuntimeError("no such form")
        return guesses[: self.tokens]


def test_one_whose_guesses_fail_is_left_alone(monkeypatch, caplog) -> None:
    """The others are guessed, and it is not tried again."""
    always_guess(monkeypatch)
    speculator = Speculator(EAGER, Counters())
    items = [
        Sequence(request(name, [5, 6] * 8, max_tokens=99), lambda event: None) for name in "abc"
    ]
    for item, tokens in zip(items, (99, -1, 2), strict=True):
        item.answer = Possible(tokens)  # type: ignore[assignment]
    for _ in range(3):
        assert [len(guesses) for guesses in speculator.propose(items)] == [5, 0, 2]
    assert caplog.text.count("request b: no more guesses") == 1


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
