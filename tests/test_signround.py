"""Signed gradient descent on the rounding of a block: beside its literal form, never above its
start, to the same bytes again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantkit import model as models
from quantkit import numerics
from quantkit.algorithms.signround import OPTIONS, Rounding
from quantkit.algorithms.training import window_losses
from quantkit.calibrate import Calibrated
from quantkit.cli.main import run as command_line
from quantkit.errors import UsageError
from quantkit.numerics import QTensor
from quantkit.plan import PlannedLayer, make_plan
from quantkit.quantize import QuantizedLayer
from quantkit.recipe import Recipe, Step
from quantkit.reconstruct import Block, Windows, reconstruct
from quantkit.schemes import SCHEMES, QuantSpec, Scheme
from tests.conftest import plan_for_tiny, tiny_llama
from tests.reconstruct_helpers import BITS, IDS, SPECS, WITH_INPUTS, run, starts, through
from tests.run_helpers import arguments, contents


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_starts_at_the_solvers_result(spec: QuantSpec, dtype: torch.dtype) -> None:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    for start in starts(weight, spec).values():
        again = Rounding(weight, start).quantized()
        for part, tensor in start.tensors().items():
            assert torch.equal(again.tensors()[part], tensor), part
            assert again.tensors()[part].dtype == tensor.dtype


def test_from_round_to_nearest_the_weight_stays_as_it_is() -> None:
    """As in the paper, up to ties that bf16 breaks in its own way."""
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(1))
    for symmetric in (True, False):
        spec = QuantSpec(4, symmetric=symmetric)
        rounding = Rounding(weight, numerics.quantize_weight(weight, spec))
        moved = (rounding.weight.reshape(weight.shape) - weight).abs()
        assert float((moved > 0).float().mean()) < 0.01
        assert float(moved.max()) < 1e-2


class Literal:
    """The paper's equations through autograd, straight through every rounding."""

    def __init__(self, weight: Tensor, start: QTensor) -> None:
        fast = Rounding(weight, start)
        self.start, self.weight = start, fast.weight
        self.first = start.scale.float().unsqueeze(-1)
        self.zero = 0.0 if start.zero is None else start.zero.float().unsqueeze(-1)
        self.widest, _ = numerics.compute_scales(
            *numerics.value_range(weight.float(), start.spec), start.spec
        )
        self.offsets = torch.zeros_like(self.weight).requires_grad_()
        self.alpha = torch.ones_like(self.first).requires_grad_()
        self.beta = torch.ones_like(self.first).requires_grad_()

    def dequantized(self) -> Tensor:
        spec, dtype = self.start.spec, self.start.scale.dtype
        low = (spec.qmin - self.zero) * self.beta
        high = (spec.qmax - self.zero) * self.alpha
        zero: Tensor | float = 0.0
        if spec.symmetric:
            scale = through((self.first * self.alpha), lambda s: s.to(dtype).float())
        else:
            steps = spec.qmax - spec.qmin
            grown = self.first * ((high - low) / steps)
            scale = through(grown, lambda s: s.to(dtype).float())
            raw = spec.qmin - low * (self.first / scale)
            zero = through(raw, torch.round).clamp(spec.qmin, spec.qmax)
        codes = through(self.weight / scale + zero + self.offsets, torch.round)
        codes = codes.clamp(spec.qmin, spec.qmax)
        restored = through(scale * (codes - zero), lambda w: w.to(dtype).float())
        return numerics.from_groups(restored, spec, self.start.codes.shape)

    def step(self, rate: float, range_rate: float) -> None:
        limit = (self.widest.unsqueeze(-1) / self.first.abs()).clamp_min(1.0)
        with torch.no_grad():
            assert self.offsets.grad is not None
            self.offsets -= rate * self.offsets.grad.sign()
            self.offsets.clamp_(-0.5, 0.5)
            for share in (self.alpha, self.beta):
                if share.grad is not None:
                    share -= range_rate * share.grad.sign()
                    share.copy_(torch.minimum(share.clamp(min=0.1), limit))
        self.offsets.grad = self.alpha.grad = self.beta.grad = None


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
@pytest.mark.parametrize("solver", ["rtn", "mse", "gptq"])
def test_steps_are_the_papers(spec: QuantSpec, solver: str) -> None:
    """The same codes, scales and zero points, step by step, on the output of one layer."""
    torch.manual_seed(3)
    weight = torch.randn(20, 96)
    x = torch.randn(64, 96) @ torch.randn(96, 96) / 10
    target = x @ weight.t()
    start = starts(weight, spec)[solver]
    fast, slow = Rounding(weight, start), Literal(weight, start)
    for step in range(12):
        rate, range_rate = 0.08 * (1 - step / 12), 0.01 * (1 - step / 12)
        restored = slow.dequantized()
        F.mse_loss(x @ restored.t(), target).backward()
        now = fast.quantized()
        assert torch.equal(numerics.dequantize(now, torch.float32), restored.detach())
        leaf = restored.detach().requires_grad_()
        F.mse_loss(x @ leaf.t(), target).backward()
        assert leaf.grad is not None
        fast.descend(leaf.grad, rate, range_rate)
        slow.step(rate, range_rate)
    assert int((fast.quantized().codes != start.codes).sum()) > 0


