"""The likeliest tokens against torch's argmax, on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.ops.argmax import argmax

values = st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=40)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values, st.integers(0, 3000), st.integers(0, 300))
def test_a_row_is_torchs(isa: str, values: list[float], before: int, behind: int) -> None:
    """Ties, NaN and infinities anywhere among lanes, pieces and what is left behind them."""
    padding = torch.full((before + behind,), -torch.inf)
    row = torch.cat([padding[:before], torch.tensor(values), padding[before:]])
    [place], [value] = argmax(row[None])
    assert place == int(row.argmax())
    assert value == float(row[place]) or math.isnan(value)
    assert math.isnan(value) == bool(row.isnan().any())


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1024, 1025, 49152])
def test_rows_of_a_block(isa: str, n: int) -> None:
    whole = torch.randn(9, n, generator=torch.Generator().manual_seed(n)).round(decimals=1)
    places, found = argmax(whole)
    assert places == whole.argmax(-1).tolist()
    assert found == whole.amax(-1).tolist()
    some = [8, 0, 3]
    assert argmax(whole[:], some) == ([places[i] for i in some], [found[i] for i in some])
    assert argmax(whole[4:], [1]) == (places[5:6], found[5:6])


def test_nothing_is_nothing() -> None:
    assert argmax(torch.zeros(0, 3)) == argmax(torch.zeros(2, 3), []) == ([], [])


@pytest.mark.parametrize(
    "block",
    [
        torch.zeros(3),
        torch.zeros(2, 0),
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(3, 2).t(),
    ],
)
def test_what_is_no_block_of_rows_is_refused(block: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="contiguous fp32"):
        argmax(block)


@pytest.mark.parametrize("rows", [[2], [-1], [0, 2]])
def test_rows_that_are_not_there_are_refused(rows: list[int]) -> None:
    with pytest.raises(ValueError, match="2 rows has no row"):
        argmax(torch.zeros(2, 3), rows)
