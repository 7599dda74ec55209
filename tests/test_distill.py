"""Training scales and norms: gradients, what is trained, when it is kept, how it resumes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from quantkit import model as models
from quantkit import numerics
from quantkit.algorithms.distill import OPTIONS, ScaledLinear, divergence, levels
from quantkit.algorithms.latent import Weight
from quantkit.calibrate import Calibrated, CalibrationData, calibrate
from quantkit.distill import Distilled, Teacher
from quantkit.errors import UsageError
from quantkit.plan import make_plan
from quantkit.recipe import Recipe, Rule, Step
from quantkit.schemes import SCHEMES, DType, ScaleFormat, Scheme
from quantkit.work import WorkFolder
from tests.conftest import plan_for_tiny, tiny_llama

IDS = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(4))

#: Coarse, so that there is something to gain: a random model overfits its few windows otherwise.
STEP = Step("distill", {"steps": 12, "scale_lr": 0.004})
DISTILLED = Recipe(SCHEMES["w3a16-g64"], algorithm=(Step("rtn"), STEP), keep=("lm_head",))
MOVING = Recipe(
    SCHEMES["w2a16-g32"],
    algorithm=(Step("rtn"), Step("distill", {"steps": 12, "weight_lr": 0.02})),
    keep=("lm_head",),
)

TRAINABLE = [s for s in SCHEMES.values() if s.weight.scale is ScaleFormat.MODEL]


@pytest.mark.parametrize("scheme", TRAINABLE, ids=lambda s: s.name)
def test_a_scales_gradient_is_autograds(scheme: Scheme) -> None:
    """Beside autograd through the dequantization itself, in fp64."""
    torch.manual_seed(0)
    n, k = 24, 384
    q = numerics.quantize_weight(torch.randn(n, k), scheme.weight)
    x = torch.randn(2, 5, k, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(n, dtype=torch.float64)
    dy = torch.randn(2, 5, n, dtype=torch.float64)
    literal = q.scale.double().requires_grad_()
    zero = None if q.zero is None else q.zero.double()
    groups = numerics.to_groups(q.codes.double(), q.spec)
    groups = groups if zero is None else groups - zero.reshape(*groups.shape[:-1], 1)
    weight = numerics.from_groups(
        groups * literal.reshape(*groups.shape[:-1], 1), q.spec, q.codes.shape
    )
    F.linear(x, weight, bias).backward(dy)
    wanted_x, x.grad = x.grad, None
    scale = q.scale.double().requires_grad_()
    y = ScaledLinear.apply(x, scale, weight.detach(), q, bias)
    y.backward(dy)
    assert torch.allclose(y, F.linear(x, weight, bias))
    assert torch.allclose(x.grad, wanted_x)
    # The sum over a group is in fp32.
    assert torch.allclose(scale.grad, literal.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", TRAINABLE, ids=lambda s: s.name)
def test_levels_times_scale_is_the_weight(scheme: Scheme) -> None:
    q = numerics.quantize_weight(torch.randn(24, 384), scheme.weight)
    groups = numerics.to_groups(levels(q).float(), q.spec)
    scaled = groups * q.scale.float().reshape(*groups.shape[:-1], 1)
    assert torch.allclose(
        numerics.from_groups(scaled, q.spec, q.codes.shape),
        numerics.dequantize(q, torch.float32),
    )


def test_divergence_and_its_gradient_are_those_of_the_whole() -> None:
    """In parts of a few tokens, as all at once."""
    torch.manual_seed(0)
    head = torch.randn(50, 8)
    hidden = torch.randn(3, 90, 8, requires_grad=True)
    target = torch.randn(3, 90, 8)

    def predict(h: torch.Tensor) -> torch.Tensor:
        return h @ head.t()

    wanted, found = (predict(h).log_softmax(-1) for h in (target, hidden))
    whole = (wanted.exp() * (wanted - found)).sum()
    (whole * 0.25).backward()
    literal, hidden.grad = hidden.grad, None
    assert divergence(hidden, target, predict, predict, 0.25) == pytest.approx(
        float(whole.detach()), rel=1e-4
    )
    assert torch.allclose(hidden.grad, literal, atol=1e-5)
    assert divergence(hidden.detach(), target, predict, predict) == pytest.approx(
        float(whole.detach()), rel=1e-4
    )
    assert divergence(target, target, predict, predict) == pytest.approx(0, abs=1e-4)
    weights = torch.rand(3, 90)
    hidden.grad = None
    each = (wanted.detach().exp() * (wanted.detach() - predict(hidden).log_softmax(-1))).sum(-1)
    weighted = (each * weights).sum()
    (weighted * 0.25).backward()
    literal, hidden.grad = hidden.grad, None
    found_sum = divergence(hidden, target, predict, predict, 0.25, weights)
    assert found_sum == pytest.approx(float(weighted.detach()), rel=1e-4)
    assert torch.allclose(hidden.grad, literal, atol=1e-5)


def run(
    source: Path, work: Path, recipe: Recipe, **options: object
) -> tuple[models.SourceModel, Calibrated]:
    loaded = models.load_source(str(source))
    plan = make_plan(recipe, loaded.model, samples=len(IDS), seq_len=IDS.shape[1])
    return loaded, calibrate(loaded, plan, CalibrationData(IDS, "hash"), work, **options)  # type: ignore[arg-type]


def distilled(calibrated: Calibrated) -> Distilled:
    assert calibrated.distilled is not None
    return calibrated.distilled


@pytest.fixture(scope="module")
def trained(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[models.SourceModel, Calibrated]:
    return run(tiny, tmp_path_factory.mktemp("distill") / "work", DISTILLED, release=True)


def test_the_divergence_falls_and_codes_stay(
    tiny: Path, tmp_path: Path, trained: tuple[models.SourceModel, Calibrated]
) -> None:
    loaded, calibrated = trained
    assert distilled(calibrated).kept
    assert distilled(calibrated).after < 0.995 * distilled(calibrated).before
    plain = dataclasses.replace(DISTILLED, algorithm=(Step("rtn"),))
    first, solved = run(tiny, tmp_path / "w", plain)
    moved = 0
    for name, layer in solved.layers.items():
        q = calibrated.layers[name].qtensor
        assert torch.equal(q.codes, layer.qtensor.codes)
        assert q.scale.dtype == layer.qtensor.scale.dtype
        moved += int((q.scale != layer.qtensor.scale).sum())
        weight = loaded.model.get_submodule(name).weight
        assert torch.equal(weight, numerics.dequantize(q, weight.dtype))
    assert moved > 0
    norm = "model.layers.0.input_layernorm"
    assert not torch.equal(
        loaded.model.get_submodule(norm).weight, first.model.get_submodule(norm).weight
    )
    # What is left computes as any model does.
    assert not any("forward" in vars(m) for m in models.linear_layers(loaded.model).values())
    assert not any(p.grad is not None for p in loaded.model.parameters())


@pytest.fixture(scope="module")
def moved(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[models.SourceModel, Calibrated]:
    return run(tiny, tmp_path_factory.mktemp("codes") / "work", MOVING, release=True)


@pytest.mark.parametrize("scheme", ["w2a16-g32", "w2a16-g64"])
def test_codes_move_where_they_are_asked_to(scheme: str, tiny: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(MOVING, scheme=SCHEMES[scheme])
    loaded, calibrated = run(tiny, tmp_path / "a", recipe, release=True)
    _, solved = run(tiny, tmp_path / "b", dataclasses.replace(recipe, algorithm=(Step("rtn"),)))
    fixed = Step("distill", {"steps": 12, "weight_lr": 0.0})
    still = dataclasses.replace(recipe, algorithm=(Step("rtn"), fixed))
    scales = distilled(run(tiny, tmp_path / "c", still)[1])
    result = distilled(calibrated)
    assert result.kept
    assert result.before == scales.before
    assert result.after < 0.98 * scales.after
    changed = total = 0
    for name, layer in solved.layers.items():
        q, first = calibrated.layers[name].qtensor, layer.qtensor
        assert q.codes.dtype == first.codes.dtype
        assert int(q.codes.min()) >= q.spec.qmin
        assert int(q.codes.max()) <= q.spec.qmax
        changed, total = changed + int((q.codes != first.codes).sum()), total + q.codes.numel()
        weight = loaded.model.get_submodule(name).weight
        assert torch.equal(weight, numerics.dequantize(q, weight.dtype))
    assert 0 < changed < 0.2 * total
    assert not any(p.grad is not None for p in loaded.model.parameters())


def test_codes_begin_at_the_weights_that_were_solved(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those behind a rescaling, on a resumed run, too."""
    begun: dict[str, torch.Tensor] = {}

    class Watched(Weight):
        def __init__(self, weight: torch.Tensor, start: numerics.QTensor, *, codes: bool) -> None:
            super().__init__(weight, start, codes=codes)
            begun[str(len(begun))] = self.numbers["codes"].clone()
            # What rounds to nearest has its code in the middle of half a step.
            position = weight.float() / start.scale.float().repeat_interleave(32, -1)
            inside = position.abs() < 1.4
            assert (position - start.codes)[inside].abs().max() < 0.51

    monkeypatch.setattr("quantkit.distill.Weight", Watched)
    algorithm = (Step("smoothquant", {"alpha": 0.5}), *MOVING.algorithm)
    recipe = dataclasses.replace(MOVING, algorithm=algorithm)
    run(tiny, tmp_path / "w", recipe)
    first = dict(begun)
    begun.clear()
    (tmp_path / "w" / "distill.safetensors").unlink()
    run(tiny, tmp_path / "w", recipe, resume=True)
    assert first
    assert all(torch.equal(begun[name], position) for name, position in first.items())


