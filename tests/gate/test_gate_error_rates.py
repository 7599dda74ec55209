"""What the gate promises, counted: error rates, power and coverage of every interval."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmarks import gate_simulation as simulation
from quantkit.gate import power
from quantkit.gate import statistics as S

CELLS = [
    (n, flips, margin)
    for n in simulation.SIZES
    for flips in simulation.FLIP_RATES
    for margin in simulation.MARGINS
]
FEASIBLE = [cell for cell in CELLS if cell[2] <= cell[1]]


@pytest.mark.parametrize(("n", "flips", "margin"), FEASIBLE)
def test_a_model_at_its_margin_passes_one_time_in_twenty(
    n: int, flips: float, margin: float
) -> None:
    errors = simulation.type_one_errors(n, flips, margin)
    assert errors is not None
    assert errors["tango"] <= 0.055
    # Two ways to sum one trinomial: thresholds in `power`, the whole grid here.
    assert errors["tango"] == pytest.approx(power(n, flips, margin, -margin), abs=1e-9)


def test_cells_without_a_null_are_not_counted() -> None:
    missing = [cell for cell in CELLS if simulation.type_one_errors(*cell) is None]
    assert missing == [cell for cell in CELLS if cell[2] > cell[1]]
    assert len(missing) == 3 * (2 + 1)


def test_other_gates_pass_it_more_often() -> None:
    errors = simulation.type_one_errors(200, 0.05, 0.02)
    assert errors is not None
    assert errors["point"] == pytest.approx(0.57, abs=0.01)
    assert errors["wald"] > 0.055 > errors["tango"]
    found = [e for e in (simulation.type_one_errors(*cell) for cell in FEASIBLE) if e is not None]
    worst = {rule: max(e[rule] for e in found) for rule in errors}
    assert worst["point"] > 0.5
    assert worst["wald"] > 0.06


@pytest.mark.parametrize("n", [100, 400, 1000])
@pytest.mark.parametrize(("flips", "margin"), [(0.02, 0.02), (0.05, 0.03), (0.2, 0.05)])
def test_preflight_is_within_a_point_of_simulation(n: int, flips: float, margin: float) -> None:
    rng = np.random.default_rng(n)
    draws = rng.multinomial(n, [flips / 2, flips / 2, 1 - flips], size=60_000)
    # Few distinct outcomes: decide each once, as the gate does, by its lower bound.
    outcomes, count = np.unique(draws[:, :2], axis=0, return_counts=True)
    low, _ = S.tango_bounds(outcomes[:, 0], outcomes[:, 1], n)
    assert power(n, flips, margin) == pytest.approx(count[low > -margin].sum() / 60_000, abs=0.01)


# -- coverage: one-sided 95 % bounds miss on their side one time in twenty -------------------


@pytest.mark.parametrize(("n", "flips"), [(50, 0.2), (200, 0.05), (200, 0.2), (1000, 0.05)])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_tango_covers(n: int, flips: float, share: float) -> None:
    truth = flips * (1 - 2 * share)  # share of flips that are losses
    gains, losses, weight = simulation.trinomial(n, flips, truth)
    low, high = S.tango_bounds(gains, losses, n)
    # A score interval is approximate: with ten flips, most of them losses, 6.6 % at worst.
    assert weight[low > truth].sum() <= 0.07
    assert weight[high < truth].sum() <= 0.07
    if n == 1000:
        assert max(weight[low > truth].sum(), weight[high < truth].sum()) <= 0.055


@pytest.mark.parametrize("n", [20, 100, 420])
def test_wilson_covers_on_average(n: int) -> None:
    # A lattice: single rates miss by up to a few points, their mean must not.
    rates = np.linspace(0.1, 0.9, 81)
    bounds = np.array([S.wilson_bounds(k, n) for k in range(n + 1)])
    weight = stats.binom.pmf(np.arange(n + 1)[:, None], n, rates)
    for missed in (bounds[:, :1] > rates, bounds[:, 1:] < rates):
        assert (weight * missed).sum(0).mean() == pytest.approx(0.05, abs=0.005)


def coverage(draw, bounds, truth: float, repeats: int) -> tuple[float, float]:
    """Shares of samples whose lower bound lies above the truth and whose upper one below."""
    rng, above, below = np.random.default_rng(0), 0, 0
    for _ in range(repeats):
        b = bounds(*draw(rng))
        above += b.lower > truth
        below += b.upper < truth
    return above / repeats, below / repeats


def normal_clusters(rng, groups):
    sizes = rng.integers(1, 6, groups).astype(float)
    return rng.normal(0.1 * sizes, np.sqrt(sizes)), sizes


def skewed_clusters(rng, groups):
    sizes = np.ones(groups)
    return rng.gamma(2.0, 0.5, groups), sizes


def flipped_clusters(rng, groups):
    """Dialogues of five turns whose flips come together; three of four flips are losses."""
    flips = rng.random((groups, 5)) < rng.beta(0.5, 4.5, (groups, 1))
    d = np.where(flips, np.where(rng.random((groups, 5)) < 0.25, 1.0, -1.0), 0.0)
    return d.ravel(), [f"c{i // 5}" for i in range(5 * groups)]


INTERVALS = {
    "clustered t": (normal_clusters, S.ratio_bounds, 0.1, 40),
    "clustered BCa": (normal_clusters, S.ratio_bounds, 0.1, 12),
    "clustered BCa, skewed": (skewed_clusters, S.ratio_bounds, 1.0, 12),
    "clustered flips": (flipped_clusters, S.difference_bounds, -0.05, 60),
    "mean, bootstrap": (
        lambda rng, n: (rng.normal(0.03, 0.2, n),),
        S.mean_bounds,
        0.03,
        24,
    ),
}


def check_coverage(name: str, repeats: int, slack: float) -> None:
    draw, bounds, truth, groups = INTERVALS[name]
    above, below = coverage(lambda rng: draw(rng, groups), bounds, truth, repeats)
    # The lower bound is what passes a model. Few skewed clusters hide their tail from any
    # interval, which then misses upwards more often; twice the nominal rate is refused.
    assert above <= 0.05 + slack, (name, above)
    assert below <= (0.10 if "skewed" in name else 0.065) + slack, (name, below)


@pytest.mark.parametrize("name", sorted(INTERVALS))
def test_intervals_cover(name: str) -> None:
    check_coverage(name, repeats=150, slack=0.05)  # three standard errors of 150 draws


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(INTERVALS))
def test_intervals_cover_closely(name: str) -> None:
    # Three standard errors of 3,000 draws, and half a point: by 20,000 draws the lower bound of the
    # clustered t, linearised as it is, misses 5.6 % of the time.
    check_coverage(name, repeats=3000, slack=0.017)
