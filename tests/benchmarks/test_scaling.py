"""Floors and fits of benchmarks/scaling.py, without timing anything."""

from __future__ import annotations

import pytest
from benchmark_scripts import load_script

from quantkit.ops.measure import Limits

scaling = load_script("scaling")

LIMITS = Limits(read_bytes=10e9, bf16_operations=1e12, int8_operations=4e12)
LENGTHS = [128, 256, 512, 1024]


def model(*, integer: bool) -> object:
    return scaling.Model("m", 20_000_000, 30_000_000, integer, 1000, 2000)


def test_a_step_on_its_floor_has_the_floors_slope() -> None:
    exact = [(20_000_000 + 1000 * n) / 10e9 for n in LENGTHS]
    curve = scaling.fit(model(integer=True), "decode", LENGTHS, exact, LIMITS)
    assert curve.floor == pytest.approx(exact)
    assert curve.slope == pytest.approx(curve.floor_slope)
    assert curve.floor_slope == pytest.approx(1e-7)


@pytest.mark.parametrize("integer", [False, True])
def test_a_prompt_at_half_the_rate_has_twice_the_floors_coefficients(integer: bool) -> None:
    rate = 4e12 if integer else 1e12
    twice = [2 * (2 * 30_000_000 * n / rate + 2 * 2000 * n * n / 1e12) for n in LENGTHS]
    curve = scaling.fit(model(integer=integer), "prefill", LENGTHS, twice, LIMITS)
    assert [2 * f for f in curve.floor] == pytest.approx(twice)
    assert curve.linear == pytest.approx(2 * curve.floor_linear)
    assert curve.slope == pytest.approx(2 * curve.floor_slope)
