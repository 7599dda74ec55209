"""The arithmetic of the gate against references that share no code with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from gate_builders import paired
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from quantkit.gate import statistics as S

Z95 = 1.6448536269514722


def restricted_z(gains: int, losses: int, n: int, d0: float) -> float:
    """Tango's Z with the restricted MLE found by numerical maximisation of the likelihood."""
    rest = n - gains - losses

    def minus_log_likelihood(q: float) -> float:
        p_gain, p_rest = q + d0, 1 - 2 * q - d0
        return -(
            special.xlogy(gains, max(p_gain, 0))
            + special.xlogy(losses, max(q, 0))
            + special.xlogy(rest, max(p_rest, 0))
        )

    low, high = max(0.0, -d0), (1 - d0) / 2
    found = optimize.minimize_scalar(
        minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-13}
    )
    q = min((low, high, found.x), key=minus_log_likelihood)
    variance = n * (2 * q + d0 - d0 * d0)
    return (gains - losses - n * d0) / math.sqrt(variance)


@pytest.mark.parametrize("n", [5, 20, 44, 100])
def test_tango_equals_maximised_likelihood(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(40):
        gains, losses, _ = rng.multinomial(n, rng.dirichlet([1, 1, 4]))
        d0 = float(rng.uniform(-0.6, 0.6))
        expected = restricted_z(int(gains), int(losses), n, d0)
        assert S.tango_z(gains, losses, n, d0) == pytest.approx(expected, abs=2e-5)


def test_tango_lens_example() -> None:
    # The example of Tango 1998: 44 patients, 43 concordant, one loss, margin .1: Z = 1.709.
    assert S.tango_z(0, 1, 44, -0.1) == pytest.approx(1.709, abs=5e-4)


def test_tango_at_zero_difference_is_mcnemar() -> None:
    assert S.tango_z(3, 13, 80, 0.0) == pytest.approx((3 - 13) / math.sqrt(16))
    assert S.tango_z(0, 0, 80, 0.0) == 0.0


def test_tango_bounds_solve_for_z() -> None:
    g, lo = np.meshgrid(np.arange(0, 13), np.arange(0, 13))
    g, lo = g[g + lo <= 12], lo[g + lo <= 12]
    low, high = S.tango_bounds(g, lo, 12)
    inside = low > -1
    np.testing.assert_allclose(S.tango_z(g, lo, 12, low)[inside], Z95, atol=1e-6)
    inside = high < 1
    np.testing.assert_allclose(S.tango_z(g, lo, 12, high)[inside], -Z95, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000])
def test_tango_bounds_at_the_edges(n: int) -> None:
    # No flips: Z² = nδ/(1-δ), so the bound is z²/(n + z²) in closed form.
    low, high = S.tango_bounds(0, 0, n)
    assert -low == pytest.approx(Z95**2 / (n + Z95**2), rel=1e-9)
    assert high == pytest.approx(-low)
    low, high = S.tango_bounds(0, n, n)
    assert low == pytest.approx(-1, abs=1e-12)
    assert -1 < high < 1
    low, high = S.tango_bounds(n, 0, n)
    assert high == pytest.approx(1, abs=1e-12)
    assert -1 < low < 1


