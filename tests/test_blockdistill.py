"""Scales, zero points, norms and codes trained on a block's output: gradients beside autograd's,
never above the start on windows held back, to the same bytes again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from quantkit import model as models
from quantkit import numerics
from quantkit import reconstruct as training
from quantkit.algorithms.blockdistill import OPTIONS, BlockDistill
from quantkit.algorithms.latent import EDGE, Weight
from quantkit.algorithms.training import Solved
from quantkit.batches import held_back
from quantkit.calibrate import Calibrated
from quantkit.cli.main import run as command_line
from quantkit.errors import UsageError
from quantkit.limits import check_limits
from quantkit.numerics import QTensor
from quantkit.plan import PlannedLayer, make_plan
from quantkit.quantize import QuantizedLayer, Reconstruction
from quantkit.recipe import Recipe, Step
from quantkit.reconstruct import Block, Windows, reconstruct
from quantkit.schemes import SCHEMES, QuantSpec, Scheme
from tests.architectures import build
from tests.conftest import plan_for_tiny, tiny_llama
from tests.reconstruct_helpers import (
    BITS,
    IDS,
    SPECS,
    WITH_INPUTS,
    run,
    same_model,
    starts,
    through,
)
from tests.run_helpers import arguments, contents

#: All that can move does.
RATES = {"scale_lr": 0.01, "norm_lr": 0.01, "zero_lr": 0.05, "weight_lr": 0.05}
FIXED = {**RATES, "zero_lr": 0.0, "weight_lr": 0.0}


def step(**options: object) -> Step:
    return Step("blockdistill", {**OPTIONS, **options})


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_starts_at_the_solvers_result(spec: QuantSpec, dtype: torch.dtype) -> None:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    for start in starts(weight, spec).values():
        for codes in (False, True):
            again = Weight(weight, start, codes=codes).quantized()
            for part, tensor in start.tensors().items():
                assert torch.equal(again.tensors()[part], tensor), part
                assert again.tensors()[part].dtype == tensor.dtype


def test_a_weight_begins_where_the_original_was() -> None:
    """In steps of the code, but for what its solver rounded away from it."""
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(1))
    for symmetric in (True, False):
        spec = QuantSpec(4, symmetric=symmetric)
        start = numerics.quantize_weight(weight, spec)
        zero = 0 if start.zero is None else start.zero.float()
        exact = weight / start.scale + zero
        moved = (Weight(weight, start, codes=True).numbers["codes"] - exact).abs()
        assert float(moved.max()) < EDGE + 1e-3
        assert float((moved > 1e-5).float().mean()) < 0.15


class Normed(nn.Module):
    """The least block that has all kinds: a norm, two layers and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(F.silu(self.up(self.norm(x))))
        return out


def normed(scheme: Scheme, solver: str = "rtn", windows: int = 6) -> tuple[Block, Windows]:
    torch.manual_seed(5)
    module = Normed().requires_grad_(False)
    module.norm.weight.copy_(0.5 + torch.rand(64))
    x = torch.randn(windows, 16, 64) @ torch.randn(64, 64) / 8
    targets = module(x)
    linears = {"up": module.up, "down": module.down}
    originals = {name: layer.weight for name, layer in linears.items()}
    planned, solved = {}, {}
    for name, weight in originals.items():
        q = starts(weight, scheme.weight)[solver]
        shape = (weight.shape[0], weight.shape[1])
        planned[name] = PlannedLayer(name, 0, shape, scheme, solver, reconstructor="blockdistill")
        solved[name] = QuantizedLayer(q, None, 0.0, None)
        linears[name].weight = nn.Parameter(numerics.dequantize(q, weight.dtype), False)
    norms = {"norm": module.norm}
    block = Block(module, module, linears, planned, solved, originals, norms)
    return block, Windows([x[:1], x[1:]], [targets[:1], targets[1:]])