def test_the_probe_is_of_the_trained_model(
    trained: tuple[models.SourceModel, Calibrated],
) -> None:
    loaded, calibrated = trained
    with torch.no_grad():
        logits = loaded.model(calibrated.probe.ids).logits
        again = loaded.model.get_output_embeddings()(calibrated.probe.head_input)
    assert torch.equal(logits, again)


@pytest.mark.parametrize("stopped_at", ["blocks", "middle"])
@pytest.mark.parametrize("recipe", [DISTILLED, MOVING], ids=["scales", "codes"])
def test_resumes_to_the_same_bytes(
    recipe: Recipe,
    stopped_at: str,
    tiny: Path,
    tmp_path: Path,
    trained: tuple[models.SourceModel, Calibrated],
    moved: tuple[models.SourceModel, Calibrated],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if killed when half of the blocks were done, or between two steps of training."""
    monkeypatch.setattr("quantkit.distill.SAVE_STEPS_OF_CODES", 10)
    whole = trained if recipe is DISTILLED else moved
    work = tmp_path / "work"
    labels: list[str] = []

    class Killed(Exception):
        pass

    def progress(done: int, total: int, label: str) -> None:
        labels.append(label)
        in_training = sum(x.startswith("distill") for x in labels)
        if in_training == 11 or (stopped_at == "blocks" and label == "block 2/2"):
            raise Killed

    with pytest.raises(Killed):
        run(tiny, work, recipe, progress=progress)
    loaded, resumed = run(tiny, work, recipe, resume=True)
    for name, layer in whole[1].layers.items():
        for part, tensor in layer.qtensor.tensors().items():
            assert torch.equal(resumed.layers[name].qtensor.tensors()[part], tensor)
    for name, parameter in whole[0].model.named_parameters():
        if "norm" in name:
            assert torch.equal(loaded.model.get_parameter(name), parameter)
    assert distilled(resumed).before == distilled(whole[1]).before


@pytest.mark.parametrize("weight_lr", [0.0, 0.5])
def test_what_made_it_worse_is_undone(weight_lr: float, tiny: Path, tmp_path: Path) -> None:
    rates = {"scale_lr": 0.3, "norm_lr": 0.3, "weight_lr": weight_lr}
    wild = Step("distill", {"steps": 8, **rates})
    recipe = dataclasses.replace(DISTILLED, algorithm=(Step("rtn"), wild))
    loaded, calibrated = run(tiny, tmp_path / "a", recipe)
    first, solved = run(
        tiny, tmp_path / "b", dataclasses.replace(DISTILLED, algorithm=(Step("rtn"),))
    )
    result = distilled(calibrated)
    assert not result.kept
    assert result.warning is not None
    assert "was undone: lower `scale_lr`" in result.warning
    for name, layer in solved.layers.items():
        for part, tensor in layer.qtensor.tensors().items():
            assert torch.equal(calibrated.layers[name].qtensor.tensors()[part], tensor)
    for name, parameter in first.model.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter)


def test_layers_under_a_rule_are_left_alone(tiny: Path, tmp_path: Path) -> None:
    rule = Rule("*.down_proj", SCHEMES["w8a8"], (Step("rtn"),))
    recipe = dataclasses.replace(DISTILLED, rules=(rule,))
    _, calibrated = run(tiny, tmp_path / "a", recipe)
    plain = dataclasses.replace(recipe, algorithm=(Step("rtn"),))
    _, solved = run(tiny, tmp_path / "b", plain)
    for name, layer in solved.layers.items():
        same = torch.equal(calibrated.layers[name].qtensor.scale, layer.qtensor.scale)
        assert same == name.endswith("down_proj")


def test_a_model_whose_predictions_are_not_its_heads_product_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    forward = model.forward

    def scaled(*args: object, **kwargs: object) -> object:
        out = forward(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    model.forward = scaled  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="its predictions are not its head's product"):
        Teacher(model, IDS.split(1), WorkFolder(tmp_path / "w", {}))


def test_soft_capped_predictions_are_understood(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config.final_logit_softcapping = 2.0
    forward = model.forward

    def capped(*args: object, **kwargs: object) -> object:
        out = forward(*args, **kwargs)
        out.logits = 2.0 * torch.tanh(out.logits / 2.0)
        return out

    model.forward = capped  # type: ignore[method-assign]
    teacher = Teacher(model, IDS.split(1), WorkFolder(tmp_path / "w", {}))
    with torch.no_grad():
        assert torch.equal(teacher.predict(teacher.hidden[:1]), model(IDS[:1]).logits)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("algorithm: [distill, rtn]", "exactly one solver is needed"),
        ("algorithm: [distill]", "exactly one solver is needed"),
        ("algorithm: [rtn, {distill: {steps: 0}}]", "steps 0: is a whole number from 1"),
        ("algorithm: [rtn, {distill: {scale_lr: 2}}]", "scale_lr 2: is a number from 0 to 0.5"),
        ("algorithm: [rtn, {distill: {seed: -1}}]", "seed -1: is a whole number from 0"),
        ("algorithm: [rtn, {distill: {answers: 0.5}}]", "answers 0.5: is a number from 1 to 1000"),
        ("algorithm: [rtn, {distill: {weight_lr: 1}}]", "weight_lr 1: is a number from 0 to 0.5"),
        (
            "algorithm: [rtn, distill]\nrules: [{match: '*.o_proj', scheme: w4a16-g64, "
            "algorithm: [rtn, {distill: {steps: 3}}]}]",
            "with different options, and it trains the whole model at once",
        ),
    ],
)
def test_lists_that_cannot_run_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_for_tiny(f"scheme: w4a16-g64\nkeep: [lm_head]\n{text}\n")


@pytest.mark.parametrize(
    "name", [s.name for s in SCHEMES.values() if s.weight.scale is not ScaleFormat.MODEL]
)
def test_scales_in_other_formats_are_refused(name: str) -> None:
    assert SCHEMES[name].weight.dtype is DType.FLOAT
    recipe = Recipe(SCHEMES[name], algorithm=(Step("rtn"), STEP), keep=("lm_head",))
    with pytest.raises(UsageError, match="distill trains scales in the model's dtype"):
        make_plan(recipe, tiny_llama(), samples=4, seq_len=16)


def test_codes_that_are_no_integers_do_not_move() -> None:
    step = Step("distill", {"weight_lr": 0.01})
    recipe = Recipe(SCHEMES["fp8"], algorithm=(Step("rtn"), step), keep=("lm_head",))
    with pytest.raises(UsageError, match="distill moves integers where `weight_lr` is above 0"):
        make_plan(recipe, tiny_llama(), samples=4, seq_len=16)


def test_every_option_is_told_in_the_plan() -> None:
    recipe = dataclasses.replace(DISTILLED, algorithm=(Step("rtn"), Step("distill")))
    plan = make_plan(recipe, tiny_llama(), samples=4, seq_len=16)
    told = plan.to_json()["distill"]
    assert told["options"] == OPTIONS
    assert len(told["layers"]) == len(plan.layers)
    assert plan.layers[0].steps == "rtn → distill"
