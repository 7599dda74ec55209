"""What a token's error costs the model: gradients, weights, and what a solver makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from quantkit import fisher, numerics
from quantkit import model as models
from quantkit.algorithms import Stats, gptq
from quantkit.algorithms.refine import OUTPUT_DAMP
from quantkit.calibrate import CalibrationData, calibrate
from quantkit.collector import _Moments
from quantkit.errors import QuantkitError
from quantkit.fisher import FLOOR, Gradients, measure_gradients, token_weights
from quantkit.gradients import gradient_of_draws
from quantkit.plan import make_plan
from quantkit.quantize import QuantizedLayer
from quantkit.recipe import Recipe, Step
from quantkit.schemes import SCHEMES
from tests.conftest import tiny_llama
from tests.test_refine import coupling, damped

IDS = torch.randint(0, 256, (4, 48), generator=torch.Generator().manual_seed(3))
NAME = "model.layers.0.mlp.gate_proj"
OPTIONS = {"fisher": 0.5, "outputs": "coupled"}
FISHER = Recipe(SCHEMES["w4a16-g64"], algorithm=(Step("gptq", OPTIONS),), keep=("lm_head",))


def test_gradients_are_those_of_the_loss_by_finite_differences() -> None:
    """‖g‖² is the slope of the loss when an output moves along its own gradient."""
    model = tiny_llama(dtype=torch.float64).eval()
    window = IDS[:1, :16]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        p = model(window).logits[0].softmax(-1)
    thresholds = torch.rand(16, 1, generator=generator)
    labels = torch.searchsorted(p.float().cumsum(-1), thresholds)[:, 0]
    gradients: list[torch.Tensor] = []
    module = model.get_submodule(NAME)

    def keep(_: object, __: object, out: torch.Tensor) -> torch.Tensor:
        out = out.detach().requires_grad_(True)
        out.register_hook(gradients.append)
        return out

    def loss() -> torch.Tensor:
        log_p = model(window).logits[0].log_softmax(-1)
        return -log_p[torch.arange(16), labels].sum()

    hook = module.register_forward_hook(keep)
    loss().backward()
    hook.remove()
    [gradient] = gradients
    squares = measure_gradients(model, [NAME], window.split(1)).squares[NAME]
    for token in (0, 7, 15):
        moved = torch.zeros_like(gradient)
        moved[0, token] = gradient[0, token]
        step = 1e-3 / float(moved.norm())

        def shifted(sign: float, by: torch.Tensor = moved * step) -> float:
            hook = module.register_forward_hook(lambda _, __, out: out + sign * by)
            with torch.no_grad():
                value = float(loss())
            hook.remove()
            return value

        slope = (shifted(1) - shifted(-1)) / (2 * step)
        assert float(squares[token]) == pytest.approx(slope, rel=1e-3)


def test_drawn_gradients_have_the_fisher_information_of_the_prediction() -> None:
    logits = torch.tensor([2.0, 0.5, 0.0, -1.0])
    p = logits.softmax(-1)
    draws = logits.expand(1, 200_000, 4)
    g = gradient_of_draws(draws, torch.Generator().manual_seed(0))[0]
    assert torch.allclose(g.mean(0), torch.zeros(4), atol=4e-3)
    assert torch.allclose(g.t() @ g / len(g), p.diag() - p[:, None] * p, atol=4e-3)


@pytest.mark.parametrize("exponent", [0.5, 1.0])
@pytest.mark.parametrize("block", [2048, 40])
def test_outputs_are_second_moments_of_flattened_gradients(
    exponent: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the gradients themselves, one token after another, fp64."""
    monkeypatch.setattr(fisher, "OUTPUT_BLOCK", block)
    model = tiny_llama().eval()
    found = measure_gradients(model, [NAME], IDS.split(1), coupled={NAME: exponent})
    gradients: list[torch.Tensor] = []
    hook = model.get_submodule(NAME).register_forward_hook(
        lambda _, __, out: out.requires_grad_(True).register_hook(gradients.append) and None
    )
    generator = torch.Generator().manual_seed(0)
    for window in IDS.split(1):
        logits = model(window, use_cache=False).logits
        logits.backward(gradient_of_draws(logits.detach(), generator))
    hook.remove()
    g = torch.cat(gradients).reshape(-1, gradients[0].shape[-1]).double()
    total = sum(torch.outer(row, row) * row.square().sum() ** (exponent - 1) for row in g)
    assert isinstance(total, torch.Tensor)
    width, start = len(total), 0
    assert len(found.outputs[NAME]) == -(-width // block)
    for part in found.outputs[NAME]:
        own = total[start : start + len(part), start : start + len(part)]
        wanted = own / own.diagonal().mean()
        torch.testing.assert_close(part.double(), wanted, rtol=0.03, atol=0.02)
        start += len(part)
    assert start == width
    assert not found.outputs.keys() - {NAME}


@given(
    st.lists(st.floats(0, 1e30), min_size=1, max_size=50),
    st.floats(0, 1),
)
def test_weights_have_mean_one_and_a_floor(squares: list[float], exponent: float) -> None:
    weights = token_weights(torch.tensor(squares), exponent)
    assert float(weights.mean()) == pytest.approx(1, rel=1e-4)
    assert float(weights.min()) >= FLOOR * 0.999
    if exponent == 0:
        assert torch.allclose(weights, torch.ones_like(weights))


def run(
    source: Path, work: Path, recipe: Recipe, **options: object
) -> tuple[models.SourceModel, dict[str, QuantizedLayer]]:
    loaded = models.load_source(str(source))
    plan = make_plan(recipe, loaded.model, samples=len(IDS), seq_len=IDS.shape[1])
    done = calibrate(loaded, plan, CalibrationData(IDS, "hash"), work, **options)  # type: ignore[arg-type]
    return loaded, done.layers


def test_feedback_weighs_tokens_as_the_hessian_does() -> None:
    """W + W C H⁻¹ is the least-squares answer only for one set of weights."""
    generator = torch.Generator().manual_seed(2)
    x, exact = (torch.randn(40, 8, generator=generator) for _ in range(2))
    counts = torch.rand(40, generator=generator) + 0.5
    moments = _Moments(8, counts)
    moments.needs_hessian = moments.needs_drift = True
    for part, unquantized in zip(x.split(16), exact.split(16), strict=True):
        moments.update(part, unquantized)
    hessian, drift = moments.hessian_value(), moments.drift_value()
    assert hessian is not None
    assert drift is not None
    torch.testing.assert_close(hessian, (x * counts[:, None]).T @ x / 40)
    torch.testing.assert_close(drift, ((exact - x) * counts[:, None]).T @ x / 40)


def test_each_layer_is_solved_with_its_own_weights(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, on the inputs that an ordinary forward pass of the result gives."""
    honest = measure_gradients

    def strongly_coupled(*args: object, **options: object) -> Gradients:
        """A random model's outputs hardly are."""
        found = honest(*args, **options)  # type: ignore[arg-type]
        outputs = {
            name: (coupling(n := len(blocks[0]), i, n // 3).to(torch.bfloat16),)
            for i, (name, blocks) in enumerate(found.outputs.items())
        }
        return replace(found, outputs=outputs)

    monkeypatch.setattr("quantkit.importance.measure_gradients", strongly_coupled)
    original = models.load_source(str(tiny)).model
    names = ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    squares = measure_gradients(original, names, IDS.split(1)).squares
    loaded, layers = run(tiny, tmp_path / "w", FISHER)
    seen: list[torch.Tensor] = []
    hook = loaded.model.get_submodule(names[0]).register_forward_pre_hook(
        lambda _, x: seen.append(x[0])
    )
    with torch.no_grad():
        loaded.model(IDS)
    hook.remove()
    x = torch.cat(seen).reshape(-1, seen[0].shape[-1])
    for name in names:
        weights = token_weights(squares[name], 0.5)
        weighted = (x * weights.sqrt().to(x)[:, None]).float()
        hessian = weighted.t() @ weighted / len(x)

        weight = original.get_submodule(name).weight
        stored = load_file(tmp_path / "w" / "outputs" / f"{name}.safetensors")["0"]
        g, h = damped(stored.float(), OUTPUT_DAMP), damped(hessian, 0.01)

        def loss(q: numerics.QTensor, weight: torch.Tensor = weight, g: torch.Tensor = g,
                 h: torch.Tensor = h) -> float:  # fmt: skip
            error = (weight.float() - numerics.dequantize(q, torch.float32)).double()
            return float((g @ error @ h * error).sum())

        def by_hand(*outputs: torch.Tensor, weight: torch.Tensor = weight,
                    hessian: torch.Tensor = hessian) -> numerics.QTensor:  # fmt: skip
            stats = Stats(hessian, len(x), None, outputs)
            return gptq.solve(weight, stats, FISHER.scheme.weight, {**gptq.OPTIONS, **OPTIONS})

        # Batches sum in another order, and descent hands a difference on from row to row.
        found, together, alone = loss(layers[name].qtensor), loss(by_hand(stored)), loss(by_hand())
        assert found == pytest.approx(together, rel=0.05)
        assert together < 0.9 * alone
    assert not torch.allclose(
        token_weights(squares[names[0]], 0.5), token_weights(squares[names[1]], 0.5), rtol=0.2
    )


@pytest.mark.parametrize("kept_blocks", [0, 1])
def test_resumes_to_the_same_bytes(kept_blocks: int, tiny: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    _, whole = run(tiny, work, FISHER)
    for path in (work / "blocks").glob("*.json"):
        if int(path.stem) >= kept_blocks:
            path.unlink()
    before = (work / "tokens.safetensors").read_bytes()
    assert (work / "outputs" / f"{NAME}.safetensors").exists()
    _, resumed = run(tiny, work, FISHER, resume=True)
    assert (work / "tokens.safetensors").read_bytes() == before
    assert all(torch.equal(whole[n].qtensor.codes, resumed[n].qtensor.codes) for n in whole)


def test_outputs_that_are_gone_are_missed(tiny: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    run(tiny, work, FISHER)
    (work / "blocks" / "0000.json").unlink()
    (work / "outputs" / f"{NAME}.safetensors").unlink()
    with pytest.raises(QuantkitError, match="gate_proj: what its outputs have to do"):
        run(tiny, work, FISHER, resume=True)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama()
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: p.clone() for name, p in model.named_parameters()}
    measure_gradients(model, [NAME], IDS.split(1))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == asked[name]
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    assert not model.get_submodule(NAME)._forward_hooks


def test_nan_is_found_before_it_is_solved_with() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(QuantkitError, match="gate_proj: a gradient of its output is NaN"):
        measure_gradients(model, [NAME], IDS.split(1))


def test_layers_that_a_router_chooses_are_refused() -> None:
    model = tiny_llama()
    module = model.get_submodule(NAME)
    whole = module.forward
    module.forward = lambda x: torch.cat([whole(x[:, :8]), whole(x[:, 8:])], 1)  # harmless
    measure_gradients(model, [NAME], IDS.split(1))
    other = "model.layers.1.mlp.gate_proj"
    model.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(QuantkitError, match="not every token meets this layer exactly once"):
        measure_gradients(model, [other], IDS.split(1))


def test_weighted_error_is_what_is_lowered() -> None:
    """Weights move rounding towards the tokens that count."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator)
    x = torch.randn(512, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    counts = torch.where(torch.arange(512) < 64, 7.0, 0.2)
    spec = SCHEMES["w3a16-g64"].weight

    def error(weights: torch.Tensor) -> float:
        rows = x * weights.sqrt()[:, None]
        stats = Stats(rows.t() @ rows / len(x), len(x))
        q = gptq.solve(weight, stats, spec, gptq.OPTIONS)
        apart = (x @ (numerics.dequantize(q, torch.float32) - weight).t()).square().sum(-1)
        return float((apart * counts).sum())

    assert error(counts) < 0.97 * error(torch.ones(512))