def literal_weight(numbers: dict[str, Tensor], start: QTensor) -> Tensor:
    """The equation of the module's head, straight through every rounding."""
    spec, dtype = start.spec, start.scale.dtype
    scale = through(start.scale.float() * (1 + numbers["scale"]), lambda s: s.to(dtype).float())
    codes = start.codes.float()
    if "codes" in numbers:
        codes = through(numbers["codes"], lambda v: torch.round(v).clamp(spec.qmin, spec.qmax))
    groups = numerics.to_groups(codes, spec)
    if start.zero is not None:
        zero = through(start.zero.float() + numbers["zero"], torch.round)
        groups = groups - zero.reshape(*groups.shape[:-1], 1)
    restored = groups * scale.reshape(*groups.shape[:-1], 1)
    restored = through(restored, lambda w: w.to(dtype).float())
    return numerics.from_groups(restored, spec, start.codes.shape)


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
@pytest.mark.parametrize("rates", [RATES, FIXED], ids=["codes", "scales"])
def test_gradients_are_autograds(spec: QuantSpec, rates: dict[str, float]) -> None:
    """Of every number of a block, at its start and away from it, beside autograd through the plain
    dequantization in fp32."""
    block, windows = normed(Scheme(spec.label(), spec), "gptq")
    starts_of = {name: layer.qtensor for name, layer in block.solved.items()}
    first = block.norms["norm"].weight.detach().clone()
    solved = Solved(block.originals, starts_of, {"norm": first})
    fast = BlockDistill(solved, {**OPTIONS, **rates})
    chosen = torch.tensor([0, 3])
    x = torch.cat(list(windows.inputs))[chosen]
    y = torch.cat(list(windows.targets))[chosen]
    for number in range(3):
        running = training._Running(block)
        with torch.no_grad(), running.active():
            _, gradients = running.differentiate(fast.trained(), windows, chosen)
        leaves = {
            (name, kind): value.detach().clone().requires_grad_()
            for name, weight in fast.weights.items()
            for kind, value in weight.numbers.items()
        }
        change = fast.norms["norm"].detach().clone().requires_grad_()
        weights = {
            name: literal_weight(
                {kind: leaves[name, kind] for kind in weight.numbers}, starts_of[name]
            )
            for name, weight in fast.weights.items()
        }
        norm = first + fast.sizes["norm"] * change
        hidden = F.rms_norm(x, (64,), norm)
        up = F.silu(F.linear(hidden, weights["up"], block.linears["up"].bias))
        out = x + F.linear(up, weights["down"], block.linears["down"].bias)
        F.mse_loss(out, y).backward()
        fast.descend(gradients, number)
        assert {kind for _, kind in leaves} == (
            {"scale"}
            | ({"zero"} if not spec.symmetric else set())
            | ({"codes"} if rates["weight_lr"] else set())
        )
        for (name, kind), leaf in leaves.items():
            found = fast.weights[name].numbers[kind].grad
            torch.testing.assert_close(found, leaf.grad, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(fast.norms["norm"].grad, change.grad, rtol=1e-3, atol=1e-7)


def test_the_first_step_is_each_kinds_rate() -> None:
    """Adam's: the sign of the gradient, as far as the warm-up lets it."""
    spec = QuantSpec(3, symmetric=False)
    weight, norm = torch.randn(8, 32), torch.rand(32)
    start = numerics.quantize_weight(weight, spec)
    trained = BlockDistill(
        Solved({"w": weight}, {"w": start}, {"n": norm}),
        {**OPTIONS, "scale_lr": 0.01, "norm_lr": 0.02, "zero_lr": 0.03, "weight_lr": 0.04},
    )
    before = {k: v.clone() for k, v in trained.weights["w"].numbers.items()}
    trained.descend({"w": torch.randn(8, 32), "n": torch.randn(32)}, 0)
    numbers = trained.weights["w"].numbers
    for kind, rate in (("scale", 0.01), ("zero", 0.03), ("codes", 0.04)):
        grad = numbers[kind].grad
        assert grad is not None
        wanted = (before[kind] - 0.2 * rate * grad.sign()).clamp(
            *((spec.qmin - 0.5, spec.qmax + 0.5) if kind == "codes" else (-9, 9))
        )
        inside = torch.ones_like(wanted, dtype=torch.bool)
        if kind == "zero":  # stays within the codes
            assert start.zero is not None
            shifted = start.zero.float() + wanted
            inside = (shifted >= spec.qmin) & (shifted <= spec.qmax)
        torch.testing.assert_close(numbers[kind][inside], wanted[inside], rtol=1e-4, atol=1e-6)
    assert float(trained.norms["n"].abs().max()) == pytest.approx(0.2 * 0.02, rel=1e-3)


def test_gemmas_norms_move_as_others_do() -> None:
    """1 + w is to w what w is elsewhere."""
    torch.manual_seed(0)
    whole, slopes = 0.5 + torch.rand(16), torch.randn(5, 16)
    found = []
    for offset in (0.0, 1.0):
        solved = Solved({}, {}, {"n": whole - offset}, offset)
        trained = BlockDistill(solved, {**OPTIONS, "norm_lr": 0.05})
        for number, slope in enumerate(slopes):
            trained.descend({"n": slope}, number)
        found.append(trained.trained().norms["n"] + offset)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    assert float((found[0] - whole).abs().min()) > 0


def held_error(module: nn.Module, windows: Windows, seed: int) -> float:
    """Of the windows that are held back."""
    held, _ = held_back(len(windows), seed)
    x, y = (torch.cat(list(parts))[held] for parts in (windows.inputs, windows.targets))
    return float((module(x) - y).square().mean((1, 2)).mean())


def outcome(result: training.Reconstructed) -> Reconstruction:
    done = result.layers["up"].reconstruction
    assert done is not None
    return done


@pytest.mark.parametrize("scheme", [*BITS, WITH_INPUTS], ids=lambda s: s.name)
@pytest.mark.parametrize("rates", [RATES, FIXED], ids=["codes", "scales"])
def test_a_blocks_error_falls(scheme: Scheme, rates: dict[str, float]) -> None:
    block, windows = normed(scheme, windows=18)
    first = held_error(block.module, windows, 0)
    result = reconstruct(block, windows, step(**rates, steps=40, windows=3), seed=0)
    done = outcome(result)
    assert done.steps == 40
    if scheme.input is None:
        assert done.start_loss == pytest.approx(first, rel=1e-4)
        assert done.loss == pytest.approx(held_error(block.module, windows, 0), rel=1e-4)
    if scheme.weight.bits < 8:
        assert done.loss < 0.95 * done.start_loss
    assert torch.equal(block.norms["norm"].weight, result.norms["norm"])
    assert not block.norms["norm"].weight.requires_grad
    for name, layer in result.layers.items():
        assert torch.equal(
            block.linears[name].weight, numerics.dequantize(layer.qtensor, torch.float32)
        )
        if rates is FIXED:
            assert torch.equal(layer.qtensor.codes, block.solved[name].qtensor.codes)
        assert layer.output_error is not None
        assert "forward" not in vars(block.linears[name])


@settings(max_examples=12, deadline=None)
@given(
    scheme=st.sampled_from(BITS),
    solver=st.sampled_from(["rtn", "gptq"]),
    exponents=st.tuples(*[st.integers(-4, 0) for _ in range(4)]),
    seed=st.integers(0, 99),
)
def test_a_block_never_ends_above_its_start(
    scheme: Scheme, solver: str, exponents: tuple[int, ...], seed: int
) -> None:
    block, windows = normed(scheme, solver)
    weights = {name: layer.weight.clone() for name, layer in block.linears.items()}
    rates = {key: 0.5 * 10.0**e for key, e in zip(RATES, exponents, strict=True)}
    result = reconstruct(block, windows, step(**rates, steps=6, seed=seed), seed=seed)
    done = outcome(result)
    assert done.loss <= done.start_loss
    assert done.loss == pytest.approx(held_error(block.module, windows, seed), rel=1e-4)
    if done.loss == done.start_loss:
        for name, layer in block.linears.items():
            assert torch.equal(layer.weight, weights[name])


def test_windows_that_are_held_back_are_never_trained_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block, windows = normed(BITS[0], windows=33)
    seen: set[int] = set()
    loss = Windows.loss

    def record(self: Windows, run: object, chosen: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            seen.update(chosen.tolist())
        return loss(self, run, chosen)  # type: ignore[arg-type]

    monkeypatch.setattr(Windows, "loss", record)
    reconstruct(block, windows, step(steps=40, windows=4, seed=3), seed=8)
    held, trained = held_back(33, 3)
    assert len(held) == 2
    assert seen == set(trained.tolist())


def test_zero_points_move_with_a_rate_of_their_own() -> None:
    scheme = next(s for s in BITS if not s.weight.symmetric and s.weight.bits == 4)
    moved = []
    for rate in (0.0, 0.2):
        block, windows = normed(scheme)
        trained = BlockDistill(
            Solved(block.originals, {n: x.qtensor for n, x in block.solved.items()}),
            {**OPTIONS, "zero_lr": rate},
        )
        running = training._Running(block)
        with torch.no_grad(), running.active():
            for number in range(10):
                chosen = torch.tensor([number % 6])
                _, gradients = running.differentiate(trained.trained(), windows, chosen)
                trained.descend(gradients, number)
        now, before = trained.trained().layers["up"].zero, block.solved["up"].qtensor.zero
        assert now is not None
        assert before is not None
        assert now.dtype == before.dtype
        assert int(now.min()) >= scheme.weight.qmin
        assert int(now.max()) <= scheme.weight.qmax
        moved.append(int((now != before).sum()))
    assert moved[0] == 0 < moved[1]


STEP = Step("blockdistill", {"steps": 12, "windows": 2, "scale_lr": 0.01, "norm_lr": 0.01})
TRAINED = Recipe(SCHEMES["w3a16-g64"], algorithm=(Step("rtn"), STEP), keep=("lm_head",))
NORMS = ("input_layernorm", "post_attention_layernorm")


@pytest.fixture(scope="module")
def trained(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[models.SourceModel, Calibrated]:
    return run(tiny, tmp_path_factory.mktemp("blockdistill") / "work", TRAINED)


def test_codes_stay_and_norms_move(
    tiny: Path, tmp_path: Path, trained: tuple[models.SourceModel, Calibrated]
) -> None:
    loaded, calibrated = trained
    plain = dataclasses.replace(TRAINED, algorithm=(Step("rtn"),))
    first, solved = run(tiny, tmp_path / "w", plain)
    for name, layer in solved.layers.items():
        q = calibrated.layers[name].qtensor
        done = calibrated.layers[name].reconstruction
        assert done is not None
        assert done.loss < done.start_loss
        if name.startswith("model.layers.0."):  # the second block's inputs are others
            assert torch.equal(q.codes, layer.qtensor.codes)
            assert not torch.equal(q.scale, layer.qtensor.scale)
    for norm in (f"model.layers.{i}.{name}" for i in range(2) for name in NORMS):
        weight = loaded.model.get_submodule(norm).weight
        assert not torch.equal(weight, first.model.get_submodule(norm).weight)
    # The last norm belongs to no block.
    assert torch.equal(loaded.model.model.norm.weight, first.model.model.norm.weight)
    assert not any("forward" in vars(m) for m in models.linear_layers(loaded.model).values())


@pytest.mark.slow
def test_norms_behind_a_scaling_and_a_distillation(tiny: Path, tmp_path: Path) -> None:
    """What a rescaler folded is trained on, and what was trained is what distillation begins with;
    a run that was killed in between ends in the same bytes."""
    chain = (Step("awq", {"grid": 2}), Step("rtn"), STEP, Step("distill", {"steps": 3}))
    recipe = dataclasses.replace(TRAINED, algorithm=chain)
    loaded, _ = run(tiny, tmp_path / "a", recipe)

    class Killed(Exception):
        pass

    def progress(done: int, total: int, label: str) -> None:
        if label.startswith("distill"):
            raise Killed

    with pytest.raises(Killed):
        run(tiny, tmp_path / "b", recipe, progress=progress)
    resumed, _ = run(tiny, tmp_path / "b", recipe, resume=True)
    assert same_model(loaded, resumed)


def test_a_rate_of_zero_leaves_norms(tiny: Path, tmp_path: Path) -> None:
    still = Step("blockdistill", {**STEP.options, "norm_lr": 0})
    loaded, calibrated = run(
        tiny, tmp_path / "w", dataclasses.replace(TRAINED, algorithm=(Step("rtn"), still))
    )
    original = models.load_source(str(tiny)).model
    for name, norm in models.norms(loaded.model).items():
        assert torch.equal(norm.weight, original.get_submodule(name).weight)
    assert next(iter(calibrated.layers.values())).reconstruction is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("algorithm: [blockdistill]", "exactly one solver is needed"),
        ("algorithm: [rtn, signround, blockdistill]", "exactly one solver is needed"),
        ("algorithm: [rtn, blockdistill, signround]", "exactly one solver is needed"),
        ("algorithm: [rtn, distill, blockdistill]", "exactly one solver is needed"),
        ("algorithm: [rtn, {blockdistill: {steps: 0}}]", "steps 0: is a whole number from 1"),
        ("algorithm: [rtn, {blockdistill: {weight_lr: 1}}]", "weight_lr 1: is a number from 0"),
        ("algorithm: [rtn, {blockdistill: {zero_lr: auto}}]", "zero_lr 'auto': is a number"),
        ("algorithm: [rtn, {blockdistill: {patience: 1}}]", "unknown option 'patience'"),
        (
            "algorithm: [rtn, blockdistill]\nrules: [{match: '*.o_proj', scheme: w4a16-g64, "
            "algorithm: [rtn, {blockdistill: {steps: 3}}]}]",
            "with different options, and it trains a whole block at once",
        ),
        (
            "algorithm: [rtn, blockdistill]\nrules: [{match: '*.o_proj', scheme: w4a16-g64, "
            "algorithm: [rtn, signround]}]",
            "asks for blockdistill and .* for signround, and either trains a whole block at once",
        ),
    ],
)
def test_lists_that_cannot_run_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_for_tiny(f"scheme: w4a16-g64\nkeep: [lm_head]\n{text}\n")


@pytest.mark.parametrize(
    ("kind", "reason"), [("bert", "in causal models only"), ("mixtral", "has no gradient")]
)
def test_encoders_and_experts_are_refused(kind: str, reason: str) -> None:
    recipe = dataclasses.replace(TRAINED, keep=("lm_head",) if kind == "mixtral" else ())
    model = build(kind)
    model.config.architectures = [type(model).__name__]  # as a saved one's says
    models.linearize(model)
    with pytest.raises(UsageError, match=f"blockdistill: .*{reason}"):
        make_plan(recipe, model, samples=4, seq_len=16)


def test_one_window_cannot_be_held_back() -> None:
    model = tiny_llama()
    plan = make_plan(TRAINED, model, samples=1, seq_len=16)
    with pytest.raises(UsageError, match=r"blockdistill holds windows back .* there is one in all"):
        check_limits(plan, model, [IDS[:1, :16]])
    check_limits(plan, model, [IDS[:2, :16]])


def test_the_plan_tells_every_option() -> None:
    steps = (Step("awq"), Step("gptq"), Step("blockdistill"), Step("distill"))
    plan = make_plan(
        dataclasses.replace(TRAINED, algorithm=steps), tiny_llama(), samples=4, seq_len=16
    )
    told = plan.to_json()["blockdistill"]
    assert told["options"] == OPTIONS
    assert len(told["layers"]) == len(plan.layers)
    assert plan.to_json()["signround"] is None
    assert plan.layers[-1].steps.endswith("gptq → blockdistill → distill")


@pytest.mark.slow
def test_a_whole_run_exports_what_was_trained_and_makes_it_again(
    tiny: Path, traffic: Path, tmp_path: Path, recipe: Path
) -> None:
    """Norms and codes of the reloaded checkpoint, which the run holds against memory; rebuilt from
    its manifest to the same bytes."""
    rates = "scale_lr: 0.01, norm_lr: 0.01, weight_lr: 0.02"
    text = f"algorithm: [rtn, {{blockdistill: {{steps: 20, {rates}}}}}]"
    recipe.write_text(recipe.read_text().replace("algorithm: gptq", text))
    out = tmp_path / "out"
    assert command_line(arguments(tiny, recipe, traffic, out)) == 0
    manifest = json.loads(contents(out)["quantkit.json"])
    assert all(x["steps"] == "rtn → blockdistill" for x in manifest["layers"].values())
    done = [x["reconstruction"] for x in manifest["layers"].values()]
    assert all(x["steps"] == 20 and x["loss"] <= x["start_loss"] for x in done)
    assert min(x["loss"] / x["start_loss"] for x in done) < 1
    stored, original = (load_file(folder / "model.safetensors") for folder in (out, tiny))
    norms = [f"model.layers.{i}.{name}.weight" for i in range(2) for name in NORMS]
    assert any(not torch.equal(stored[name], original[name]) for name in norms)
    again = ["verify", str(out), "--rebuild", "--model", str(tiny), "--data", str(traffic)]
    assert command_line(again) == 0
