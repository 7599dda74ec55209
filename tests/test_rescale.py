"""Rescalers: the papers' slow forms, what they may never make worse, and their place in a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantkit import model as models
from quantkit import numerics
from quantkit.algorithms import RESCALERS, Rescaler, awq, smoothquant
from quantkit.algorithms.outliers import THRESHOLDS
from quantkit.algorithms.scaling import Consumer, Scaling, best_or_unscaled, output_errors
from quantkit.calibrate import CalibrationData, calibrate
from quantkit.cli.main import run as run_cli
from quantkit.errors import UsageError
from quantkit.fisher import measure_gradients
from quantkit.plan import Plan, make_plan
from quantkit.quantize import QuantizedLayer
from quantkit.recipe import Recipe, Rule, Step
from quantkit.rescale import spread
from quantkit.schemes import SCHEMES
from tests.conftest import save_model, tiny_llama
from tests.run_helpers import arguments, contents

OUTLIERS = RESCALERS["outliers"]

IDS = torch.randint(0, 256, (5, 48), generator=torch.Generator().manual_seed(4))


def scaling(
    scheme: str, *, seed: int = 0, tokens: int = 400, k: int = 96, repeats: int = 1
) -> Scaling:
    """Two layers that read one input with a few strong channels, and exact statistics of it."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=gen) @ (
        torch.eye(k) + torch.randn(k, k, generator=gen) * 0.05
    )
    x = x * torch.exp(torch.randn(k, generator=gen))
    x[:, 3] *= 20
    spec = SCHEMES[scheme]
    weights = [torch.randn(n, k, generator=gen) * 0.1 for n in (24, 40)]
    channels = torch.arange(k // repeats).repeat_interleave(repeats)
    return Scaling(
        tuple(Consumer(w, spec.weight, spec.input) for w in weights),
        channels,
        x.abs().amax(0),
        x.abs().mean(0),
        x,
        None if spec.input else x.t() @ x / tokens,
    )


def output_error(problem: Scaling, scales: Tensor) -> float:
    return output_errors(problem, [scales])[0]


def literal_error(problem: Scaling, scales: Tensor) -> float:
    """‖Q(W diag(s)) (diag(s)⁻¹ X) − W X‖² token by token, fp64: their mean, or what they cost."""
    total = 0.0
    s = scales[problem.channels]
    for consumer in problem.consumers:
        q = numerics.quantize_weight(consumer.weight * s, consumer.spec)  # type: ignore[arg-type]
        restored = numerics.dequantize(q, torch.float64)
        for t, x in enumerate(problem.sample):
            scaled = x / s
            if consumer.inputs is not None:
                scale = None
                if not consumer.inputs.dynamic:
                    high = (problem.maxima / s).max()
                    scale = numerics.compute_scales(-high, high, consumer.inputs)[0].reshape(1)
                scaled = numerics.fake_quantize_input(scaled[None], consumer.inputs, scale)[0]
            error = restored @ scaled.double() - consumer.weight.double() @ x.double()
            costs = consumer.costs
            weight = 1 / len(problem.sample) if costs is None else float(costs[t])
            total += float(error.square().sum()) * weight
    return total


def with_costs(problem: Scaling, seed: int = 2) -> Scaling:
    """The same, with costs of tokens as unlike as those of a real model."""
    gen = torch.Generator().manual_seed(seed)
    return dataclasses.replace(
        problem,
        consumers=tuple(
            dataclasses.replace(
                c, costs=torch.exp(3 * torch.randn(len(problem.sample), generator=gen))
            )
            for c in problem.consumers
        ),
    )


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-asym-g32", "w8a8", "w8a8-static", "fp8"])
def test_output_error_is_the_literal_one(scheme: str) -> None:
    problem = scaling(scheme)
    scales = torch.rand(96, generator=torch.Generator().manual_seed(1)) + 0.5
    assert output_error(problem, scales) == pytest.approx(literal_error(problem, scales), rel=1e-3)
    problem = with_costs(problem)
    assert output_error(problem, scales) == pytest.approx(literal_error(problem, scales), rel=1e-3)


@pytest.mark.parametrize("repeats", [1, 4])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothquant_equals_its_equation(alpha: float, repeats: int) -> None:
    problem = scaling("w8a8", repeats=repeats)
    found = smoothquant.scales(problem, {"alpha": alpha})
    for channel in range(96 // repeats):
        columns = [j for j in range(96) if int(problem.channels[j]) == channel]
        x = max(float(problem.sample[:, j].abs().max()) for j in columns)
        w = max(float(c.weight[:, j].abs().max()) for c in problem.consumers for j in columns)
        assert float(found[channel]) == pytest.approx(x**alpha / w ** (1 - alpha), rel=1e-4)


def test_at_one_half_input_and_weight_are_equally_hard() -> None:
    problem = scaling("w8a8")
    after = problem.scaled(smoothquant.scales(problem, {"alpha": 0.5}))
    weights = torch.stack([c.weight.abs().amax(0) for c in after.consumers]).amax(0)
    torch.testing.assert_close(after.maxima, weights, rtol=1e-4, atol=0)


def test_smoothquant_leaves_channels_without_traffic_alone() -> None:
    problem = scaling("w8a8")
    problem.maxima[7] = 0
    assert float(smoothquant.scales(problem, {"alpha": 0.5})[7]) == 1.0


@pytest.mark.parametrize("repeats", [1, 4])
@pytest.mark.parametrize("threshold", [1.0, 3.0, 8.0])
def test_outliers_equal_their_rule(threshold: float, repeats: int) -> None:
    problem = scaling("w8a8-static", repeats=repeats)
    found = OUTLIERS.scales(problem, {"threshold": threshold})
    tops = problem.sample.abs().amax(0).reshape(-1, repeats).amax(1)
    limit = threshold * float(sorted(tops.tolist())[(len(tops) - 1) // 2])
    for channel, top in enumerate(tops.tolist()):
        assert float(found[channel]) == pytest.approx(max(1.0, top / limit), rel=1e-5)
    assert problem.scaled(found).maxima.max() <= limit * (1 + 1e-5)


def test_outliers_are_found_among_channels_with_traffic() -> None:
    problem = scaling("w8a8-static")
    problem.maxima[20:] = 0
    assert OUTLIERS.scales(problem, {"threshold": 2.0})[3] > 1
    problem.maxima[:] = 0
    torch.testing.assert_close(OUTLIERS.scales(problem, OUTLIERS.options), torch.ones(96))


@pytest.mark.parametrize("costs", [False, True])
def test_outliers_auto_takes_the_least_error(costs: bool) -> None:
    problem = with_costs(scaling("w8a8-static")) if costs else scaling("w8a8-static")
    found = output_error(problem, OUTLIERS.scales(problem, OUTLIERS.options))
    assert found < 0.5 * output_error(problem, torch.ones(96))
    for threshold in THRESHOLDS:
        one = OUTLIERS.scales(problem, {"threshold": threshold})
        assert found <= output_error(problem, one)


def test_costs_decide() -> None:
    """What the dearest tokens ask for is chosen, and other tokens ask for other thresholds."""
    problem = scaling("w8a8-static")
    chosen = [
        OUTLIERS.scales(with_costs(problem, seed), OUTLIERS.options).tolist() for seed in range(12)
    ]
    assert len({tuple(each) for each in chosen}) > 1


@given(
    tokens=st.integers(1, 300), share=st.integers(2, 64), layers=st.integers(1, 3),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_a_sample_stands_for_every_token(tokens: int, share: int, layers: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    costs = torch.exp(3 * torch.randn(layers, tokens, generator=gen))
    rows, counts = spread(costs, share)
    assert len(set(rows.tolist())) == len(rows) == len(counts) == min(share, tokens)
    assert float(counts.sum()) == pytest.approx(tokens)
    assert bool((counts >= 1).all())
    if layers == 1:
        dearest = costs[0].topk(min(share // 2, tokens)).indices
        assert set(dearest.tolist()) <= set(rows.tolist())


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static"])
def test_smoothquant_auto_takes_the_least_error(scheme: str) -> None:
    problem = scaling(scheme)
    found = output_error(problem, smoothquant.scales(problem, {"alpha": "auto"}))
    assert found < 0.5 * output_error(problem, torch.ones(96))
    for alpha in smoothquant.ALPHAS:
        assert found <= output_error(problem, smoothquant.scales(problem, {"alpha": alpha}))


def test_no_scaling_is_taken_that_helps_nothing() -> None:
    problem = scaling("w8a8-static")
    unscaled = torch.ones(96)
    worse = torch.ones(96)
    worse[3] = 0.01  # the strong channel, stronger yet
    better = OUTLIERS.scales(problem, {"threshold": 4.0})
    assert best_or_unscaled(problem, [worse, better]) is better
    for useless in ([worse], [2 * unscaled], []):  # twice all channels rounds alike
        assert torch.equal(best_or_unscaled(problem, useless), unscaled)


@pytest.mark.parametrize("repeats", [1, 4])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-asym-g64", "w4a16-channel"])
def test_awq_equals_its_literal_search(scheme: str, repeats: int) -> None:
    """arXiv 2306.00978, §3.2: every exponent of the grid, its error measured on every token."""
    problem = scaling(scheme, k=192, repeats=repeats)
    best: tuple[float, Tensor] | None = None
    magnitude = problem.sample.abs().mean(0).reshape(-1, repeats).mean(1)
    for i in range(10):
        s = magnitude.pow(i / 10).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        error = literal_error(problem, s)
        if best is None or error < best[0]:
            best = error, s
    assert best is not None
    found = awq.scales(problem, {"grid": 10})
    torch.testing.assert_close(found, best[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", RESCALERS)
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w3a16-g96", "w8a8", "nvfp4a16"])
def test_searches_never_lose_to_round_to_nearest(scheme: str, seed: int, name: str) -> None:
    problem = scaling(scheme, seed=seed)
    options = {**RESCALERS[name].options, **({"alpha": "auto"} if name == "smoothquant" else {})}
    found = RESCALERS[name].scales(problem, options)
    assert output_error(problem, found) <= output_error(problem, torch.ones(96))


def test_statistics_follow_the_input_exactly() -> None:
    problem = scaling("w4a16-g32", repeats=2)
    s = torch.rand(48) + 0.5
    after = problem.scaled(s)
    x = problem.sample / s[problem.channels]
    torch.testing.assert_close(after.maxima, x.abs().amax(0))
    torch.testing.assert_close(after.means, x.abs().mean(0))
    torch.testing.assert_close(after.hessian, x.t() @ x / len(x), rtol=1e-3, atol=1e-4)
    before = problem.sample @ problem.consumers[0].weight.t()
    torch.testing.assert_close(x @ after.consumers[0].weight.t(), before, rtol=1e-4, atol=1e-4)


# In a run


def recipe(scheme: str, *steps: Step, keep: tuple[str, ...] = ("lm_head",)) -> Recipe:
    return Recipe(SCHEMES[scheme], algorithm=steps, keep=keep)


def run(
    source: Path, work: Path, how: Recipe, **options: object
) -> tuple[models.SourceModel, Plan, dict[str, QuantizedLayer]]:
    loaded = models.load_source(str(source))
    plan = make_plan(how, loaded.model, samples=len(IDS), seq_len=IDS.shape[1])
    done = calibrate(loaded, plan, CalibrationData(IDS, "hash"), work, **options)  # type: ignore[arg-type]
    return loaded, plan, done.layers


SMOOTH_GPTQ = (Step("smoothquant", {"pairs": "all"}), Step("gptq"))
OUTLIERS_RTN = (Step("outliers"), Step("rtn"))
AWQ_RTN = (Step("awq"), Step("rtn"))


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose norms make a few channels as strong as real ones are."""
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[::48] = 12.0
    return save_model(model, tmp_path_factory.mktemp("models") / "outliers")


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(IDS).logits.float()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("scheme", "steps"),
    [
        ("w8a8", (Step("smoothquant"), Step("rtn"))),
        ("w8a8", (Step("smoothquant", {"alpha": "auto", "pairs": "all"}), Step("rtn"))),
        ("w4a16-g64", AWQ_RTN),
        ("w8a8-static", OUTLIERS_RTN),
    ],
)
def test_rescaling_lowers_the_error_of_every_output(
    scheme: str,
    steps: tuple[Step, ...],
    outliers: Path,
    tmp_path: Path,
) -> None:
    _, _, plain = run(outliers, tmp_path / "a", recipe(scheme, Step("rtn")))
    _, plan, scaled = run(outliers, tmp_path / "b", recipe(scheme, *steps))
    first = [name for name in plan.folds[0].consumers if "layers.0" in name]
    assert len(first) == 3  # later layers have other inputs in the two runs
    before, after = (sum(x[n].output_error or 0 for n in first) for x in (plain, scaled))
    assert after < 0.9 * before


@pytest.mark.parametrize(
    ("scheme", "steps", "keep"),
    [
        ("w4a16-g64", AWQ_RTN, ("lm_head",)),
        ("w8a8-static", SMOOTH_GPTQ, ("lm_head", "*.k_proj")),
        ("w8a8-static", (Step("outliers"), Step("gptq", {"fisher": 0.5})), ("lm_head",)),
        ("w4a16-asym-g64", (Step("smoothquant"), Step("awq"), Step("gptq")), ()),
    ],
)
@pytest.mark.parametrize("kept_blocks", [0, 1, 2])
def test_resume_gives_the_same_bytes(
    scheme: str,
    steps: tuple[Step, ...],
    keep: tuple[str, ...],
    kept_blocks: int,
    outliers: Path,
    tmp_path: Path,
) -> None:
    how, work = recipe(scheme, *steps, keep=keep), tmp_path / "work"
    whole, _, layers = run(outliers, work, how)
    for path in sorted((work / "blocks").glob("*.json")):
        if int(path.stem) == -1 or int(path.stem) >= kept_blocks:
            path.unlink()
    # The block in progress has its scales; the one behind it has not even those.
    for path in (work / "blocks").glob("*.scales"):
        if int(path.stem) > kept_blocks:
            path.unlink()
    resumed, _, again = run(outliers, work, how, resume=True)
    for name, layer in layers.items():
        for part, tensor in layer.qtensor.tensors().items():
            assert torch.equal(tensor, again[name].qtensor.tensors()[part]), name
    state, other = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(state[key], other[key]) for key in state)
    original = models.load_source(str(outliers)).model.state_dict()
    norms = [key for key in state if "input_layernorm" in key]
    assert len(norms) == 2
    assert not any(torch.equal(state[key], original[key]) for key in norms)
    for key in state:
        if "k_proj.weight" in key and "*.k_proj" in keep:
            assert not torch.equal(state[key], original[key])  # kept, and scaled all the same


def test_costs_are_those_of_the_tokens_in_the_sample(
    outliers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Scaling] = []

    def watch(problem: Scaling, options: Mapping[str, object]) -> Tensor:
        seen.append(problem)
        return torch.ones(problem.count)

    monkeypatch.setitem(RESCALERS, "outliers", dataclasses.replace(OUTLIERS, scales=watch))
    run(outliers, tmp_path / "w", recipe("w8a8-static", *OUTLIERS_RTN))
    original = models.load_source(str(outliers)).model
    names = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    squares = measure_gradients(original, names, IDS.split(1)).squares
    first = seen[0]
    assert len(first.sample) == IDS.numel()  # few enough to take them all
    for consumer, name in zip(first.consumers, names, strict=True):
        assert consumer.costs is not None
        torch.testing.assert_close(consumer.costs, squares[name] / len(consumer.weight))


def test_costs_are_for_the_inputs_whose_rescaler_asks(
    outliers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmoothQuant asks for those of the norms' inputs; the other search there goes by them, too."""
    seen: dict[str, list[Scaling]] = {"smoothquant": [], "outliers": []}

    def watch(name: str) -> Rescaler:
        def scales(problem: Scaling, options: Mapping[str, object]) -> Tensor:
            seen[name].append(problem)
            return torch.ones(problem.count)

        return dataclasses.replace(RESCALERS[name], scales=scales)

    for name in seen:
        monkeypatch.setitem(RESCALERS, name, watch(name))
    asks = Step("smoothquant", {"alpha": "auto", "cost": "fisher"})
    takes_all_alike = Step("outliers", {"cost": "output"})
    # Gradients of every layer are there, for GPTQ: who does not ask for costs gets none.
    solver = Step("gptq", {"fisher": 0.5})
    _, plan, _ = run(outliers, tmp_path / "w", recipe("w8a8-static", asks, takes_all_alike, solver))
    assert all(layer.needs_gradients for layer in plan.layers)
    assert {fold.of_norm for fold in plan.folds} == {True, False}
    for fold, problem in zip(plan.folds, seen["outliers"], strict=True):
        assert all((c.costs is not None) is fold.of_norm for c in problem.consumers), fold.label
    assert len(seen["smoothquant"]) == 4
    assert all(c.costs is not None for problem in seen["smoothquant"] for c in problem.consumers)


def test_scalings_leave_the_function_alone(outliers: Path, tmp_path: Path) -> None:
    """With 8 bits a weight and the exact scalings of a run, only rounding is left."""
    before = logits(models.load_source(str(outliers)).model)
    loaded, _, _ = run(outliers, tmp_path / "w", recipe("w8a16", *SMOOTH_GPTQ))
    after = logits(loaded.model)
    assert float((after - before).norm() / before.norm()) < 0.03


def test_a_checkpoint_holds_the_folded_weights(
    outliers: Path, traffic: Path, tmp_path: Path
) -> None:
    """A whole run: the export is reloaded and compared by the run itself; and it resumes."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "scheme: w4a16-g64\nalgorithm: [smoothquant, {awq: {grid: 4}}, gptq]\nkeep: [lm_head]\n"
        "calibrate: {samples: 4, seq_len: 64}\n"
    )
    out = tmp_path / "out"
    assert run_cli(arguments(outliers, path, traffic, out)) == 0
    manifest = json.loads((out / "quantkit.json").read_text())
    layer = manifest["layers"]["model.layers.0.self_attn.q_proj"]
    assert (layer["solver"], layer["steps"]) == ("gptq", "smoothquant → awq → gptq")
    again = tmp_path / "again" / "out"
    again.parent.mkdir()
    assert run_cli(arguments(outliers, path, traffic, again)) == 0
    assert contents(out) == contents(again)
    from safetensors.torch import load_file

    stored = load_file(out / "model.safetensors")
    original = models.load_source(str(outliers)).model.state_dict()
    key = "model.layers.1.post_attention_layernorm.weight"
    assert not torch.equal(stored[key], original[key])


# Plans


def test_only_a_search_by_cost_goes_back_through_the_model(tiny: Path) -> None:
    model = models.load_source(str(tiny)).model
    for options, wanted in (
        ({}, True),
        ({"cost": "output"}, False),
        ({"threshold": 4}, False),
    ):
        how = recipe("w8a8-static", Step("outliers", options), Step("rtn"))
        assert make_plan(how, model, samples=1, seq_len=8).needs_fisher is wanted
    how = recipe("w8a8", Step("smoothquant", {"alpha": "auto", "cost": "fisher"}), Step("rtn"))
    assert make_plan(how, model, samples=1, seq_len=8).needs_fisher


def test_a_plan_names_its_scalings(tiny: Path) -> None:
    model = models.load_source(str(tiny)).model
    plan = make_plan(recipe("w8a8", Step("smoothquant"), Step("rtn")), model, samples=1, seq_len=8)
    assert [fold.producer for fold in plan.folds_in(1)] == [
        "model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm",
    ]  # fmt: skip
    assert plan.needs_data
    facts = plan.to_json()["folds"]["model.layers.0.input_layernorm → q_proj, k_proj, v_proj"]
    options = {"alpha": 0.5, "pairs": "norms", "cost": "output"}
    assert facts == [{"name": "smoothquant", "options": options}]
    both = recipe("w4a16-g64", Step("smoothquant"), Step("awq"), Step("gptq"), keep=())
    plan = make_plan(both, model, samples=1, seq_len=8)
    steps = {f.producer: [s.name for s in f.steps] for f in plan.folds_in(0)}
    assert steps["model.layers.0.mlp.up_proj"] == ["awq"]  # SmoothQuant scales norms only
    assert steps["model.layers.0.input_layernorm"] == ["smoothquant", "awq"]
    assert plan.unscaled == {"lm_head": "no scaling folds outside of the blocks"}
    named = {layer.name: layer.steps for layer in plan.layers}
    assert named["model.layers.0.self_attn.k_proj"] == "smoothquant → awq → gptq"
    assert named["model.layers.0.mlp.down_proj"] == "awq → gptq"
    assert named["lm_head"] == "gptq"


def test_what_cannot_be_scaled_is_printed(
    tiny: Path, traffic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("scheme: w8a8\nalgorithm: [smoothquant, rtn]\n")
    assert run_cli(arguments(tiny, path, traffic, tmp_path / "out", "--dry-run")) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "scalings 4 inputs, folded into their producers" in shown
    assert "not scaled: lm_head: no scaling folds outside of the blocks" in shown


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (recipe("w8a8", Step("rtn"), Step("awq")), "exactly one solver is needed, behind any"),
        (recipe("w8a8", Step("awq")), "exactly one solver"),
        (recipe("w8a8", Step("smoothquant", {"alpha": 2}), Step("rtn")), "alpha 2: is auto or"),
        (
            recipe("w8a8", Step("smoothquant", {"cost": "fisher"}), Step("rtn")),
            "smoothquant: cost 'fisher': nothing is searched.*set alpha: auto",
        ),
        (
            recipe("w8a8", Step("outliers", {"cost": "fisher", "threshold": 4}), Step("rtn")),
            "outliers: cost 'fisher': nothing is searched.*set threshold: auto",
        ),
        (recipe("w8a8", Step("awq", {"grid": 0}), Step("rtn")), "grid 0: is a whole number"),
        (recipe("w8a8", Step("awq", {"pairs": "x"}), Step("rtn")), "pairs 'x': is norms or all"),
        (
            dataclasses.replace(
                recipe("w4a16-g64", Step("awq"), Step("rtn")),
                rules=(Rule("*.k_proj", SCHEMES["w8a16"], (Step("rtn"),)),),
            ),
            r"q_proj has the rescalers \['awq'\] and .*k_proj \[\], but they read one input",
        ),
    ],
)
def test_refusals(how: Recipe, message: str, tiny: Path) -> None:
    model = models.load_source(str(tiny)).model
    with pytest.raises(UsageError, match=message):
        make_plan(how, model, samples=1, seq_len=8)
