"""A small model's guesses: its own likeliest tokens, whatever became of those before."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve_helpers import always_guess, finish, generate, oracle, request, running, stepped, submit
from transformers import LlamaForCausalLM

from quantkit.errors import UsageError
from quantkit.models.llama_family import build_decoder
from quantkit.models.runtime import Runtime
from quantkit.serve.counters import Counters
from quantkit.serve.draft_model import DraftModel
from quantkit.serve.lookup import PromptLookup
from quantkit.serve.request import Sequence
from quantkit.serve.speculation import Draft, SpeculativeConfig, Speculator

PAGE = 64


@pytest.fixture(scope="module")
def stranger(runtime: Runtime) -> Runtime:
    """Another random model: now and then it says the same."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(runtime.model.config).eval()
    return replace(runtime, model=model, decoder=build_decoder(model))


def text(tokens: list[int], name: str = "a") -> Sequence:
    return Sequence(request(name, tokens, max_tokens=99), lambda event: None)


def test_guesses_are_its_likeliest_tokens(runtime: Runtime, native: Runtime) -> None:
    model = DraftModel(native.decoder, 4 * PAGE)
    items = [text([5, 6, 7], "a"), text(list(range(9, 80)), "b"), text([8], "c")]
    guesses = model.guess(items, [4, 2, 0])
    assert guesses[0] == oracle(runtime, items[0].tokens, 4)
    assert guesses[1] == oracle(runtime, items[1].tokens, 2)
    assert guesses[2] == []
    for item in items:
        model.forget(item)
    assert model.used_pages == 0


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    prompt=st.lists(st.integers(2, 9), min_size=1, max_size=70),
    turns=st.lists(
        st.tuples(st.integers(1, 4), st.integers(0, 4), st.lists(st.integers(2, 9), max_size=2)),
        min_size=1,
        max_size=6,
    ),
)
def test_what_went_another_way_is_forgotten(
    native: Runtime, prompt: list[int], turns: list[tuple[int, int, list[int]]]
) -> None:
    """Some guesses are kept, then the text goes on by itself, perhaps with what was guessed later;
    each time it guesses as one that reads the whole text for the first time."""
    model = DraftModel(native.decoder, 4 * PAGE)
    item = text(prompt)
    for count, kept, more in turns:
        [guesses] = model.guess([item], [count])
        fresh = DraftModel(native.decoder, 4 * PAGE)
        assert [guesses] == fresh.guess([text(item.tokens)], [count])
        item.tokens += [*guesses[:kept], *more, 2 + kept]
        # What follows a wrong guess may be what was guessed to follow it.
        item.tokens += guesses[kept + 1 :]
        assert 0 < model.behind(item) <= len(item.tokens)


def test_long_texts_are_read_in_parts(native: Runtime) -> None:
    model = DraftModel(native.decoder, 4 * PAGE, read_tokens=50)
    item = text(list(range(10, 140)))
    assert model.behind(item) == 130
    assert [model.read(item) for _ in range(4)] == [50, 50, 29, 0]
    assert model.behind(item) == 1
    fresh = DraftModel(native.decoder, 4 * PAGE)
    assert model.guess([item], [3]) == fresh.guess([text(item.tokens)], [3])


def test_who_was_not_guessed_for_makes_room(native: Runtime) -> None:
    model = DraftModel(native.decoder, 2 * PAGE)
    old, new, long = text([5] * 40, "old"), text([6] * 40, "new"), text([7] * 100, "long")
    for item in (old, new):
        assert len(model.guess([item], [2])[0]) == 2
    assert len(model.guess([new], [2])[0]) == 2
    third = text([8] * 40, "third")
    assert len(model.guess([third], [2])[0]) == 2
    assert model.behind(old) == 40  # the one that had waited longest
    assert model.behind(new) == 1
    assert model.guess([new, long], [2, 2]) == [[], []]  # both together do not fit
    assert model.used_pages <= 2


