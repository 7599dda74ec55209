"""Refinement: the error falls, scales are of least squares, coupled outputs help each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit import numerics
from quantkit.algorithms import Stats, gptq
from quantkit.algorithms import refine as refinement
from quantkit.algorithms.refine import OUTPUT_DAMP, fit_scales, has_own_scales, refine
from quantkit.errors import UsageError
from quantkit.plan import make_plan
from quantkit.recipe import Recipe, Rule, Step
from quantkit.schemes import SCHEMES
from quantkit.steps import layer_steps
from tests.conftest import tiny_llama
from tests.test_algorithms import SPECS, problem

GROUPED = [
    "w4a16-g32", "w4a16-asym-g64", "w3a16-g96", "w2a16-g64", "w2a16-asym-g64", "w4a16-channel",
    "fp8",
]  # fmt: skip


def coupling(n: int, seed: int = 0, directions: int = 4) -> Tensor:
    """A Fisher matrix of outputs that a few directions dominate, its mean diagonal 1."""
    gen = torch.Generator().manual_seed(seed)
    g = torch.randn(n, directions, generator=gen) * 2
    matrix = g @ g.t() + torch.eye(n)
    return matrix / matrix.diagonal().mean()


def damped(hessian: Tensor, share: float) -> Tensor:
    return hessian.double() + share * hessian.double().diagonal().mean() * torch.eye(len(hessian))


def loss(weight: Tensor, q: numerics.QTensor, hessian: Tensor, outputs: Tensor | None) -> float:
    """tr(G E H Eᵀ) of the damped factors, fp64."""
    error = weight.double() - numerics.dequantize(q, torch.float32).double()
    coupled = error if outputs is None else damped(outputs, OUTPUT_DAMP) @ error
    return float((coupled @ damped(hessian, 0.01) * error).sum())


@pytest.mark.parametrize("name", SPECS)
def test_refining_never_raises_the_error(name: str) -> None:
    weight, hessian = problem(1)
    stats = Stats(hessian, 512)
    found = [
        loss(weight, gptq.solve(weight, stats, SPECS[name], {**gptq.OPTIONS, "refine": n}), hessian,
             None)
        for n in (0, 1, 3)
    ]  # fmt: skip
    assert found[1] <= found[0] * (1 + 1e-5)
    assert found[2] <= found[1] * (1 + 1e-5)
    if SPECS[name].bits < 8:
        assert found[2] < 0.97 * found[0]


@pytest.mark.parametrize("name", ["w4a16-g32", "w4a16-asym-g64", "nvfp4a16", "fp8-block"])
@pytest.mark.parametrize("parts", [(24,), (10, 14)])
def test_coupled_outputs_make_up_for_each_other(name: str, parts: tuple[int, ...]) -> None:
    weight, hessian = problem(2)
    blocks = [coupling(n, seed=n) for n in parts]
    outputs = torch.block_diag(*blocks)
    options = {**gptq.OPTIONS, "refine": 3}
    alone = gptq.solve(weight, Stats(hessian, 512), SPECS[name], options)
    together = gptq.solve(weight, Stats(hessian, 512, None, blocks), SPECS[name], options)
    assert loss(weight, together, hessian, outputs) < 0.8 * loss(weight, alone, hessian, outputs)
    assert loss(weight, together, hessian, None) > loss(weight, alone, hessian, None)


def test_independent_outputs_are_the_identity() -> None:
    weight, hessian = problem(3)
    spec = SPECS["w4a16-g64"]
    alone = gptq.solve(weight, Stats(hessian, 512), spec, gptq.OPTIONS)
    identity = gptq.solve(weight, Stats(hessian, 512, None, [torch.eye(24)]), spec, gptq.OPTIONS)
    differs = numerics.code_values(alone) != numerics.code_values(identity)
    assert float(differs.double().mean()) <= 0.01  # columns of all rows against rows of all columns


@pytest.mark.parametrize("name", GROUPED)
def test_fitted_scales_are_those_of_least_squares(name: str) -> None:
    """By lstsq on the tokens themselves, row by row, fp64."""
    spec = SPECS[name]
    assert has_own_scales(spec)
    gen = torch.Generator().manual_seed(5)
    x = torch.randn(400, 192, generator=gen)
    weight = torch.randn(6, 192, generator=gen) * 0.1
    q = gptq.solve(weight, Stats(x.t() @ x / 400, 400), spec, {**gptq.OPTIONS, "refine": 0})
    codes, width = numerics.code_values(q), spec.group_size or 192
    zeros = None if q.zero is None else q.zero.float()
    start = numerics.float_scale(q, torch.float32)
    fitted = fit_scales(weight, codes, start, zeros, spec, x.t() @ x / 400, torch.float32)
    for row in range(6):
        offsets = codes[row].double()
        if zeros is not None:
            offsets = offsets - zeros[row].double().repeat_interleave(width)
        columns = torch.stack([x.double()[:, i : i + width] @ offsets[i : i + width]
                               for i in range(0, 192, width)], 1)  # fmt: skip
        wanted = torch.linalg.lstsq(columns, (x @ weight[row]).double()[:, None]).solution[:, 0]
        torch.testing.assert_close(fitted[row].double(), wanted, rtol=1e-3, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from(GROUPED))
def test_fitting_never_raises_a_rows_error(seed: int, name: str) -> None:
    spec = SPECS[name]
    weight, hessian = problem(seed, n=5)
    weight[0] = 0  # scales of a row of zeros stay as they are
    q = numerics.quantize_weight(weight.to(torch.bfloat16), spec)
    codes, width = numerics.code_values(q), spec.group_size or 192
    zeros = None if q.zero is None else q.zero.float()
    steps = numerics.float_scale(q, torch.float32)
    fitted = fit_scales(weight, codes, steps, zeros, spec, hessian, torch.bfloat16)

    def errors(s: Tensor) -> Tensor:
        offsets = codes if zeros is None else codes - zeros.repeat_interleave(width, 1)
        error = weight - offsets * s.repeat_interleave(width, 1)
        return ((error @ hessian) * error).sum(1)

    assert bool((errors(fitted) <= errors(steps) * (1 + 1e-5) + 1e-12).all())
    assert bool((fitted * steps > 0).all())
    assert torch.equal(fitted, fitted.to(torch.bfloat16).float())
    assert torch.equal(fitted[0], steps[0])


def test_no_rounds_change_nothing() -> None:
    weight, hessian = problem(4)
    codes, steps = torch.zeros(24, 192), torch.ones(24, 6)
    found, same = refine(weight, codes.clone(), steps, None, SPECS["w4a16-g32"], hessian, 0,
                         dtype=torch.float32)  # fmt: skip
    assert torch.equal(found, codes)
    assert same is steps


def test_a_negative_scale_turns_the_longer_side() -> None:
    """-8 .. 7: where the largest weight is positive, a negative scale reaches it with 8 steps."""
    weight = torch.tensor([[-0.7] * 16 + [0.8] + [0.1, -0.3, 0.2, 0.5] * 4 + [0.0] * 31])
    spec = SCHEMES["w4a16-g64"].weight
    q = gptq.solve(weight, Stats(torch.eye(64), 1), spec, {**gptq.OPTIONS, "refine": 0})
    assert float(q.scale[0, 0]) < 0
    assert int(q.codes[0, 16]) == -8


def test_rows_are_fitted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(6)
    q = numerics.quantize_weight(weight, SPECS["w4a16-asym-g64"])
    assert q.zero is not None
    arguments = (weight, numerics.code_values(q), numerics.float_scale(q, torch.float32),
                 q.zero.float(), SPECS["w4a16-asym-g64"], hessian, torch.float32)  # fmt: skip
    whole = fit_scales(*arguments)
    monkeypatch.setattr(refinement, "NORMAL_FLOATS", 5 * 3**2)
    torch.testing.assert_close(fit_scales(*arguments), whole)


def test_coupled_outputs_are_those_of_the_original() -> None:
    """A rotation turns them, and a scaling of the layer behind divides them."""
    coupled = Step("gptq", {"fisher": 0.5, "outputs": "coupled"})
    turned = Recipe(SCHEMES["w4a16-g64"], algorithm=(Step("rotate"), coupled))
    with pytest.raises(UsageError, match="knows the original's outputs, and a rotation"):
        layer_steps(turned, "layer")
    model = tiny_llama()
    behind = Rule("*.down_proj", SCHEMES["w4a16-g64"], (Step("awq"), Step("gptq")))
    divided = Recipe(SCHEMES["w4a16-g64"], algorithm=(coupled,), rules=(behind,))
    with pytest.raises(UsageError, match=r"up_proj: outputs: coupled .* scaling of .*down_proj"):
        make_plan(divided, model, samples=4, seq_len=32)
    # Behind norms no output of a layer is scaled.
    steps = (Step("smoothquant", {"pairs": "norms"}), coupled)
    plan = make_plan(Recipe(SCHEMES["w4a16-g64"], algorithm=steps), model, samples=4, seq_len=32)
    assert plan.folds
    assert any(layer.coupled for layer in plan.layers)


def test_coupled_outputs_ask_for_gradients_and_descent() -> None:
    for options in ({"outputs": "coupled"}, {"outputs": "coupled", "fisher": 0.5, "refine": 0}):
        recipe = Recipe(SCHEMES["w4a16-g64"], algorithm=(Step("gptq", options),))
        with pytest.raises(UsageError, match="takes the gradients of fisher"):
            layer_steps(recipe, "layer")
