"""Solvers: never worse than round to nearest on their own objective, equal to their slow form."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit import numerics
from quantkit.algorithms import SOLVERS, Stats, gptq, imatrix, rtn
from quantkit.algorithms.clip import mse_scales
from quantkit.errors import QuantkitError
from quantkit.schemes import SCHEMES, QuantSpec

SPECS = {
    name: SCHEMES[name].weight
    for name in (
        "w8a16", "w4a16-g32", "w4a16-g64", "w4a16-channel", "w4a16-asym-g64", "w3a16-g96",
        "w3a16-asym-g32", "w2a16-g64", "w2a16-asym-g64", "fp8", "fp8-static", "fp8-block",
        "nvfp4a16", "mxfp4a16",
    )
}  # fmt: skip


def problem(seed: int, n: int = 24, k: int = 192, tokens: int = 512) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs with a few strong columns."""
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=gen) * 0.3 + torch.eye(k)
    x = torch.randn(tokens, k, generator=gen) @ mix
    x[:, :3] *= 8
    return torch.randn(n, k, generator=gen) * 0.1, x.t() @ x / tokens


def loss(weight: Tensor, q: numerics.QTensor, hessian: Tensor) -> float:
    """tr((W − Ŵ) H (W − Ŵ)ᵀ): the mean squared error of the layer's output."""
    delta = (numerics.dequantize(q, torch.float32) - weight.float()).double()
    return float((delta @ hessian.double() * delta).sum())


