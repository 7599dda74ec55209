"""Power and sample sizes against sums over every outcome."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from quantkit.errors import UsageError
from quantkit.gate import fewest_items, items_needed, power, preflight
from quantkit.gate.statistics import tango_bounds, tango_z

Z95 = 1.6448536269514722


def enumerated(n: int, flips: float, margin: float, difference: float) -> float:
    """P(PASS) as a plain sum over all (gains, losses), the slow form of `power`."""
    g, lo = (a.ravel() for a in np.meshgrid(np.arange(n + 1), np.arange(n + 1)))
    g, lo = g[g + lo <= n], lo[g + lo <= n]
    p = ((flips + difference) / 2, (flips - difference) / 2, 1 - flips)
    weight = stats.multinomial.pmf(np.stack([g, lo, n - g - lo], axis=1), n, p)
    return float(weight[tango_z(g, lo, n, -margin) > Z95].sum())


@pytest.mark.parametrize("n", [7, 50, 133])
@pytest.mark.parametrize(("flips", "difference"), [(0.02, 0.0), (0.1, -0.05), (0.3, 0.1)])
@pytest.mark.parametrize("margin", [0.01, 0.05, 0.3])
def test_power_equals_enumeration(n: int, flips: float, difference: float, margin: float) -> None:
    assert power(n, flips, margin, difference) == pytest.approx(
        enumerated(n, flips, margin, difference), abs=1e-9
    )


def test_power_where_the_formula_misleads() -> None:
    assert power(50, 0.02, 0.05) == pytest.approx(0.245, abs=5e-4)
    z = Z95 + stats.norm.ppf(0.804)
    assert z * z * 0.02 / 0.05**2 == pytest.approx(50, rel=0.01)  # what the formula asks


@pytest.mark.parametrize(("margin", "n"), [(0.01, 3092), (0.02, 773), (0.03, 344)])
def test_power_where_the_formula_holds(margin: float, n: int) -> None:
    assert power(n, 0.05, margin) == pytest.approx(0.8, abs=0.05)


CELLS = [
    (n, flips, margin)
    for n in (50, 100, 200, 400)
    for flips in (0.02, 0.05, 0.1, 0.2, 0.4)
    for margin in (0.01, 0.02, 0.05, 0.1)
]


@pytest.mark.parametrize("n", [50, 100, 200, 400])
def test_type_one_error_at_the_boundary(n: int) -> None:
    # A loss of exactly the margin. It needs flips ≥ margin; where the two are equal no item
    # can gain, one binomial decides, and its steps are coarser.
    for _, flips, margin in (c for c in CELLS if c[0] == n and c[1] >= c[2]):
        error = power(n, flips, margin, difference=-margin)
        assert error <= (0.055 if flips > margin else 0.06), (n, flips, margin, error)


def test_power_agrees_with_the_bounds() -> None:
    # The gate decides by LB > -margin and power by Z: one decision for every outcome.
    n, margin = 60, 0.07
    g, lo = (a.ravel() for a in np.meshgrid(np.arange(n + 1), np.arange(n + 1)))
    g, lo = g[g + lo <= n], lo[g + lo <= n]
    low, _ = tango_bounds(g, lo, n)
    np.testing.assert_array_equal(low > -margin, tango_z(g, lo, n, -margin) > Z95)


@pytest.mark.parametrize("margin", [0.01, 0.02, 0.05, 0.1, 0.5])
def test_fewest_items_is_the_first_that_passes(margin: float) -> None:
    n = fewest_items(margin)
    assert tango_z(0, 0, n, -margin) > Z95
    assert not tango_z(0, 0, n - 1, -margin) > Z95


def test_one_hundred_items_cannot_hold_two_points() -> None:
    assert fewest_items(0.02) > 100
    check = preflight("intent.acc", 100, 0.02)
    assert not check.possible
    assert check.message is not None
    assert "even zero flips could not pass" in check.message
    assert "n=100; you need 133 items" in check.message


@pytest.mark.parametrize("flips", [0.0, 0.02, 0.05, 0.2])
@pytest.mark.parametrize("margin", [0.02, 0.05])
def test_items_needed_reaches_the_power(flips: float, margin: float) -> None:
    n = items_needed(margin, flips)
    assert n is not None
    assert power(n, flips, margin) >= 0.8
    assert power(n - 1, flips, margin) < 0.8


def test_items_needed_gives_up_on_absurd_margins() -> None:
    assert items_needed(1e-9, 0.05) is None


def test_power_of_nothing() -> None:
    assert power(fewest_items(0.05), 0.0, 0.05) == 1.0
    assert power(fewest_items(0.05) - 1, 0.0, 0.05) == 0.0
    assert power(10, 1.0, 0.5) == pytest.approx(enumerated(10, 1.0, 0.5, 0.0))


def test_large_samples_are_quick_and_sure() -> None:
    assert power(1_000_000, 0.05, 0.01) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "wrong", [(100, 0.02, 0.05, -0.05), (100, 1.5, 0.05, 0.0), (0, 0.1, 0.05, 0.0)]
)
def test_impossible_distributions_are_refused(wrong: tuple[int, float, float, float]) -> None:
    with pytest.raises(UsageError, match="no model has"):
        power(*wrong)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -0.1, 1.0])
def test_impossible_margins_are_refused(bad: float) -> None:
    with pytest.raises(UsageError):
        power(100, 0.1, bad)
    with pytest.raises(UsageError, match=r"margin|n ≥ 1"):
        items_needed(bad, 0.1)


def test_no_number_of_items_rescues_a_true_loss() -> None:
    with pytest.raises(UsageError, match="difference inside the margin"):
        items_needed(0.05, 0.1, difference=-0.05)


def test_preflight_messages() -> None:
    assert preflight("a.acc", 400, 0.05).message is None
    weak = preflight("a.acc", 150, 0.03)
    assert weak.possible
    assert weak.message is not None
    assert "388 items" in weak.message
    loose = preflight("a.acc", 2000, 0.2)
    assert loose.message is not None
    assert "no model that flips this little can fail" in loose.message
