"""Filters against slow oracles, and independence from everything but the request."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import QuantkitError
from quantkit.models.pass_logits import PassLogits
from quantkit.serve import sampler
from quantkit.serve.request import RequestError, SamplingParams

ROW = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 3


def slow_distribution(logits: list[float], params: SamplingParams) -> list[float]:
    """The same filters, token by token in float64."""
    scaled = torch.tensor(logits, dtype=torch.float64) / params.temperature
    if params.top_k:
        kept = sorted(range(len(logits)), key=lambda i: -scaled[i])[: params.top_k]
        scaled = torch.tensor(
            [float(scaled[i]) if i in kept else float("-inf") for i in range(len(logits))],
            dtype=torch.float64,
        )
    probabilities = scaled.softmax(-1).tolist()
    order = sorted(range(len(logits)), key=lambda i: -probabilities[i])
    mass, kept = 0.0, []
    for i in order:
        if mass < params.top_p:
            kept.append(i)
        mass += probabilities[i]
    best = probabilities[order[0]]
    kept = [i for i in kept if probabilities[i] >= params.min_p * best]
    total = sum(probabilities[i] for i in kept)
    return [probabilities[i] / total if i in kept else 0.0 for i in range(len(logits))]


@given(
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, 60),
    top_p=st.sampled_from([0.1, 0.37, 0.61, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.21, 1.0]),
)
def test_filters_equal_the_slow_form(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = sampler.distribution(ROW, params)
    assert got.tolist() == pytest.approx(slow_distribution(ROW.tolist(), params), abs=1e-5)


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-9}])
def test_greedy(params: dict[str, float]) -> None:
    generator = sampler.make_generator(None)
    token = sampler.sample(ROW, SamplingParams(**params), generator)  # type: ignore[arg-type]
    assert token == int(ROW.argmax())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_of_several_sequences(dtype: torch.dtype) -> None:
    """As each would be by itself; one that is broken is nobody else's fault."""
    generator = torch.Generator().manual_seed(2)
    blocks = [torch.randn(n, 50, generator=generator).to(dtype) for n in (1, 3, 2)]
    blocks[2][0, 7] = torch.nan
    found = sampler.likeliest([*blocks, RuntimeError("lost")], [1, 3, 2, 1])
    assert [len(rows) for rows in found] == [1, 3, 2, 0]
    for rows, block in zip(found[:2], blocks[:2], strict=True):
        assert [row.token() for row in rows] == block.argmax(-1).tolist()
    with pytest.raises(sampler.NotFiniteError):
        found[2][0].token()
    assert found[2][1].token() == int(blocks[2][1].argmax())


@pytest.mark.parametrize("counts", [[1, 3, 2], [1, 1, 0], [0, 2, 1], [0, 0, 0]])
def test_the_likeliest_of_a_pass(counts: list[int]) -> None:
    """What lies together is searched at once, and found as what lies apart."""
    results = PassLogits(torch.randn(6, 50), [1, 3, 2])
    assert sampler.likeliest(results, counts) == sampler.likeliest(list(results), counts)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_infinite_is_chosen(value: float) -> None:
    row = ROW.clone()
    row[9] = value
    for broken in (row, torch.full((5,), -torch.inf)):
        with pytest.raises(sampler.NotFiniteError):
            sampler.sample(broken, SamplingParams(temperature=0), sampler.make_generator(0))


def test_frequencies_follow_the_distribution() -> None:
    params, generator = SamplingParams(temperature=1.0, top_k=5), sampler.make_generator(3)
    draws = torch.tensor([sampler.sample(ROW, params, generator) for _ in range(4000)])
    frequency = draws.bincount(minlength=50) / 4000
    assert (frequency - sampler.distribution(ROW, params)).abs().max() < 0.04


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_the_ends_of_the_distribution_are_tokens(monkeypatch, uniform: float) -> None:
    """Neither the first nor the last token is possible, and neither is ever chosen."""
    row = torch.full((1000,), -torch.inf)
    row[100:900] = torch.linspace(-3, 3, 800)
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.tensor(uniform))
    token = sampler.sample(row, SamplingParams(), sampler.make_generator(0))
    assert {0.0: token == 100, 0.5: 100 < token < 899, 1 - 2**-53: token == 899}[uniform]


@pytest.mark.parametrize("top_p", [0.001, 0.3, 0.999, 0.9999999])
def test_top_p_of_many_tokens(top_p: float) -> None:
    """More tokens than are looked at first, a few of them alike."""
    row = torch.linspace(0, 2, 900).repeat_interleave(2)
    found = sampler.distribution(row, SamplingParams(top_p=top_p))
    kept = (found > 0).nonzero().flatten()
    assert kept.tolist() == list(range(1800 - len(kept), 1800))  # the likeliest
    assert len(kept) % 2 == 0  # and with each its twin
    own = row.softmax(-1)
    assert own[kept].sum() >= top_p - 1e-5
    assert own[kept[2:]].sum() < top_p


def test_negative_and_large_seeds() -> None:
    for seed in (-1, -(2**63) + 1, 2**63 - 1):
        params = SamplingParams(seed=seed)
        draws = {
            tuple(sampler.sample(ROW, params, generator) for _ in range(5))
            for generator in (sampler.make_generator(seed), sampler.make_generator(seed))
        }
        assert len(draws) == 1


def test_scores_are_log_softmax() -> None:
    rows = torch.stack([ROW, -ROW])
    entries = sampler.score(rows, [3, 4], top=2)
    expected = rows.log_softmax(-1)
    for i, (entry, token) in enumerate(zip(entries, (3, 4), strict=True)):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(expected[i, token].item())
        assert [token for token, _ in entry.top] == expected[i].topk(2).indices.tolist()
    assert sampler.score(rows, [3, 4], top=0)[0].top == ()
    assert sampler.score(rows[:0], [], top=2) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(value: float, temperature: float) -> None:
    row = ROW.clone()
    row[7] = value
    with pytest.raises(QuantkitError, match="not finite"):
        sampler.sample(row, SamplingParams(temperature=temperature), sampler.make_generator(0))
    with pytest.raises(QuantkitError, match="not finite"):
        sampler.score(row[None], [3], top=1)


def test_a_token_that_is_ruled_out_has_a_finite_logprob() -> None:
    row = ROW.clone()
    row[7] = -torch.inf
    assert sampler.score(row[None], [7], top=0)[0].logprob == sampler.HOPELESS
    assert sampler.distribution(row, SamplingParams())[7] == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("min_p", 1.5),
        ("max_tokens", -1),
        ("stop", ("",)),
        ("stop", ("x" * 257,)),
        ("stop", ("x",) * 17),
        ("seed", 2**63),
        ("logprobs", 21),
        ("frequency_penalty", 2.1),
        ("presence_penalty", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", dict.fromkeys(range(1025), 0.0)),
        ("min_tokens", -1),
        ("min_tokens", 17),  # more than max_tokens
        ("stop_token_ids", (1,) * 129),
    ],
)
def test_parameters_out_of_range(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field
