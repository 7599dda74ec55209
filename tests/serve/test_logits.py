"""Penalties, biases and bans against their formulas, token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_helpers import generate, oracle, request

from quantkit.models.runtime import Runtime
from quantkit.serve.engine import Engine
from quantkit.serve.logits import LogitsProcessor
from quantkit.serve.request import RequestError, SamplingParams

VOCAB = 30
ROW = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 3
END = {3, 9}


def slow_form(
    row: list[float], params: SamplingParams, prompt: list[int], answer: list[int]
) -> list[float]:
    out = []
    for token, value in enumerate(row):
        value += params.logit_bias.get(token, 0.0)
        if token in END and len(answer) < params.min_tokens:
            value = float("-inf")
        if token in prompt or token in answer:
            penalty = params.repetition_penalty
            value = value / penalty if value > 0 else value * penalty
        value -= params.frequency_penalty * answer.count(token)
        value -= params.presence_penalty * (token in answer)
        out.append(value)
    return out


tokens = st.lists(st.integers(0, VOCAB - 1), max_size=12)


@settings(deadline=None)
@given(
    prompt=tokens,
    answer=tokens,
    frequency=st.sampled_from([0.0, -2.0, 0.7, 2.0]),
    presence=st.sampled_from([0.0, -1.1, 2.0]),
    repetition=st.sampled_from([1.0, 0.5, 1.3]),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=4),
    min_tokens=st.integers(0, 14),
)
def test_formulas(
    prompt: list[int],
    answer: list[int],
    frequency: float,
    presence: float,
    repetition: float,
    bias: dict[int, float],
    min_tokens: int,
) -> None:
    params = SamplingParams(
        frequency_penalty=frequency,
        presence_penalty=presence,
        repetition_penalty=repetition,
        logit_bias=bias,
        min_tokens=min_tokens,
    )
    before = ROW.clone()
    process = LogitsProcessor(params, prompt, END, VOCAB)
    for i, token in enumerate([*answer, 0]):
        expected = slow_form(ROW.tolist(), params, prompt, answer[:i])
        assert process(ROW).tolist() == pytest.approx(expected, abs=1e-4)
        process.push(token)
    assert torch.equal(before, ROW)  # what reports log-probabilities is not touched


@pytest.mark.parametrize(
    ("params", "ends", "idle"),
    [
        ({}, END, [True, True]),
        ({"min_tokens": 1}, END, [False, True]),
        ({"min_tokens": 1}, {}, [True, True]),  # nothing to ban
        ({"logit_bias": {4: 1.0}}, END, [False, False]),
        ({"presence_penalty": 1.0}, END, [False, False]),
        ({"repetition_penalty": 2.0}, END, [False, False]),
    ],
)
def test_nothing_asked_for_costs_nothing(params: dict, ends: set[int], idle: list[bool]) -> None:
    process = LogitsProcessor(SamplingParams(**params), [1, 2], ends, VOCAB)
    for expected in idle:
        assert process.idle == expected
        assert (process(ROW) is ROW) == expected
        process.push(5)


def test_a_token_is_forced_and_forbidden(engine: Engine, runtime: Runtime) -> None:
    ids = runtime.tokenizer.encode("The quick")
    free = oracle(runtime, ids, 1)[0]
    [forced] = generate(engine, request("a", ids, max_tokens=5, logit_bias={42: 100}))
    assert forced.tokens == [42] * 5
    [other] = generate(engine, request("b", ids, max_tokens=1, logit_bias={free: -100}))
    assert other.tokens != [free]


def test_min_tokens_and_stop_token_ids(engine: Engine) -> None:
    """A token that the model is made to choose ends the answer, but not before its time."""
    force = {"logit_bias": {42: 100}, "stop_token_ids": (42,), "max_tokens": 20, "ignore_eos": True}
    [at_once] = generate(engine, request("a", [5, 6], **force))
    assert (at_once.tokens, at_once.finished.reason) == ([42], "stop")
    [later] = generate(engine, request("b", [5, 6], min_tokens=7, **force))
    assert (len(later.tokens), later.tokens[-1], later.finished.reason) == (8, 42, "stop")
    assert 42 not in later.tokens[:-1]


def test_stop_strings_wait_for_min_tokens(engine: Engine, runtime: Runtime) -> None:
    letter = runtime.tokenizer.encode("x")[0]
    options = {"logit_bias": {letter: 100}, "stop": ("x",), "max_tokens": 20}
    [outcome] = generate(engine, request("a", [5, 6], min_tokens=4, **options))
    assert (outcome.text, outcome.finished.reason) == ("xxxx", "stop")


def test_ignore_eos(engine: Engine, runtime: Runtime) -> None:
    eos = runtime.tokenizer.eos_token_id
    force = {"logit_bias": {eos: 100}, "max_tokens": 6}
    [ends] = generate(engine, request("a", [5], **force))
    assert (ends.tokens, ends.finished.reason) == ([eos], "stop")
    [goes_on] = generate(engine, request("b", [5], ignore_eos=True, **force))
    assert (goes_on.tokens, goes_on.finished.reason) == ([eos] * 6, "length")


def test_repetition_is_penalized_as_in_transformers(engine: Engine, runtime: Runtime) -> None:
    ids = runtime.tokenizer.encode("how are you today? how are you")
    prompt = torch.tensor([ids])
    expected = runtime.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=30,
        do_sample=False,
        repetition_penalty=1.5,
        pad_token_id=0,
    )[0, len(ids) :].tolist()
    [outcome] = generate(engine, request("a", ids, max_tokens=30, repetition_penalty=1.5))
    assert outcome.tokens == expected


def test_log_probabilities_are_the_models_own(engine: Engine) -> None:
    [free] = generate(engine, request("a", [5, 6], max_tokens=1, logprobs=3))
    [biased] = generate(
        engine, request("b", [5, 6], max_tokens=1, logprobs=3, logit_bias={42: 100})
    )
    [one], [two] = ([e.logprob for e in o.events if hasattr(e, "logprob")] for o in (free, biased))
    assert one.top == two.top
    assert two.token_id == 42


def test_ids_outside_the_vocabulary(engine: Engine) -> None:
    for field, value in (("logit_bias", {10**6: 1.0}), ("stop_token_ids", (-1,))):
        with pytest.raises(RequestError, match="token ids must lie between 0 and") as caught:
            engine.check(request("a", [5], **{field: value}))
        assert caught.value.param == field