def literal_gptq(weight: Tensor, hessian: Tensor, spec: QuantSpec, damp: float) -> Tensor:
    """OBQ as the paper derives it: after each column the inverse Hessian is updated by Gaussian
    elimination (arXiv 2210.17323, equations 2 and 3), fp64, one column at a time."""
    q = numerics.quantize_weight(weight, spec)
    scale = numerics.float_scale(q, torch.float64)
    k = weight.shape[1]
    width = k // scale.shape[1]
    h = hessian.double().clone()
    h.diagonal().add_(damp * h.diagonal().mean())
    inverse = torch.linalg.inv(h)
    w = weight.double().clone()
    out = torch.zeros_like(w)
    for j in range(k):
        s = scale[:, j // width]
        z = q.zero[:, j // width].double() if q.zero is not None else 0.0
        code = numerics.round_to_codes(w[:, j] / s + z, spec)
        out[:, j] = code
        error = (w[:, j] - (code - z) * s) / inverse[j, j]
        w -= error[:, None] * inverse[j][None]
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
        inverse[j, j] = 1.0  # eliminated; never read again
    return out


@pytest.mark.parametrize("name", ["w4a16-g32", "w4a16-asym-g64", "w3a16-g96", "w8a16"])
def test_gptq_equals_its_literal_form(name: str) -> None:
    spec = SPECS[name]
    weight, hessian = problem(0)
    options = {**gptq.OPTIONS, "clip": "none", "actorder": "none", "refine": 0}
    q = gptq.solve(weight, Stats(hessian, 512), spec, options)
    expected = literal_gptq(weight, hessian, spec, options["damp"])
    differs = (numerics.code_values(q).double() != expected).double().mean()
    assert float(differs) <= 2e-3  # fp32 against fp64: a few codes on the edge of rounding


@pytest.mark.parametrize("actorder", ["none", "static"])
@pytest.mark.parametrize("name", SPECS)
def test_gptq_is_better_than_round_to_nearest(name: str, actorder: str) -> None:
    spec = SPECS[name]
    weight, hessian = problem(1)
    nearest = numerics.quantize_weight(weight, spec)
    options = {**gptq.OPTIONS, "actorder": actorder, "clip": "none"}
    solved = gptq.solve(weight, Stats(hessian, 512), spec, options)
    assert loss(weight, solved, hessian) < loss(weight, nearest, hessian)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from(["w4a16-g64", "w4a16-asym-g64", "fp8"]))
def test_gptq_never_loses_to_round_to_nearest(seed: int, name: str) -> None:
    spec = SPECS[name]
    weight, hessian = problem(seed, n=8)
    nearest = rtn.solve(weight, Stats(), spec, {"clip": "none"})
    solved = gptq.solve(
        weight, Stats(hessian, 512), spec, {**gptq.OPTIONS, "clip": "none", "damp": 1e-4}
    )
    assert loss(weight, solved, hessian) <= loss(weight, nearest, hessian) * 1.02


@pytest.mark.parametrize("name", SPECS)
def test_stacked_rows_are_solved_alone(name: str) -> None:
    """Layers that share an input are stacked: rows must not influence each other."""
    spec = SPECS[name]
    if spec.granularity in ("tensor", "block") or name == "nvfp4a16":
        pytest.skip("scales are shared between rows; such layers are never stacked")
    weight, hessian = problem(2, n=40)
    stats = Stats(hessian, 512)
    whole = gptq.solve(weight, stats, spec, gptq.OPTIONS)
    part = gptq.solve(weight[16:32].contiguous(), stats, spec, gptq.OPTIONS)
    assert torch.equal(numerics.code_values(whole)[16:32], numerics.code_values(part))
    assert torch.equal(whole.rows(16, 32).scale, part.scale)


def test_identity_hessian_gives_round_to_nearest() -> None:
    weight, _ = problem(3)
    spec = SPECS["w4a16-g64"]
    options = {**gptq.OPTIONS, "clip": "none", "refine": 1}  # scales are not fitted yet
    solved = gptq.solve(weight, Stats(torch.eye(192), 1), spec, options)
    assert torch.equal(solved.codes, numerics.quantize_weight(weight, spec).codes)


@pytest.mark.parametrize("name", SPECS)
def test_clipping_never_raises_the_rounding_error(name: str) -> None:
    spec = SPECS[name]
    weight, _ = problem(4)
    clipped = rtn.solve(weight, Stats(), spec, {"clip": "mse"})
    plain = rtn.solve(weight, Stats(), spec, {"clip": "none"})

    def error(q: numerics.QTensor) -> float:
        return float((numerics.dequantize(q, torch.float32) - weight).square().sum())

    assert error(clipped) <= error(plain) * (1 + 1e-6)


def test_a_zero_point_of_two_bits_costs_nothing() -> None:
    """A scale of either sign chooses between two windows of values, a zero point between more."""
    total = {"w2a16-g64": 0.0, "w2a16-asym-g64": 0.0}
    for seed in range(4):
        weight, hessian = problem(seed)
        for name in total:
            q = gptq.solve(weight, Stats(hessian, 512), SPECS[name], gptq.OPTIONS)
            total[name] += loss(weight, q, hessian)
    assert total["w2a16-asym-g64"] <= 1.03 * total["w2a16-g64"]


@pytest.mark.parametrize("name", ["w2a16-asym-g64", "w3a16-asym-g32"])
def test_zero_points_beside_that_of_the_range_are_tried(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPECS[name]
    weight, _ = problem(8)

    def error() -> float:
        scale, zero, _ = mse_scales(weight, spec)
        q = numerics.quantize(weight, scale, zero, spec)
        assert zero is not None
        assert spec.qmin <= int(zero.min()) <= int(zero.max()) <= spec.qmax
        return float((numerics.dequantize(q, torch.float32) - weight).square().sum())

    tried = error()
    monkeypatch.setattr("quantkit.algorithms.clip.shifts", lambda spec: (0,))
    assert tried < 0.998 * error()


def test_two_bits_look_at_less_than_half_of_the_range() -> None:
    """Their best step is about the standard deviation, wherever the largest weight is."""
    spec = SCHEMES["w2a16-g128"].weight
    weight = torch.randn(16, 384, generator=torch.Generator().manual_seed(9))
    weight[:, ::128] = 5.0
    scale, _, _ = mse_scales(weight, spec)
    assert 0.7 < float(scale.abs().median()) < 1.5  # half of min-max's is 1.67


def test_clipping_weighs_columns_by_importance() -> None:
    spec = SPECS["w4a16-channel"]
    weight, _ = problem(5)
    importance = torch.zeros(192)
    importance[:96] = 1.0
    scale, zero, _ = mse_scales(weight, spec, importance)
    q = numerics.quantize(weight, scale, zero, spec)
    plain = rtn.solve(weight, Stats(), spec, {"clip": "mse"})

    def error(q: numerics.QTensor) -> float:
        return float((numerics.dequantize(q, torch.float32) - weight)[:, :96].square().sum())

    assert error(q) <= error(plain) * (1 + 1e-6)


def drifted(seed: int, k: int = 96, n: int = 12, tokens: int = 400) -> tuple[Tensor, ...]:
    """A weight, its inputs under quantized predecessors, and those without."""
    gen = torch.Generator().manual_seed(seed)
    exact = torch.randn(tokens, k, generator=gen) @ (
        torch.eye(k) + torch.randn(k, k, generator=gen) * 0.2
    )
    seen = exact + torch.randn(tokens, k, generator=gen) * 0.2 - 0.1 * exact.roll(1, 1)
    return torch.randn(n, k, generator=gen) * 0.1, seen, exact


def drift_stats(seen: Tensor, exact: Tensor) -> Stats:
    n = len(seen)
    return Stats(seen.t() @ seen / n, n, (exact - seen).t() @ seen / n)


@pytest.mark.parametrize("actorder", ["none", "static"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_feedback_equals_its_literal_form(share: float, actorder: str) -> None:
    """The layer that comes nearest to the unquantized outputs, by least squares on the tokens
    themselves in fp64, rounded by the literal GPTQ."""
    spec = SPECS["w4a16-g32"]
    weight, seen, exact = drifted(14)
    stats = drift_stats(seen, exact)
    assert stats.hessian is not None
    damp = 0.01 * stats.hessian.diagonal().mean() * len(seen)
    wanted = torch.cat([exact @ weight.t(), damp.sqrt() * weight.t()]).double()
    inputs = torch.cat([seen, damp.sqrt() * torch.eye(96)]).double()
    best = torch.linalg.lstsq(inputs, wanted).solution.t()
    target = (weight + share * (best - weight)).float()
    options = {**gptq.OPTIONS, "clip": "none", "actorder": actorder, "refine": 0}
    solved = gptq.solve(weight, stats, spec, {**options, "feedback": share})
    if actorder == "none":
        expected = literal_gptq(target, stats.hessian, spec, 0.01)
    else:
        expected = numerics.code_values(gptq.solve(target, stats, spec, options)).double()
    differs = (numerics.code_values(solved).double() != expected).double().mean()
    assert float(differs) <= 0.01  # a column on the edge of rounding moves its successors


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["w4a16-g32", "w3a16-g96", "w8a16"])
def test_feedback_comes_nearer_to_the_unquantized_outputs(name: str, seed: int) -> None:
    spec = SPECS[name]
    weight, seen, exact = drifted(seed)
    stats = drift_stats(seen, exact)

    def distance(q: numerics.QTensor) -> float:
        return float((seen @ numerics.dequantize(q, torch.float32).t() - exact @ weight.t()).norm())

    plain, half, full = (
        distance(gptq.solve(weight, stats, spec, {**gptq.OPTIONS, "feedback": share}))
        for share in (0.0, 0.5, 1.0)
    )
    assert full < half < plain < distance(numerics.quantize_weight(weight, spec)) * 1.01


def test_feedback_without_drift_is_an_error() -> None:
    weight, seen, _ = drifted(0)
    stats = Stats(seen.t() @ seen / len(seen), len(seen))
    with pytest.raises(QuantkitError, match="inputs were not observed; set `feedback: 0`"):
        gptq.solve(weight, stats, SPECS["w8a16"], {**gptq.OPTIONS, "feedback": 1.0})


def test_a_dead_column_keeps_its_value() -> None:
    weight, hessian = problem(6)
    hessian[10, :] = 0
    hessian[:, 10] = 0
    spec = SPECS["w8a16"]
    solved = gptq.solve(weight, Stats(hessian, 512), spec, {**gptq.OPTIONS, "clip": "none"})
    kept = numerics.dequantize(solved, torch.float32)[:, 10]
    assert bool(((kept - weight[:, 10]).abs() <= 0.5001 * numerics.float_scale(solved)[:, 0]).all())


def test_inverse_factor() -> None:
    _, hessian = problem(7)
    upper = gptq.inverse_factor(hessian, 0.01).double()
    damped = hessian.double()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    inverse = torch.linalg.inv(damped)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.t() @ upper, inverse, rtol=1e-3, atol=1e-6 * inverse.max())


def test_failed_cholesky_is_an_error_with_a_remedy() -> None:
    hessian = torch.eye(64)
    hessian[0, 0] = -5.0
    with pytest.raises(QuantkitError, match=r"not positive definite with damp 0\.01; raise `damp`"):
        gptq.solve(torch.randn(4, 64), Stats(hessian, 10), SPECS["w8a16"], {**gptq.OPTIONS})


def test_gptq_needs_a_hessian() -> None:
    with pytest.raises(QuantkitError, match="without calibration tokens"):
        gptq.solve(torch.randn(4, 64), Stats(), SPECS["w8a16"], gptq.OPTIONS)


def literal_scale_search(weight: Tensor, spec: QuantSpec, hessian: Tensor) -> Tensor:
    """Each row and group by itself, fp64: the share of the min-max range with the least δ H δᵀ, the
    longer side of symmetric codes on either side."""
    width = spec.group_size or weight.shape[1]
    out = torch.zeros_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], width):
            w = weight[row : row + 1, start : start + width]
            h = hessian[start : start + width, start : start + width].double()
            least = float("inf")
            signs = (1,) if not spec.symmetric else (1, -1)
            for sign, share in itertools.product(signs, [1 - 0.025 * i for i in range(21)]):
                scale, zero = numerics.compute_scales(
                    w.amin(1, keepdim=True) * share, w.amax(1, keepdim=True) * share, spec
                )
                one = QuantSpec(spec.bits, spec.dtype, symmetric=spec.symmetric)
                q = numerics.quantize(w, sign * scale[0], None if zero is None else zero[0], one)
                restored = numerics.dequantize(q, torch.float32)
                delta = (restored - w).double()[0]
                error = float(delta @ h @ delta)
                if error < least:
                    least, out[row, start : start + width] = error, restored[0]
    return out


