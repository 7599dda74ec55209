"""Half-quadratic quantization: its literal loop, its own objective, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from quantkit import numerics
from quantkit.algorithms import SOLVERS, Stats, hqq
from quantkit.errors import QuantkitError, UsageError
from quantkit.plan import make_plan
from quantkit.recipe import Recipe, Step
from quantkit.schemes import SCHEMES, QuantSpec
from tests.conftest import tiny_llama

SPECS = {
    name: SCHEMES[name].weight
    for name in ("w4a16-g32", "w4a16-asym-g64", "w4a16-channel", "w3a16-g96", "w8a16")
}


def heavy_tailed(seed: int, n: int = 16, k: int = 192) -> Tensor:
    """Weights with the outliers that the norm is there for, fp32 ``[n, k]``."""
    gen = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=gen) * 0.05
    weight[torch.rand(n, k, generator=gen) < 0.02] *= 6
    return weight


def by_group(weight: Tensor, q: numerics.QTensor, p: float) -> Tensor:
    """Σ |w − ŵ|^p of each group, fp64."""
    scale = numerics.float_scale(q, torch.float64).unsqueeze(-1)
    codes = numerics.to_groups(numerics.code_values(q, torch.float64), q.spec)
    zero = 0.0 if q.zero is None else q.zero.double().unsqueeze(-1)
    restored = (codes - zero) * scale
    return (restored - numerics.to_groups(weight.double(), q.spec)).abs().pow(p).sum(-1)


def literal(
    w: np.ndarray, s: np.float32, z: int, spec: QuantSpec, p: float, iterations: int
) -> tuple[float, int, float]:
    """The paper's loop for one group fp32 ``[n]``: its best scale, zero point and error.

    sp₁ and sp₂ as they are written, then the scale of least squares, which the paper leaves alone.
    fp32 as in the solver: under a min-max scale the largest weight is always half way.
    """

    def nearest() -> np.ndarray:
        return np.clip(np.round(w / s + np.float32(z)), spec.qmin, spec.qmax)

    def error() -> float:
        return float((np.abs(w - s * (q - z)) ** p).sum())

    q = nearest()
    best = (float(s), z, error())
    beta = 10.0
    for _ in range(iterations):
        r = w / s - (q - z)
        with np.errstate(divide="ignore"):
            e = np.sign(r) * np.maximum(np.abs(r) - np.abs(r) ** (p - 1) / beta, 0)
        target = w / s - e
        if not spec.symmetric:
            z = int(np.clip(np.round((q - target).mean()), spec.qmin, spec.qmax))
        s = np.float32(s * ((q - z) @ target) / ((q - z) @ (q - z)))
        beta *= 1.01
        q = nearest()
        if error() >= best[2]:
            break
        best = (float(s), z, error())
    return best


@pytest.mark.parametrize("p", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("name", ["w4a16-g32", "w4a16-asym-g64", "w3a16-g96"])
def test_hqq_equals_its_literal_loop(name: str, p: float) -> None:
    spec = SPECS[name]
    weight = heavy_tailed(0, n=6)
    q = hqq.solve(weight, Stats(), spec, {"p": p, "iterations": 20})
    scale, zero = numerics.compute_scales(*numerics.value_range(weight, spec), spec)
    found, wanted = [], []
    for row, group in torch.cartesian_prod(*map(torch.arange, scale.shape)).tolist():
        w = numerics.to_groups(weight, spec)[row, group].numpy()
        s, z = scale[row, group].numpy()[()], 0 if zero is None else int(zero[row, group])
        starts = (s, -s) if spec.symmetric else (s,)
        best = min((literal(w, s, z, spec, p, 20) for s in starts), key=lambda each: each[2])
        wanted.append(best[:2])
        found.append((float(q.scale[row, group]), 0 if q.zero is None else int(q.zero[row, group])))
    close = torch.isclose(torch.tensor(found), torch.tensor(wanted), rtol=2e-3, atol=0.0).all(1)
    assert float(close.double().mean()) >= 0.9  # sums in another order, a code on the edge
    assert not torch.allclose(q.scale.abs(), scale, rtol=1e-3)  # and something was found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.parametrize("name", SPECS)
def test_no_group_is_worse_than_under_min_max_scales(
    name: str, p: float, dtype: torch.dtype
) -> None:
    spec = SPECS[name]
    weight = heavy_tailed(1).to(dtype)
    solved = hqq.solve(weight, Stats(), spec, {**hqq.OPTIONS, "p": p})
    nearest = numerics.quantize_weight(weight, spec)
    assert solved.scale.dtype == dtype
    ours, theirs = by_group(weight, solved, p), by_group(weight, nearest, p)
    assert bool((ours <= theirs * (1 + 1e-5)).all())
    assert float(ours.sum()) < 0.999 * float(theirs.sum())


def test_scales_turn_over_where_there_is_one_code_more() -> None:
    spec = SPECS["w4a16-channel"]
    weight = heavy_tailed(2, n=64)
    signs = hqq.solve(weight, Stats(), spec, hqq.OPTIONS).scale.sign().flatten()
    assert set(signs.tolist()) == {1.0, -1.0}
    eight = hqq.solve(weight, Stats(), SPECS["w8a16"], hqq.OPTIONS)
    assert bool((eight.scale > 0).all())


@pytest.mark.parametrize("name", SPECS)
def test_stacked_rows_are_solved_alone(name: str) -> None:
    spec = SPECS[name]
    weight = heavy_tailed(3, n=24)
    whole = hqq.solve(weight, Stats(), spec, hqq.OPTIONS)
    part = hqq.solve(weight[8:16].contiguous(), Stats(), spec, hqq.OPTIONS)
    assert torch.equal(whole.rows(8, 16).codes, part.codes)
    assert torch.equal(whole.rows(8, 16).scale, part.scale)


def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, spec = heavy_tailed(4), SPECS["w4a16-asym-g64"]
    whole = hqq.solve(weight, Stats(), spec, hqq.OPTIONS).tensors()
    monkeypatch.setattr(hqq, "_WEIGHTS", 5 * 64)
    parts = hqq.solve(weight, Stats(), spec, hqq.OPTIONS).tensors()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("name", ["w4a16-g32", "w4a16-asym-g64"])
def test_groups_of_zeros_stay_zeros(name: str) -> None:
    weight = heavy_tailed(5)
    weight[3] = 0
    restored = numerics.dequantize(hqq.solve(weight, Stats(), SPECS[name], hqq.OPTIONS))
    assert bool((restored[3] == 0).all())
    assert bool(restored.isfinite().all())


@pytest.mark.parametrize("p", [0.4, 0.7, 1.0])
def test_shrinkage(p: float) -> None:
    x = torch.linspace(-2, 2, 401, dtype=torch.float64)
    shrunk = hqq.shrink(x, p, 10.0)
    edge = 10.0 ** (-1 / (2 - p))  # |x| = |x|^(p−1) / β
    assert torch.equal(shrunk == 0, x.abs() <= edge)
    torch.testing.assert_close(hqq.shrink(-x, p, 10.0), -shrunk)
    assert bool((shrunk.abs() <= x.abs()).all())


def test_nan_is_an_error() -> None:
    weight = heavy_tailed(6)
    weight[0, 0] = float("nan")
    with pytest.raises(QuantkitError, match="1 NaN or infinite"):
        hqq.solve(weight, Stats(), SPECS["w4a16-g32"], hqq.OPTIONS)


@pytest.mark.parametrize("name", [n for n, s in SCHEMES.items() if s.weight.dtype != "int"])
def test_float_codes_are_refused_before_any_work(name: str) -> None:
    recipe = Recipe(SCHEMES[name], algorithm=(Step("hqq"),))
    with pytest.raises(UsageError, match=f"hqq works in steps of integer codes, and {name} has"):
        make_plan(recipe, tiny_llama(), samples=2, seq_len=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0}, "p 0: is a number above 0, at most 2"),
        ({"p": 3}, "p 3: is a number above 0, at most 2"),
        ({"iterations": 0}, "iterations 0: is a whole number from 1 to 1000"),
    ],
)
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    recipe = Recipe(SCHEMES["w4a16-g64"], algorithm=(Step("hqq", options),))
    with pytest.raises(UsageError, match=message):
        make_plan(recipe, tiny_llama(), samples=2, seq_len=8)


def test_hqq_needs_no_data() -> None:
    assert not SOLVERS["hqq"].needs_hessian
    recipe = Recipe(SCHEMES["w4a16-asym-g64"], algorithm=(Step("hqq"),))
    assert not make_plan(recipe, tiny_llama(), samples=2, seq_len=8).needs_data
