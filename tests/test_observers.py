"""Observers: the merge property, their ranges against slow forms, and the Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import numerics
from quantkit.errors import QuantkitError, UsageError
from quantkit.observers import (
    OBSERVER_OPTIONS,
    OBSERVERS,
    ChannelMagnitudes,
    HessianAccumulator,
    MinMax,
    make_observer,
)
from quantkit.observers.histogram import SIDE_BITS, Histogram
from quantkit.schemes import SCHEMES, QuantSpec, parse_scheme

INT8 = parse_scheme({"weight": {"bits": 8, "granularity": "tensor"}}).weight
FP8 = parse_scheme({"weight": {"bits": 8, "dtype": "float", "granularity": "tensor"}}).weight
SPECS = {"int8": INT8, "fp8": FP8}
ASYMMETRIC = parse_scheme({"weight": {"bits": 8, "symmetric": False}}).weight

EVERY = pytest.mark.parametrize("name", OBSERVERS)
FAST = settings(max_examples=40, deadline=None)

#: Any finite fp32 value, subnormal and huge ones too.
values = st.floats(width=32, allow_nan=False, allow_infinity=False)
batches = st.lists(st.lists(values, min_size=1, max_size=12).map(torch.tensor), max_size=4)


def test_specs_are_those_of_the_static_schemes() -> None:
    assert (SCHEMES["w8a8-static"].input, SCHEMES["fp8-static"].input) == (INT8, FP8)


def observed(name: str, parts: list[torch.Tensor]) -> MinMax:
    observer = make_observer(name)
    for part in parts:
        observer.update(part)
    return observer


def assert_equal(a: MinMax, b: MinMax) -> None:
    ours, theirs = a.state(), b.state()
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-12, atol=0, msg=key)


def numbers(n: int, seed: int = 0, outliers: float = 0.0) -> torch.Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    if outliers:
        x[:: n // 4] *= outliers
    return x


@EVERY
@FAST
@given(a=batches, b=batches)
def test_merging_is_observing_both(name: str, a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert_equal(observed(name, a).merge(observed(name, b)), observed(name, a + b))


@EVERY
@FAST
@given(a=batches, b=batches, c=batches)
def test_merging_is_associative_with_an_identity(
    name: str, a: list[torch.Tensor], b: list[torch.Tensor], c: list[torch.Tensor]
) -> None:
    x, y, z = (observed(name, part) for part in (a, b, c))
    assert_equal(x.merge(y).merge(z), x.merge(y.merge(z)))
    assert_equal(make_observer(name).merge(x), x)
    assert_equal(x.merge(make_observer(name)), x)


@pytest.mark.parametrize("name", [n for n in OBSERVERS if n != "moving_average"])
@FAST
@given(parts=batches)
def test_all_but_the_moving_average_ignore_order_and_batches(
    name: str, parts: list[torch.Tensor]
) -> None:
    whole = observed(name, [torch.cat(parts)] if parts else [])
    assert_equal(observed(name, parts), whole)
    assert_equal(observed(name, parts[::-1]), whole)


@EVERY
def test_merging_leaves_its_arguments_alone(name: str) -> None:
    a, b = observed(name, [numbers(50)]), observed(name, [numbers(50, seed=1) * 100])
    merged = a.merge(b)
    a.update(torch.tensor([1e6]))
    assert_equal(b, observed(name, [numbers(50, seed=1) * 100]))
    assert_equal(merged, observed(name, [numbers(50), numbers(50, seed=1) * 100]))


@EVERY
def test_state_round_trip(name: str) -> None:
    options = {key: {"p": 90.0, "decay": 0.5}[key] for key in OBSERVER_OPTIONS[name]}
    observer = make_observer(name, options)
    observer.update(numbers(1000))
    again = type(observer).from_state(observer.state(), **options)
    assert_equal(again, observer)
    again.update(numbers(10) * 1e3)
    assert again.range(INT8)[1] >= observer.range(INT8)[1]


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_shapes_and_dtypes(name: str, dtype: torch.dtype) -> None:
    x = numbers(240).bfloat16().half()  # the same values in every dtype
    observer = make_observer(name)
    observer.update(x.to(dtype).reshape(2, 10, 12).transpose(0, 1))
    observer.update(torch.empty(0, 12))
    assert_equal(observer, observed(name, [x.float()]))


@EVERY
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_ranges_are_fp32_scalars_within_the_data(name: str, spec: QuantSpec) -> None:
    low, high = observed(name, [numbers(5000, outliers=30)]).range(spec)
    assert (low.dtype, high.dtype, low.dim(), high.dim()) == (torch.float32, torch.float32, 0, 0)
    assert numbers(5000, outliers=30).min() <= low < 0 < high <= numbers(5000, outliers=30).max()


@EVERY
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 1e-30, 6e4])
def test_constant_data(name: str, spec: QuantSpec, value: float) -> None:
    low, high = observed(name, [torch.full((10,), value)]).range(spec)
    absmax = max(float(-low), float(high))
    assert absmax <= max(abs(value), 1e-38) * (1 + 1e-6)
    assert absmax >= abs(value) * 0.9


@EVERY
def test_nothing_observed_is_an_error(name: str) -> None:
    with pytest.raises(QuantkitError, match="no values were observed; did every calibration"):
        make_observer(name).range(INT8)


@EVERY
def test_nan_and_infinity_are_counted(name: str) -> None:
    x = numbers(12).reshape(3, 4)
    x[0, 0], x[1, 1], x[2, 2] = math.nan, math.inf, -math.inf
    observer = make_observer(name)
    with pytest.raises(QuantkitError) as caught:
        observer.update(x)
    assert str(caught.value).startswith("activations (3, 4) hold 1 NaN and 2 infinite values;")
    assert_equal(observer, make_observer(name))  # nothing of it was kept


def test_minmax() -> None:
    low, high = observed("minmax", [numbers(100), torch.tensor([-9.0, 7.0])]).range(INT8)
    assert (float(low), float(high)) == (-9.0, 7.0)


def test_moving_average_weights_batches_by_age() -> None:
    parts = [torch.tensor([-float(i), 10.0 * i]) for i in (1, 2, 3)]
    observer = make_observer("moving_average", {"decay": 0.5})
    for part in parts:
        observer.update(part)
    low, high = observer.range(INT8)
    expected = (0.25 * 1 + 0.5 * 2 + 1 * 3) / 1.75
    assert float(low) == pytest.approx(-expected)
    assert float(high) == pytest.approx(10 * expected)
    backwards = make_observer("moving_average", {"decay": 0.5})
    for part in reversed(parts):
        backwards.update(part)
    assert backwards.range(INT8)[1] < high


@pytest.mark.parametrize("p", [60.0, 99.0, 99.9, 100.0])
@FAST
@given(seed=st.integers(0, 1000), outliers=st.sampled_from([1.0, 30.0]))
def test_percentile_is_the_order_statistic_within_a_bin(
    p: float, seed: int, outliers: float
) -> None:
    x = numbers(2000, seed, outliers)
    observer = make_observer("percentile", {"p": p})
    observer.update(x)
    assert isinstance(observer, Histogram)
    keep = 2000 - math.floor(2000 * (100 - p) / 100)
    exact = float(x.abs().kthvalue(keep).values)
    low, high = (float(v) for v in observer.range(INT8))
    assert exact <= max(-low, high) + 1e-6 * exact
    assert max(-low, high) <= exact + observer.width
    assert ((x >= low) & (x <= high)).sum() >= keep
    drop = math.floor(2000 * (100 - p) / 200)
    low, high = (float(v) for v in observer.range(ASYMMETRIC))
    sorted_x = x.sort().values
    assert float(sorted_x[drop]) == pytest.approx(low, abs=observer.width)
    assert float(sorted_x[-1 - drop]) == pytest.approx(high, abs=observer.width)


def quantization_error(x: torch.Tensor, low: float, high: float, spec: QuantSpec) -> float:
    scale, zero = numerics.compute_scales(torch.tensor(low), torch.tensor(high), spec)
    offset = torch.tensor(0.0) if zero is None else zero.float()
    codes = numerics.round_to_codes(x / scale + offset, spec)
    return float(((codes - offset) * scale - x).double().square().mean())


@pytest.mark.parametrize("spec", [*SPECS.values(), ASYMMETRIC], ids=[*SPECS, "asymmetric"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: numbers(20000),
        lambda: numbers(20000, outliers=40),
        lambda: numbers(20000).abs(),
        lambda: numbers(20000).abs() + 5,
        lambda: -numbers(20000).exp(),
    ],
    ids=["normal", "outliers", "positive", "far from zero", "lognormal"],
)
def test_mse_is_about_as_good_as_a_search_on_the_values(
    make: Callable[[], torch.Tensor], spec: QuantSpec
) -> None:
    x = make()
    low, high = (float(v) for v in observed("mse", [x]).range(spec))
    absmax = float(x.abs().max())
    floor, ceiling = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    best = min(
        quantization_error(x, max(floor, -absmax * r), min(ceiling, absmax * r), spec)
        for r in torch.linspace(0.02, 1, 99).tolist()
    )
    error = quantization_error(x, low, high, spec)
    assert error <= best * 1.02
    assert error <= quantization_error(x, float(x.min()), float(x.max()), spec) * 1.001


def slow_divergence(counts: list[int], bins: int, spec: QuantSpec, width: float) -> float:
    """`Entropy._divergence`, bin by bin."""
    scale = float(
        numerics.compute_scales(torch.tensor(-bins * width), torch.tensor(bins * width), spec)[0]
    )
    p = [float(c) for c in counts[:bins]]
    p[-1] += sum(counts[bins:])
    by_code: dict[float, list[int]] = {}
    for i in range(bins):
        code = numerics.round_to_codes(torch.tensor((i + 0.5) * width) / scale, spec)
        by_code.setdefault(float(code), []).append(i)
    q = [0.0] * bins
    for members in by_code.values():
        filled = [i for i in members if counts[i]]
        for i in filled:
            q[i] = sum(counts[j] for j in filled) / len(filled)
    p_sum, q_sum = sum(p), sum(q)
    return sum(
        pi / p_sum * math.log(pi / p_sum / max(qi / q_sum, 1e-7))
        for pi, qi in zip(p, q, strict=True)
        if pi
    )


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("bins", [128, 300, 2500])
def test_entropy_equals_its_slow_form(spec: QuantSpec, bins: int) -> None:
    observer = observed("entropy", [numbers(5000, outliers=3)])
    counts = observer._magnitudes()  # type: ignore[attr-defined]
    fast = observer._divergence(counts.double(), bins, spec)  # type: ignore[attr-defined]
    slow = slow_divergence(counts.tolist(), bins, spec, observer.width)  # type: ignore[attr-defined]
    assert fast == pytest.approx(slow, rel=1e-9)


def test_entropy_clips_outliers_and_keeps_the_bulk() -> None:
    x = numbers(50000, outliers=100)
    high = float(observed("entropy", [x]).range(INT8)[1])
    assert float(x.abs().quantile(0.995)) < high < float(x.max()) / 5


def test_entropy_refuses_an_asymmetric_range() -> None:
    with pytest.raises(UsageError) as caught:
        observed("entropy", [numbers(10)]).range(ASYMMETRIC)
    assert str(caught.value) == (
        "entropy: int8 asym channel is asymmetric, and the method needs a symmetric range; "
        "use mse or percentile"
    )


def test_histograms_count_every_value_where_it_is() -> None:
    x = numbers(3000, outliers=1000)
    observer = observed("mse", list(x.split(7)))
    assert isinstance(observer, Histogram)
    index = torch.floor(x.double() / observer.width).long() + 2**SIDE_BITS
    assert torch.equal(observer.counts, torch.bincount(index, minlength=2 * 2**SIDE_BITS))
    assert 2.0 ** (observer.exponent - 1) <= float(x.abs().max()) < 2.0**observer.exponent


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "minmix",
            {},
            "unknown observer 'minmix'; known: minmax, moving_average, percentile, mse, entropy",
        ),
        ("minmax", {"p": 1}, "minmax: unknown option 'p'; known: none"),
        ("percentile", {"q": 1}, "percentile: unknown option 'q'; known: p"),
        ("percentile", {"p": 50}, "percentile: p 50.0 is not in (50, 100]"),
        ("percentile", {"p": math.nan}, "percentile: p nan is not in (50, 100]"),
        ("percentile", {"p": "high"}, "percentile: p 'high' is not a number"),
        ("moving_average", {"decay": 1}, "moving_average: decay 1.0 is not in [0, 1)"),
        ("moving_average", {"decay": True}, "moving_average: decay True is not a number"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_observer(name, options)
    assert str(caught.value) == message


def test_observers_that_differ_do_not_merge() -> None:
    with pytest.raises(QuantkitError) as caught:
        make_observer("percentile").merge(make_observer("percentile", {"p": 99}))
    assert str(caught.value) == (
        "cannot merge percentile(p=99.99) with percentile(p=99.0): they differ in kind"
    )
    with pytest.raises(QuantkitError):
        make_observer("minmax").merge(make_observer("mse"))


@pytest.mark.parametrize("columns", [1, 7, 192, 200, 500])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hessian_is_the_mean_of_outer_products(columns: int, dtype: torch.dtype) -> None:
    x = numbers(300 * columns).reshape(3, 100, columns).to(dtype)
    hessian = HessianAccumulator(columns)
    hessian.update(x[:2])
    hessian.update(x[2])
    flat = x.double().reshape(-1, columns)
    value = hessian.value()
    assert value.dtype == torch.float32
    assert torch.equal(value, value.T)
    torch.testing.assert_close(value.double(), flat.T @ flat / 300, rtol=1e-5, atol=1e-5)
    assert hessian.count == 300


def test_hessian_chunks_long_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = numbers(1000 * 5).reshape(1000, 5)
    whole, chunked = HessianAccumulator(5), HessianAccumulator(5)
    whole.update(x)
    monkeypatch.setattr(HessianAccumulator, "TOKENS", 64)
    monkeypatch.setattr(HessianAccumulator, "COLUMNS", 2)
    chunked.update(x)
    torch.testing.assert_close(whole.value(), chunked.value())


@FAST
@given(cut=st.integers(0, 60))
def test_hessian_merges_and_round_trips(cut: int) -> None:
    x = numbers(60 * 9).reshape(60, 9)
    whole, a, b = (HessianAccumulator(9) for _ in range(3))
    whole.update(x)
    a.update(x[:cut])
    b.update(x[cut:])
    merged = HessianAccumulator.from_state(a.merge(b).state())
    assert merged.count == whole.count
    torch.testing.assert_close(merged.value(), whole.value(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_hessian_finds_bad_inputs_on_its_diagonal(bad: float) -> None:
    hessian = HessianAccumulator(300)
    x = numbers(20 * 300).reshape(20, 300)
    x[3, 250] = bad
    hessian.update(x)
    hessian.update(numbers(20 * 300).reshape(20, 300))
    with pytest.raises(QuantkitError, match="NaN or infinite values in 1 of 300 columns; run the"):
        hessian.value()


def test_hessian_refuses_what_does_not_fit() -> None:
    with pytest.raises(QuantkitError, match="no tokens were observed"):
        HessianAccumulator(4).value()
    with pytest.raises(QuantkitError, match="inputs have 5 columns, the layer 4"):
        HessianAccumulator(4).update(torch.zeros(2, 5))
    with pytest.raises(QuantkitError, match="cannot merge 4 columns with 5"):
        HessianAccumulator(4).merge(HessianAccumulator(5))


@FAST
@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 2**31 - 1))
def test_channel_magnitudes_merge(first: int, second: int, seed: int) -> None:
    x = torch.randn(first + second + 1, 7, generator=torch.Generator().manual_seed(seed))
    whole, left, right = (ChannelMagnitudes(7) for _ in range(3))
    whole.update(x)
    left.update(x[:first])
    right.update(x[first:])
    merged = left.merge(ChannelMagnitudes.from_state(right.state()))
    assert merged.count == len(x)
    assert torch.equal(merged.maxima(), x.abs().amax(0))
    torch.testing.assert_close(merged.means(), whole.means(), rtol=1e-6, atol=0)
    torch.testing.assert_close(whole.means(), x.abs().mean(0), rtol=1e-5, atol=0)


def test_channel_magnitudes_refuse_what_is_no_number() -> None:
    magnitudes = ChannelMagnitudes(3)
    with pytest.raises(QuantkitError, match="no tokens were observed"):
        magnitudes.maxima()
    magnitudes.update(torch.tensor([[1.0, float("nan"), 2.0]]))
    magnitudes.update(torch.ones(2, 3))
    with pytest.raises(QuantkitError, match="NaN or infinite values in 1 of 3 columns"):
        magnitudes.means()