def test_the_loss_weighs_tokens_and_channels() -> None:
    torch.manual_seed(0)
    out, target = torch.randn(2, 3, 4, 6).unbind()
    weights = torch.rand(3, 4)
    factor = torch.randn(6, 6)
    whole = factor @ factor.t()
    blocks = [whole[:4, :4], whole[4:, 4:]]
    wanted = torch.zeros(3)
    for b in range(3):
        for t in range(4):
            e = out[b, t] - target[b, t]
            cost = e[:4] @ blocks[0] @ e[:4] + e[4:] @ blocks[1] @ e[4:]
            wanted[b] += weights[b, t] * cost / 6 / 4
    torch.testing.assert_close(window_losses(out, target, weights, blocks), wanted)
    plain = (out - target).square().mean((1, 2))
    torch.testing.assert_close(window_losses(out, target), plain)


class TwoLayers(nn.Module):
    """The least that is a block: two layers, something between, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(F.silu(self.up(x)))
        return out


def two_layers(scheme: Scheme, solver: str = "rtn") -> tuple[Block, Windows]:
    torch.manual_seed(5)
    module = TwoLayers().requires_grad_(False)
    windows = torch.randn(6, 16, 64) @ torch.randn(64, 64) / 8
    targets = module(windows)
    linears = {"up": module.up, "down": module.down}
    originals = {name: layer.weight for name, layer in linears.items()}
    planned, solved = {}, {}
    for name, weight in originals.items():
        q = starts(weight, scheme.weight)[solver]
        shape = (weight.shape[0], weight.shape[1])
        planned[name] = PlannedLayer(name, 0, shape, scheme, solver, reconstructor="signround")
        solved[name] = QuantizedLayer(q, None, 0.0, None)
        linears[name].weight = nn.Parameter(numerics.dequantize(q, weight.dtype), False)
    block = Block(module, module, linears, planned, solved, originals)
    return block, Windows([windows[:1], windows[1:]], [targets[:1], targets[1:]])


def error_of(module: nn.Module, windows: Windows) -> float:
    pairs = zip(windows.inputs, windows.targets, strict=True)
    total = sum(float((module(x) - y).square().mean((1, 2)).sum()) for x, y in pairs)
    return total / len(windows)


@pytest.mark.parametrize("scheme", [*BITS, WITH_INPUTS], ids=lambda s: s.name)
@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_a_blocks_error_falls(scheme: Scheme, solver: str) -> None:
    block, windows = two_layers(scheme, solver)
    first = error_of(block.module, windows)
    options = {**OPTIONS, "steps": 40, "windows": 3}
    result = reconstruct(block, windows, Step("signround", options), seed=0).layers
    done = result["up"].reconstruction
    assert done is not None
    assert done.steps == 40
    if scheme.input is None:
        assert done.start_loss == pytest.approx(first, rel=1e-4)
        assert done.loss == pytest.approx(error_of(block.module, windows), rel=1e-4)
    assert done.loss <= done.start_loss
    if solver == "rtn" and scheme.weight.bits < 8:
        assert done.loss < 0.9 * done.start_loss
    for name, layer in result.items():
        stored = numerics.dequantize(layer.qtensor, torch.float32)
        assert torch.equal(block.linears[name].weight, stored)
        assert layer.output_error is not None
        assert "forward" not in vars(block.linears[name])


def test_a_block_that_gets_no_better_stays_as_it_was() -> None:
    block, windows = two_layers(BITS[4], "gptq")
    weights = {name: layer.weight.clone() for name, layer in block.linears.items()}
    options = {**OPTIONS, "steps": 3, "lr": 0.5, "range_lr": 0.5}
    result = reconstruct(block, windows, Step("signround", options), seed=0).layers
    done = result["up"].reconstruction
    assert done is not None
    assert done.loss == done.start_loss
    for name, layer in result.items():
        assert torch.equal(layer.qtensor.codes, block.solved[name].qtensor.codes)
        assert torch.equal(block.linears[name].weight, weights[name])


def test_patience_ends_a_block_early() -> None:
    block, windows = two_layers(BITS[4], "gptq")
    options = {**OPTIONS, "steps": 50, "lr": 0.5, "range_lr": 0.5, "patience": 4}
    said: list[str] = []
    result = reconstruct(
        block, windows, Step("signround", options), seed=0, advance=said.append
    ).layers
    done = result["up"].reconstruction
    assert done is not None
    assert done.steps == len(said) < 50


def test_the_order_of_windows_is_seeded() -> None:
    options = {**OPTIONS, "steps": 6, "windows": 2}
    codes = []
    for seed in (0, 0, 1):
        block, windows = two_layers(BITS[2])
        codes.append(
            reconstruct(block, windows, Step("signround", options), seed=seed)
            .layers["up"]
            .qtensor.codes
        )
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


STEP = Step("signround", {"steps": 12, "windows": 4})
TRAINED = Recipe(SCHEMES["w3a16-g64"], algorithm=(Step("rtn"), STEP), keep=("lm_head",))


@pytest.fixture(scope="module")
def trained(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[models.SourceModel, Calibrated]:
    return run(tiny, tmp_path_factory.mktemp("signround") / "work", TRAINED)


def test_blocks_come_nearer_to_the_original(
    tiny: Path, tmp_path: Path, trained: tuple[models.SourceModel, Calibrated]
) -> None:
    """What the second block gives, beside the original's, in an ordinary forward pass."""
    loaded, calibrated = trained
    plain = dataclasses.replace(TRAINED, algorithm=(Step("rtn"),))
    nearest, _ = run(tiny, tmp_path / "w", plain)
    with torch.no_grad():
        wanted = models.load_source(str(tiny)).model(IDS, output_hidden_states=True)
        errors = [
            float(
                (s.model(IDS, output_hidden_states=True).hidden_states[1] - wanted.hidden_states[1])
                .float()
                .square()
                .mean()
            )
            for s in (loaded, nearest)
        ]
    name = "model.layers.0.mlp.down_proj"
    done = calibrated.layers[name].reconstruction
    assert done is not None
    assert errors[0] < 0.9 * errors[1]
    assert done.loss == pytest.approx(errors[0], rel=0.02)
    assert done.start_loss == pytest.approx(errors[1], rel=0.02)
    weight = loaded.model.get_submodule(name).weight
    assert torch.equal(weight, numerics.dequantize(calibrated.layers[name].qtensor, weight.dtype))


