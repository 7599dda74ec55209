"""A solver's result beside round-to-nearest: told apart for every kind of scale."""

from __future__ import annotations

import pytest
import torch

from quantkit.algorithms import SOLVERS, Stats, gptq
from quantkit.errors import QuantkitError
from quantkit.numerics import QTensor
from quantkit.rounding import audit
from quantkit.schemes import SCHEMES

TOKENS, ROWS, COLUMNS = 512, 320, 256
OPTIONS = SOLVERS["gptq"].options


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return (
        0.02 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    ).bfloat16()


@pytest.fixture(scope="module")
def stats() -> Stats:
    """Of inputs that move together, and of predecessors that are 5 % off."""
    draw = torch.Generator().manual_seed(1)
    mix = torch.eye(COLUMNS) + 0.3 * torch.randn(COLUMNS, COLUMNS, generator=draw) / COLUMNS**0.5
    x = torch.randn(TOKENS, COLUMNS, generator=draw) @ mix
    drift = (0.05 * torch.randn(TOKENS, COLUMNS, generator=draw)).t() @ x / TOKENS
    return Stats(x.t() @ x / TOKENS, TOKENS, drift)


def solve(name: str, weight: torch.Tensor, stats: Stats, solver: str, **options: object) -> QTensor:
    row = SOLVERS[solver]
    return row.solve(weight, stats, SCHEMES[name].weight, {**row.options, **options})


SAMPLE = [
    "w4a16-g64", "w8a16", "w3a16-channel", "w4a16-asym-g32", "w2a16-g32", "w2a16-asym-g64",
    "fp8-block", "nvfp4a16",
]  # fmt: skip


@pytest.mark.parametrize("feedback", [0.0, 1.0])
@pytest.mark.parametrize("name", [*SAMPLE, "mxfp4a16"])
def test_gptq_passes(name: str, feedback: float, weight: torch.Tensor, stats: Stats) -> None:
    q = solve(name, weight, stats, "gptq", feedback=feedback)
    found = audit(weight, q, stats, "gptq", {**OPTIONS, "feedback": feedback})
    assert (found.solver, found.tokens) == ("gptq", TOKENS)
    assert found.moved is not None
    assert found.loss is not None
    assert found.nearest_loss is not None
    assert found.moved > 0.05
    assert found.loss < 0.95 * found.nearest_loss


@pytest.mark.parametrize("clip", ["none", "mse"])
@pytest.mark.parametrize("name", SAMPLE)
def test_round_to_nearest_in_the_place_of_gptq(
    name: str, clip: str, weight: torch.Tensor, stats: Stats
) -> None:
    """As `rtn` rounds, whose quotients have the model's dtype."""
    q = solve(name, weight, stats, "rtn", clip=clip)
    with pytest.raises(QuantkitError, match=r"gptq gave round-to-nearest: 0\.00%"):
        audit(weight, q, stats, "gptq", OPTIONS)


@pytest.mark.parametrize("name", SAMPLE)
def test_gptq_that_spreads_nothing(
    name: str, weight: torch.Tensor, stats: Stats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the solver rounds, in fp32."""
    honest = gptq.inverse_factor
    monkeypatch.setattr(gptq, "inverse_factor", lambda *x: honest(*x).diagonal().diag())
    q = solve(name, weight, stats, "gptq", refine=0)  # descent would mend it
    with pytest.raises(QuantkitError, match=r"gptq gave round-to-nearest: 0\.00%"):
        audit(weight, q, stats, "gptq", OPTIONS)


@pytest.mark.parametrize("solver", ["rtn", "imatrix"])
def test_what_rounds_to_nearest_by_design(solver: str, weight: torch.Tensor, stats: Stats) -> None:
    q = solve("w4a16-g64", weight, stats, solver)
    found = audit(weight, q, stats, solver, SOLVERS[solver].options)
    assert (found.solver, found.tokens, found.moved) == (solver, TOKENS, None)


def test_weights_that_lie_on_the_grid(weight: torch.Tensor, stats: Stats) -> None:
    """Nothing is left to spread, and that is no fault."""
    from quantkit import numerics

    q = solve("w8a16", weight, stats, "rtn")
    found = audit(numerics.dequantize(q), q, stats, "gptq", OPTIONS)
    assert found.moved == 0
