"""Everything at once: random arrivals, chunks, preemption, shared beginnings and guesses. Each
prompt gets the tokens that it gets alone."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from serve_helpers import Outcome, Scattered, always_guess, finish, request, stepped, submit

from quantkit.models.runtime import Runtime
from quantkit.serve.counters import Counters
from quantkit.serve.engine import Engine
from quantkit.serve.request import Request
from quantkit.serve.speculation import SpeculativeConfig


def prompts(count: int, words: list[int], shared: int, dice: random.Random) -> Iterator[Request]:
    """Greedy requests, of which most begin like others and some repeat themselves."""
    beginnings = [[dice.choice(words) for _ in range(shared)] for _ in range(4)]
    for i in range(count):
        beginning = dice.choice([*beginnings, []])[: dice.choice([shared, shared, shared // 2])]
        phrase = [dice.choice(words) for _ in range(dice.randint(1, 12))]
        ids = beginning + phrase * dice.randint(1, 4)
        yield request(f"r{i}", ids, max_tokens=dice.randint(1, 32), ignore_eos=True)


def alone(engine: Engine, item: Request) -> list[int]:
    outcome = submit(engine, item)
    finish(engine)
    return outcome.tokens


def together(engine: Engine, items: list[Request], dice: random.Random) -> list[list[int]]:
    outcomes: list[Outcome] = []
    while len(outcomes) < len(items):
        for _ in range(dice.randint(0, 3)):
            if len(outcomes) < len(items):
                outcomes.append(submit(engine, items[len(outcomes)]))
        engine._take_orders() if engine.live else None
        engine.step()
    finish(engine)
    return [outcome.tokens for outcome in outcomes]


def check(runtime: Runtime, draft: Runtime, count: int, words: list[int], seed: int) -> Counters:
    """Compare, and return what the busy engine counted."""
    dice = random.Random(seed)
    items = list(prompts(count, words, 150, dice))
    lonely = stepped(runtime, enable_prefix_caching=False)
    expected = [alone(lonely, item) for item in items]
    busy = stepped(
        runtime,
        Scattered(seed),
        draft,
        max_sequences=8,
        max_context=256,
        kv_cache_tokens=64 * 11,
        prefill_chunk=72,
        speculative_config=SpeculativeConfig(prompt_lookup_min=1),
    )
    assert together(busy, items, dice) == expected
    counters = busy.counters
    assert counters.preemptions > 0
    assert counters.prefix_hits > 0
    return counters


def test_a_tiny_model_says_the_same_under_load(native: Runtime, monkeypatch) -> None:
    always_guess(monkeypatch)
    counters = check(native, native, 24, list(range(5, 300)), seed=1)
    assert 0 < counters.accepted_tokens < counters.draft_tokens


@pytest.mark.slow
@pytest.mark.parametrize("always", [True, False])
def test_two_hundred_prompts_get_the_tokens_that_they_get_alone(
    native: Runtime, monkeypatch, always: bool
) -> None:
    """Guessing always, and where it pays: what is guessed then depends on the clock."""
    if always:
        always_guess(monkeypatch)
    counters = check(native, native, 200, list(range(5, 300)), seed=2)
    assert not always or 0 < counters.accepted_tokens < counters.draft_tokens