@pytest.mark.parametrize("error", ["diagonal", "blocks"])
@pytest.mark.parametrize("name", ["w4a16-g32", "w4a16-asym-g64", "w4a16-channel"])
def test_imatrix_equals_its_literal_search(name: str, error: str) -> None:
    spec = SPECS[name]
    weight, hessian = problem(11, n=6)
    weights = hessian if error == "blocks" else torch.diag(hessian.diagonal())
    q = imatrix.solve(weight, Stats(hessian, 512), spec, {"error": error})
    differs = numerics.dequantize(q, torch.float32) != literal_scale_search(weight, spec, weights)
    assert float(differs.double().mean()) <= 0.03  # a group or two where fp32 ties


@pytest.mark.parametrize("error", ["diagonal", "blocks"])
@pytest.mark.parametrize("name", SPECS)
def test_imatrix_never_loses_to_round_to_nearest(name: str, error: str) -> None:
    spec = SPECS[name]
    weight, hessian = problem(12)
    nearest = numerics.quantize_weight(weight, spec)
    solved = imatrix.solve(weight, Stats(hessian, 512), spec, {"error": error})

    def own_loss(q: numerics.QTensor) -> float:
        delta = numerics.dequantize(q, torch.float32) - weight
        if error == "diagonal":
            return float((delta.square() * hessian.diagonal()).sum())
        width = spec.group_size or (spec.block[1] if spec.block else weight.shape[1])
        return sum(
            float(((d @ hessian[i : i + width, i : i + width]) * d).sum())
            for i in range(0, weight.shape[1], width)
            for d in [delta[:, i : i + width]]
        )

    assert own_loss(solved) <= own_loss(nearest) * (1 + 1e-5)
    if error == "diagonal" or spec.granularity == "group":
        assert own_loss(solved) < own_loss(nearest)


def test_imatrix_needs_a_hessian() -> None:
    with pytest.raises(QuantkitError, match="imatrix without calibration tokens"):
        imatrix.solve(torch.randn(4, 64), Stats(), SPECS["w8a16"], imatrix.OPTIONS)


def test_every_solver_documents_its_options() -> None:
    for name, solver in SOLVERS.items():
        assert solver.options, name