def test_gptqs_fisher_weights_weigh_the_blocks_error(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens and channels as the layer that writes the block's output weighs them; targets are the
    unquantized model's."""
    seen: list[Windows] = []
    losses = Windows.losses

    def record(self: Windows, run: object) -> Tensor:
        seen.append(dataclasses.replace(self, targets=list(self.targets)))
        return losses(self, run)  # type: ignore[arg-type]

    monkeypatch.setattr(Windows, "losses", record)
    solver = Step("gptq", {"fisher": 0.5, "outputs": "coupled", "feedback": 0.5})
    how = dataclasses.replace(TRAINED, algorithm=(solver, STEP))
    run(tiny, tmp_path / "w", how)
    with torch.no_grad():
        wanted = models.load_source(str(tiny)).model(IDS, output_hidden_states=True)
    first = seen[0]
    torch.testing.assert_close(torch.cat(list(first.targets)), wanted.hidden_states[1])
    assert first.weights is not None
    assert first.weights.shape == IDS.shape
    assert float(first.weights.mean()) == pytest.approx(1, rel=1e-3)
    assert float(first.weights.std()) > 0
    assert sum(len(block) for block in first.metric) == 384


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("algorithm: [signround]", "exactly one solver is needed"),
        ("algorithm: [signround, rtn]", "exactly one solver is needed"),
        ("algorithm: [rtn, distill, signround]", "exactly one solver is needed"),
        ("algorithm: [rtn, {signround: {steps: 0}}]", "steps 0: is a whole number from 1"),
        ("algorithm: [rtn, {signround: {lr: 2}}]", "lr 2: is auto or a number from 0 to 0.5"),
        ("algorithm: [rtn, {signround: {patience: -1}}]", "patience -1: is a whole number from 0"),
        (
            "algorithm: [rtn, signround]\nrules: [{match: '*.o_proj', scheme: w4a16-g64, "
            "algorithm: [rtn, {signround: {steps: 3}}]}]",
            "with different options, and it trains a whole block at once",
        ),
    ],
)
def test_lists_that_cannot_run_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_for_tiny(f"scheme: w4a16-g64\nkeep: [lm_head]\n{text}\n")


def test_the_plan_tells_every_option() -> None:
    steps = (Step("awq"), Step("gptq"), Step("signround"), Step("distill"))
    plan = make_plan(
        dataclasses.replace(TRAINED, algorithm=steps), tiny_llama(), samples=4, seq_len=16
    )
    told = plan.to_json()["signround"]
    assert told["options"] == OPTIONS
    assert len(told["layers"]) == len(plan.layers)
    assert plan.layers[-1].steps.endswith("gptq → signround → distill")
    assert plan.needs_data


def test_a_whole_run_exports_what_was_trained(
    tiny: Path, traffic: Path, tmp_path: Path, recipe: Path
) -> None:
    """The reloaded checkpoint, which the run holds against memory, is the trained one; again, to
    the same bytes."""
    text = "algorithm: [rtn, {signround: {steps: 30, windows: 4}}]"
    recipe.write_text(recipe.read_text().replace("algorithm: gptq", text))
    runs = []
    for name in ("a", "b"):
        assert command_line(arguments(tiny, recipe, traffic, tmp_path / name)) == 0
        runs.append(contents(tmp_path / name))
    assert runs[0] == runs[1]
    manifest = json.loads(runs[0]["quantkit.json"])
    assert all(x["steps"] == "rtn → signround" for x in manifest["layers"].values())
    done = [x["reconstruction"] for x in manifest["layers"].values()]
    assert all(x["steps"] == 30 and x["loss"] <= x["start_loss"] for x in done)
    assert min(x["loss"] / x["start_loss"] for x in done) < 1