def test_answers_are_the_same_bits_with_a_draft(
    native: Runtime, stranger: Runtime, monkeypatch
) -> None:
    always_guess(monkeypatch)
    options: list[dict[str, object]] = [
        {},
        {"temperature": 0.8, "seed": 3},
        {"frequency_penalty": 0.5},
        {"logprobs": 2, "echo": True},
        {"temperature": 1.0, "seed": 5, "stop": ("e",)},
    ]
    requests = [
        request(f"r{i}", [9 + (7 * i + j) % 200 for j in range(30 + 25 * i)], max_tokens=40, **more)
        for i, more in enumerate(options)
    ]
    with running(native) as engine:
        plain = generate(engine, *requests)
    shares = []
    for draft in (native, stranger):
        # Nothing so long is repeated, so that all guesses are the draft's.
        guesses = SpeculativeConfig(prompt_lookup_min=40, prompt_lookup_max=40)
        config = {"prefill_chunk": 48, "speculative_config": guesses}
        with running(native, draft=draft, **config) as engine:
            guessed = generate(engine, *requests)
            counters = engine.counters
            shares.append(counters.accepted_tokens / counters.draft_tokens)
        for mine, theirs in zip(guessed, plain, strict=True):
            assert mine.events[:-1] == theirs.events[:-1]
            assert mine.finished.reason == theirs.finished.reason
    assert shares[0] > shares[1] > 0
    with running(native, draft=native, speculative_config=guesses) as engine:
        assert generate(engine, requests[0])[0].tokens == plain[0].tokens
        counters = engine.counters
    assert counters.accepted_tokens == counters.draft_tokens > 20  # it guesses what it says itself


def test_a_draft_that_fails_costs_nobody_his_answer(native: Runtime, monkeypatch, caplog) -> None:
    def broken(*arguments: object) -> list[list[int]]:
        raise RuntimeError("no draft")

    always_guess(monkeypatch)
    item = request("a", [5, 6, 7], max_tokens=20, ignore_eos=True)
    with running(native) as engine:
        [alone] = generate(engine, item)
    engine = stepped(native, draft=native)
    monkeypatch.setattr(engine.speculator.model, "guess", broken)  # type: ignore[union-attr]
    outcome = submit(engine, item)
    finish(engine)
    assert outcome.events == alone.events
    assert caplog.text.count("the draft model failed") == 1


def test_a_small_draft_is_tried_and_one_as_large_as_the_model_is_not(native: Runtime) -> None:
    """Before anything is known of it but its size."""
    for share, tried in ((0.05, True), (1.0, False)):
        model = DraftModel(native.decoder, 8 * PAGE, share=share, clock=lambda: 0.0)
        speculator = Speculator(SpeculativeConfig(), Counters(), model, clock=lambda: 0.0)
        item = text(list(range(5, 45)))
        item.draft = Draft(PromptLookup(2, 4, 0))
        for _ in range(600):
            speculator.propose([item])
            speculator.observe(1, 1, 1.0)
            if model.used_pages:
                break
        assert (model.used_pages > 0) is tried


def test_both_caches_are_inside_the_budget(native: Runtime, monkeypatch) -> None:
    import psutil

    each = native.decoder.token_nbytes()  # type: ignore[union-attr]
    free = 2 * each * 2 * 300  # half of it is for keys and values
    memory = type("Memory", (), {"available": free})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert stepped(native).capacity.max_context == 512
    assert stepped(native, draft=native).capacity.max_context == 300
    engine = stepped(native, draft=native, kv_cache_dtype="int8")
    assert native.decoder is not None
    smaller = native.decoder.with_kv_dtype("int8").token_nbytes()
    assert engine.capacity.max_context == min(512, 300 * each // smaller)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"fingerprint": {"tokenizer": "0123"}}, "another tokenizer"),
        ({"decoder": None, "fallback": "it is odd"}, "the draft model: it is odd"),
    ],
)
def test_drafts_that_do_not_fit(native: Runtime, change: dict[str, object], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        stepped(native, draft=replace(native, **change))  # type: ignore[arg-type]


def test_a_draft_of_a_shorter_context_does_not_fit(native: Runtime, runtime: Runtime) -> None:
    """However far the tables of its decoder go."""
    config = copy.deepcopy(runtime.model.config)
    config.max_position_embeddings = 256
    model = LlamaForCausalLM(config).eval()
    draft = replace(runtime, model=model, decoder=build_decoder(model))
    with pytest.raises(UsageError, match="reads 256 tokens, the context holds 512; give --max-con"):
        stepped(native, draft=draft)
    assert stepped(native, draft=draft, max_context=256).capacity.max_context == 256


def test_a_draft_with_other_logits_does_not_fit(native: Runtime, runtime: Runtime) -> None:
    config = copy.deepcopy(runtime.model.config)
    config.vocab_size += 16
    model = LlamaForCausalLM(config).eval()
    with pytest.raises(UsageError, match="logits where"):
        stepped(native, draft=replace(runtime, model=model, decoder=build_decoder(model)))