def test_tango_z_falls_with_the_hypothesis() -> None:
    # What makes bisection exact: no second crossing.
    grid = np.linspace(-0.999, 0.999, 401)
    for n in (3, 30):
        for gains in range(0, n + 1, max(1, n // 6)):
            for losses in range(0, n - gains + 1, max(1, n // 6)):
                assert np.all(np.diff(S.tango_z(gains, losses, n, grid)) < 1e-9)


counts = st.integers(1, 400).flatmap(
    lambda n: st.tuples(st.integers(0, n), st.integers(0, n), st.just(n)).filter(
        lambda t: t[0] + t[1] <= t[2]
    )
)


@settings(max_examples=60, deadline=None)
@given(counts)
def test_tango_bounds_hold_the_estimate_and_fall_with_losses(c: tuple[int, int, int]) -> None:
    gains, losses, n = c
    low, high = S.tango_bounds(gains, losses, n)
    assert -1 <= low <= (gains - losses) / n <= high <= 1
    if gains + losses < n:
        worse_low, worse_high = S.tango_bounds(gains, losses + 1, n)
        assert worse_low <= low + 1e-12
        assert worse_high <= high + 1e-12
    # Exchanging the two models mirrors the interval.
    mirrored = S.tango_bounds(losses, gains, n)
    assert (-mirrored[1], -mirrored[0]) == pytest.approx((low, high), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_exact_p_values_equal_binomtest(gains: int, losses: int) -> None:
    flips = gains + losses
    two = stats.binomtest(gains, flips).pvalue if flips else 1.0
    one = stats.binomtest(losses, flips, alternative="greater").pvalue if flips else 1.0
    assert S.mcnemar_p(gains, losses) == pytest.approx(two, rel=1e-9)
    assert S.loss_p(gains, losses) == pytest.approx(one, rel=1e-9)


def test_holm_by_hand() -> None:
    assert S.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert S.holm([0.9, 0.8]) == [1.0, 1.0]
    assert S.holm([]) == []


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (257, 420)])
def test_wilson_equals_scipy(k: int, n: int) -> None:
    expected = stats.binomtest(k, n).proportion_ci(0.90, method="wilson")
    assert S.wilson_bounds(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_singleton_clusters_are_the_t_interval() -> None:
    rng = np.random.default_rng(0)
    d = rng.normal(0, 0.2, 50)
    bounds = S.ratio_bounds(d, np.ones(50))
    low, high = stats.ttest_1samp(d, 0).confidence_interval(0.90)
    assert (bounds.lower, bounds.upper) == pytest.approx((low, high), rel=1e-12)


def test_clustered_variance_by_its_definition() -> None:
    rng = np.random.default_rng(1)
    labels = [f"c{i}" for i in rng.integers(0, 25, 300)]
    d = rng.normal(-0.01, 0.3, 300).clip(-1, 1)
    groups, mean = sorted(set(labels)), d.mean()
    total = sum(sum(d[i] - mean for i in range(300) if labels[i] == g) ** 2 for g in groups)
    half = stats.t.ppf(0.95, 24) * math.sqrt(25 / 24 * total / 300**2)
    bounds = S.difference_bounds(d, labels)
    assert bounds.estimate == pytest.approx(mean)
    assert (bounds.lower, bounds.upper) == pytest.approx((mean - half, mean + half))


def test_ratio_bounds_by_their_definition() -> None:
    rng = np.random.default_rng(2)
    tokens = rng.integers(200, 1024, 24).astype(float)
    sums = rng.gamma(2, 0.02, 24) * tokens
    k = sums.sum() / tokens.sum()
    se = math.sqrt(24 / 23 * ((sums - k * tokens) ** 2).sum()) / tokens.sum()
    bounds = S.ratio_bounds(sums, tokens)
    half = stats.t.ppf(0.95, 23) * se
    assert (bounds.lower, bounds.upper) == pytest.approx((k - half, k + half))


def test_bca_agrees_with_scipy() -> None:
    rng = np.random.default_rng(3)
    sums = rng.gamma(0.7, 0.05, 15)
    low, high = S._bca(sums, np.ones(15), 0.05, resamples=40_000)
    expected = stats.bootstrap(
        (sums,), np.mean, confidence_level=0.90, n_resamples=40_000, method="BCa", rng=rng
    ).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=0.02)


def test_few_clusters_take_the_wider_bound() -> None:
    sums = np.array([0.0] * 10 + [1.0, 4.0])  # skewed: BCa reaches further up than t
    bounds = S.ratio_bounds(sums, np.ones(12))
    half = stats.t.ppf(0.95, 11) * sums.std(ddof=1) / math.sqrt(12)
    assert bounds.lower is not None
    assert bounds.upper is not None
    assert bounds.lower <= sums.mean() - half + 1e-12
    assert bounds.upper > sums.mean() + half
    assert "BCa" in bounds.method


def test_bootstrap_is_seeded_and_order_free() -> None:
    rng = np.random.default_rng(4)
    sums, sizes = rng.normal(0, 1, 9), rng.integers(1, 9, 9).astype(float)
    order = rng.permutation(9)
    assert S.ratio_bounds(sums, sizes) == S.ratio_bounds(sums[order], sizes[order])


def test_one_cluster_bounds_nothing() -> None:
    bounds = S.difference_bounds([0.1, 0.2], ["a", "a"])
    assert bounds.lower is None
    assert bounds.upper is None


@pytest.mark.parametrize("groups", [2, 5, 19, 20, 100])
def test_identical_scores_are_not_proof(groups: int) -> None:
    # Variance zero: the bound must still depend on how much was seen, by clusters.
    labels = [f"c{i // 3}" for i in range(3 * groups)]
    bounds = S.difference_bounds(np.zeros(3 * groups), labels)
    assert bounds.estimate == 0
    assert bounds.lower == pytest.approx(-(Z95**2) / (groups + Z95**2))


def test_clusters_widen_binary_bounds() -> None:
    base, quant = paired(100, 6, 14, 80)
    d = np.array(quant) - np.array(base)
    alone = S.difference_bounds(d, [f"i{i}" for i in range(200)])
    low, high = S.tango_bounds(6, 14, 200)
    assert alone.lower is not None
    assert alone.upper is not None
    assert alone.lower <= low + 1e-9
    assert alone.upper >= high - 1e-9
    together = S.difference_bounds(d, [f"c{i // 5}" for i in range(200)])
    assert together.lower is not None
    assert together.lower < alone.lower


def test_clustered_type_one_error() -> None:
    # 60 dialogues of 5 turns whose flips come together, at a true loss of the margin.
    rng = np.random.default_rng(5)
    labels = [f"c{i // 5}" for i in range(300)]
    passed, repeats = 0, 200
    for _ in range(repeats):
        flips = rng.random((60, 5)) < rng.beta(0.5, 4.5, (60, 1))
        d = np.where(flips, np.where(rng.random((60, 5)) < 0.25, 1.0, -1.0), 0.0)
        bounds = S.difference_bounds(d.ravel(), labels)
        passed += bounds.lower is not None and bounds.lower > -0.05
    assert passed / repeats < 0.1  # 5 % and three standard errors


def test_score_bounds() -> None:
    scores = [1.0] * 30 + [0.0] * 10
    alone = S.score_bounds(scores, [str(i) for i in range(40)])
    assert (alone.lower, alone.upper) == S.wilson_bounds(30, 40)
    perfect = S.score_bounds([1.0] * 40, [str(i // 4) for i in range(40)])
    assert perfect.lower == pytest.approx(S.wilson_bounds(10, 10)[0])
    graded = S.score_bounds(np.linspace(0.2, 0.9, 40), [str(i) for i in range(40)])
    assert graded.lower is not None
    assert graded.lower < 0.55 == pytest.approx(graded.estimate)


def test_perfect_agreement_is_still_a_sample() -> None:
    bounds = S.agreement_bounds([100] * 24, [100] * 24)
    assert bounds.estimate == 1
    assert bounds.lower == pytest.approx(S.wilson_bounds(2400, 2400)[0])
