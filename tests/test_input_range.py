"""The range of a static activation scale: what candidates cost, and that the least one is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import numerics
from quantkit.errors import UsageError
from quantkit.input_range import InputRange, choose_range, output_errors, sample_tokens
from quantkit.observers import OBSERVERS, Candidates, make_observer
from quantkit.schemes import SCHEMES, QuantSpec

N, K = 12, 32
SPECS = {name: SCHEMES[name].input for name in ("w8a8-static", "fp8-static")}
EVERY_SPEC = pytest.mark.parametrize("scheme", SPECS)


def spec_of(scheme: str) -> QuantSpec:
    spec = SPECS[scheme]
    assert spec is not None
    return spec


def inputs(seed: int = 0, outlier: float = 300.0, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    """Two batches of normal values; one token of the first holds a huge one."""
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(n, K, generator=generator) for n in (90, 70)]
    batches[0][0, 5] = outlier
    return [x.to(dtype) for x in batches]


def weights(seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, K, generator=generator).bfloat16() for n in (N, N // 2)]


def observed(batches: list[torch.Tensor], name: str = "auto", **options: Any) -> Candidates:
    candidates = Candidates.of(name, options)
    for x in batches:
        candidates.update(x)
    return candidates


@EVERY_SPEC
def test_error_of_a_scale_against_its_definition(scheme: str) -> None:
    spec, batches, layers = spec_of(scheme), inputs(), weights()
    batches[1][7, 3] = -100.0
    sample = sample_tokens(batches, spread=10_000)  # every token
    scales = [torch.tensor([s], dtype=torch.bfloat16) for s in (0.001, 0.03, 2.5)]
    slow = []
    for scale in scales:
        errors: dict[bool, list[float]] = {True: [], False: []}
        for x in torch.cat(batches):
            q = numerics.fake_quantize_input(x, spec, scale)
            wrong = [((q.float() - x.float()) @ w.float().t()).square().sum() for w in layers]
            right = [(x.float() @ w.float().t()).square().sum() for w in layers]
            error = min(1.0, float(sum(wrong)) / float(sum(right)))
            errors[float(x.abs().max()) >= 75].append(error)
        assert [len(errors[key]) for key in (True, False)] == [2, 158]
        slow.append(max(sum(found) / len(found) for found in errors.values()))
    assert output_errors(scales, sample, layers, spec) == pytest.approx(slow, rel=1e-4)
    assert len(set(slow)) == len(slow)


@EVERY_SPEC
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), outlier=st.floats(0.1, 1e4))
def test_the_choice_is_never_worse_than_a_candidate_alone(
    scheme: str, seed: int, outlier: float
) -> None:
    spec, batches, layers = spec_of(scheme), inputs(seed, outlier), weights(seed)
    sample = sample_tokens(batches)
    ranges = observed(batches).ranges(spec)
    chosen = choose_range(ranges, sample, layers, spec)
    assert chosen.errors.keys() == ranges.keys()
    [error] = output_errors([chosen.scale(spec, torch.bfloat16)], sample, layers, spec)
    for label, (low, high) in ranges.items():
        alone = InputRange(label, float(low), float(high)).scale(spec, torch.bfloat16)
        assert error <= output_errors([alone], sample, layers, spec)[0], label


def test_neither_a_huge_token_nor_the_others_are_given_up() -> None:
    """A range is not good for being good to most tokens."""
    spec, batches = spec_of("w8a8-static"), inputs(outlier=3000.0)
    given = ["minmax", {"percentile": {"p": 99.9}}]
    ranges = observed(batches, candidates=given).ranges(spec)
    assert float(ranges["minmax()"][1]) == pytest.approx(3000, rel=0.01)
    assert float(ranges["percentile(p=99.9)"][1]) < 10  # 159 of 160 tokens would gain by it
    chosen = choose_range(ranges, sample_tokens(batches), weights(), spec)
    assert min(chosen.errors.values()) > 0.5


def test_a_distribution_with_a_tail_is_cut() -> None:
    """Where many tokens reach far, one that reaches further may saturate."""
    spec, batches = spec_of("w8a8-static"), inputs(outlier=15.0)
    ranges = observed(batches).ranges(spec)
    chosen = choose_range(ranges, sample_tokens(batches), weights(), spec)
    assert len({round(error, 12) for error in chosen.errors.values()}) > 3
    assert chosen.errors[chosen.observer] < 0.5 * max(chosen.errors.values())


def test_errors_are_those_of_the_layers_outputs() -> None:
    """A column that no layer reads may saturate; one that matters may not."""
    spec, batches = spec_of("w8a8-static"), inputs(outlier=1.0)
    batches[0][:, 5] = 40.0
    deaf, hearing = torch.ones(N, K).bfloat16(), torch.ones(N, K).bfloat16()
    deaf[:, 5] = 0
    ranges = observed(batches, candidates=["minmax", {"percentile": {"p": 97}}]).ranges(spec)
    sample = sample_tokens(batches)
    assert choose_range(ranges, sample, [deaf], spec).observer == "percentile(p=97.0)"
    assert choose_range(ranges, sample, [hearing], spec).observer == "minmax()"


def test_candidates_see_what_they_would_see_alone() -> None:
    """Though those with histograms share one."""
    batches, spec = inputs(), spec_of("w8a8-static")
    given = ["minmax", "moving_average", {"percentile": {"p": 99}}, {"percentile": {"p": 90}}]
    together = observed(batches, candidates=[*given, "mse", "entropy"]).ranges(spec)
    alone = [make_observer("percentile", {"p": p}) for p in (99, 90)]
    alone += [make_observer(name) for name in OBSERVERS if name != "percentile"]
    assert together.keys() == {repr(observer) for observer in alone}
    for observer in alone:
        for x in batches:
            observer.update(x)
        assert together[repr(observer)] == observer.range(spec), repr(observer)


def test_a_recipe_that_names_one_observer_has_one_candidate() -> None:
    [(label, (low, high))] = observed(inputs(), "minmax").ranges(spec_of("fp8-static")).items()
    assert (label, float(high)) == ("minmax()", 300.0)
    assert float(low) < 0


def test_a_sample_tells_the_largest_tokens_from_the_others() -> None:
    x = torch.arange(1.0, 101.0)[:, None].expand(100, 2).contiguous()
    batches = [x[:30].flip(0), x[30:]]
    sample = sample_tokens(batches, largest=4, spread=12)
    assert sample.largest[:, 0].tolist() == [100, 99, 98, 97]
    others = sample.others[:, 0].tolist()
    assert len(set(others)) == 12
    assert max(others) < 25  # a quarter of the largest
    few = sample_tokens([x[:1]])
    assert (len(few.largest), len(few.others)) == (1, 0)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("auto", {"candidate": []}, "unknown option 'candidate'; known: candidates"),
        ("auto", {"candidates": "minmax"}, "'minmax' is not a list of observers"),
        ("auto", {"candidates": []}, "one or more are needed"),
        ("auto", {"candidates": ["mse", "mse"]}, "no two alike"),
        ("auto", {"candidates": ["maxmin"]}, "unknown observer 'maxmin'"),
        ("auto", {"candidates": ["auto"]}, "unknown observer 'auto'"),
        ("auto", {"candidates": [{"percentile": 3}]}, "neither a name nor"),
        ("auto", {"candidates": [{"percentile": {"p": 3}}]}, "p 3.0 is not in"),
        ("minmax", {"candidates": ["mse"]}, "unknown option 'candidates'"),
    ],
)
def test_bad_candidates_are_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Candidates.of(name, options)
