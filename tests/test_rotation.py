"""Rotations: the model's function stays, outliers go, and a run with one resumes to the byte."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quantkit import model as models
from quantkit.algorithms.rotate import Rotation, turned
from quantkit.calibrate import CalibrationData, calibrate
from quantkit.cli.main import run as run_cli
from quantkit.errors import QuantkitError, UsageError
from quantkit.models.load import load_runtime
from quantkit.plan import make_plan
from quantkit.recipe import Recipe, Rule, Step
from quantkit.rotation import STREAMS, PlannedRotation, rotate_block, rotate_ends
from quantkit.schemes import SCHEMES
from tests.conftest import tiny_llama
from tests.run_helpers import arguments, contents
from tests.test_folding import VARIANTS, logits, make, relative

BOTH = PlannedRotation(residual=True, heads=True, seed=0)


def rotated(model: PreTrainedModel, rotation: PlannedRotation) -> PreTrainedModel:
    models.untie(model)
    rotate_ends(model, rotation)
    for index in range(model.config.num_hidden_layers):
        rotate_block(model, index, rotation)
    return model


def folds(kind: str) -> PlannedRotation:
    """Everything that an architecture takes."""
    streams = STREAMS[kind]
    return replace(BOTH, residual=not streams.no_residual, heads=not streams.no_heads)


# The function


def test_every_architecture_has_a_variant() -> None:
    assert {kind for kind, _ in VARIANTS} == set(STREAMS)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("kind", "extra"), VARIANTS)
def test_the_function_stays(kind: str, extra: dict, seed: int) -> None:  # type: ignore[type-arg]
    model = make(kind, extra)
    before = logits(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    rotation = replace(folds(kind), seed=seed)
    rotated(model, rotation)
    for name, old in weights.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and "proj" in layer and rotation.turns(layer, model):
            assert not torch.equal(model.get_parameter(name), old), name
    after = logits(model)
    assert relative(after, before) < 1e-5
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("option", ["residual", "heads"])
def test_each_rotation_alone_keeps_the_function(option: str) -> None:
    model = make("qwen3", {"head_dim": 16, "tie_word_embeddings": True})
    before = logits(model)
    rotated(model, replace(BOTH, **{"residual": False, "heads": False, option: True}))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize(("kind", "extra"), VARIANTS)
def test_sixteen_bit_weights_are_rounded_once(
    kind: str,
    extra: dict,  # type: ignore[type-arg]
    dtype: torch.dtype,
    rounding: float,
) -> None:
    """The function of the 16-bit weights, computed in fp32, so that only they are rounded."""
    before = logits(make(kind, extra, dtype).float())
    model = rotated(make(kind, extra, dtype), folds(kind))
    assert relative(logits(model.float()), before) < 4 * rounding


def test_a_size_without_a_hadamard_matrix_is_rotated_in_blocks() -> None:
    model = make("llama", {"hidden_size": 66, "head_dim": 6, "num_hidden_layers": 1})
    assert Rotation.random(66, 0, "here").order == 2
    before = logits(model)
    torch.testing.assert_close(logits(rotated(model, BOTH)), before, rtol=0, atol=1e-4)


def test_outliers_are_spread() -> None:
    model = make("llama", {"hidden_size": 96, "head_dim": 8})
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[5] = 30.0

    def input_kurtosis() -> float:
        seen: list[Tensor] = []
        layer = model.model.layers[1].self_attn.q_proj
        hook = layer.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        logits(model)
        hook.remove()
        x = seen[0].flatten(0, -2)
        return float((x.pow(4).mean(1) / x.square().mean(1).square()).mean())

    before = input_kurtosis()
    rotated(model, BOTH)
    assert before > 10  # 3 is the normal distribution's
    assert input_kurtosis() < 4
    assert torch.equal(model.model.layers[1].input_layernorm.weight, torch.ones(96))
    assert torch.equal(model.model.norm.weight, torch.ones(96))


# The rotations


def test_a_rotation_is_orthogonal_and_follows_seed_and_place() -> None:
    eye = torch.eye(48, dtype=torch.float64)
    one = Rotation.random(48, 0, "here").turn(eye)
    torch.testing.assert_close(one @ one.t(), eye, rtol=0, atol=1e-12)
    assert torch.equal(one, Rotation.random(48, 0, "here").turn(eye))
    assert not torch.equal(one, Rotation.random(48, 1, "here").turn(eye))
    assert not torch.equal(one, Rotation.random(48, 0, "there").turn(eye))


def test_a_turned_weight_is_the_literal_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.algorithms.rotate.ROWS", 5)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 36, generator=generator)
    scale = torch.rand(36, generator=generator, dtype=torch.float64) + 0.5
    reads, writes = Rotation.random(36, 0, "a"), Rotation.random(12, 0, "b")
    q = reads.turn(torch.eye(36, dtype=torch.float64))
    p = torch.block_diag(*[writes.turn(torch.eye(12, dtype=torch.float64))] * 2)
    wanted = (weight.double() * scale) @ q
    got = turned(weight, scale=scale, inputs=reads)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)
    got = turned(weight, scale=scale, inputs=reads, outputs=writes)
    torch.testing.assert_close(got.double(), p.t() @ wanted, rtol=1e-6, atol=1e-6)
    got = turned(weight, outputs=writes)
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), p.t() @ weight.double(), rtol=1e-6, atol=1e-6)


def test_a_weight_that_is_not_finite_is_an_error() -> None:
    model = make("llama", {})
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(QuantkitError, match=r"layers\.1\.mlp\.up_proj: the rotated weight is not"):
        rotated(model, BOTH)


# In a run

IDS = torch.randint(0, 256, (5, 48), generator=torch.Generator().manual_seed(4))


def recipe(*steps: Step, scheme: str = "w4a16-g64", keep: tuple[str, ...] = ("lm_head",)) -> Recipe:
    return Recipe(SCHEMES[scheme], algorithm=steps, keep=keep)


def run(source: Path, work: Path, how: Recipe, **options: object) -> tuple[PreTrainedModel, dict]:  # type: ignore[type-arg]
    loaded = models.load_source(str(source))
    plan = make_plan(how, loaded.model, samples=len(IDS), seq_len=IDS.shape[1])
    done = calibrate(loaded, plan, CalibrationData(IDS, "hash"), work, **options)  # type: ignore[arg-type]
    return loaded.model, done.layers


@pytest.mark.parametrize(
    "steps",
    [
        (Step("rotate"), Step("rtn")),
        (Step("rotate", {"seed": 3, "mlp": True}), Step("awq"), Step("gptq", {"feedback": 0.5})),
    ],
)
@pytest.mark.parametrize("kept_blocks", [0, 1, 2])
def test_resume_gives_the_same_bytes(
    steps: tuple[Step, ...], kept_blocks: int, tiny: Path, tmp_path: Path
) -> None:
    how, work = recipe(*steps), tmp_path / "work"
    whole, layers = run(tiny, work, how)
    for path in sorted((work / "blocks").glob("*.json")):
        if int(path.stem) == -1 or int(path.stem) >= kept_blocks:
            path.unlink()
    resumed, again = run(tiny, work, how, resume=True)
    for name, layer in layers.items():
        for part, tensor in layer.qtensor.tensors().items():
            assert torch.equal(tensor, again[name].qtensor.tensors()[part]), name
    state, other = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(state[key], other[key]) for key in state)


def test_another_seed_is_another_run(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path, recipe(Step("rotate"), Step("rtn")))
    with pytest.raises(UsageError, match="begun with another"):
        run(tiny, tmp_path, recipe(Step("rotate", {"seed": 1}), Step("rtn")), resume=True)


def test_eight_bits_leave_the_function_alone(tiny: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        before = models.load_source(str(tiny)).model(IDS).logits.float()
        model, _ = run(tiny, tmp_path, recipe(Step("rotate"), Step("rtn"), scheme="w8a16"))
        assert relative(model(IDS).logits.float(), before) < 0.03


def test_a_checkpoint_runs_anywhere(tiny: Path, traffic: Path, tmp_path: Path) -> None:
    """A whole run, twice; the export in plain transformers and in the native decoder."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "scheme: w4a16-g64\nalgorithm: [{rotate: {seed: 7}}, gptq]\nkeep: [lm_head]\n"
        "calibrate: {samples: 4, seq_len: 64}\n"
    )
    out, again = tmp_path / "out", tmp_path / "again" / "out"
    again.parent.mkdir()
    for folder in (out, again):
        assert run_cli(arguments(tiny, path, traffic, folder)) == 0
    assert contents(out) == contents(again)
    manifest = json.loads((out / "quantkit.json").read_text())
    head_bytes = 272 * 384 * 2
    assert manifest["rotation"] == {
        "residual": True, "heads": True, "mlp": False, "seed": 7, "head_bytes": head_bytes,
        "down": [],
    }  # fmt: skip
    assert manifest["layers"]["model.layers.0.mlp.up_proj"]["steps"] == "rotate → gptq"
    assert "lm_head.weight" in load_file(out / "model.safetensors")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False

    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)(IDS).logits.float()
        oracle = load_runtime(out, kernels="reference").model(IDS).logits.float()
    assert relative(theirs, oracle) < 0.01
    runtime = load_runtime(out, kernels="native-float")
    assert runtime.fallback is None
    assert relative(runtime.logits(IDS[0].tolist()), oracle[0]) < 0.02


# Plans


def test_a_plan_counts_the_untied_head() -> None:
    model = tiny_llama()
    plain = make_plan(recipe(Step("rtn")), model, samples=1, seq_len=8)
    plan = make_plan(recipe(Step("rotate"), Step("rtn")), model, samples=1, seq_len=8)
    assert plan.rotation is not None
    assert plan.rotation.head_bytes == plan.size_bytes - plain.size_bytes == 272 * 384 * 2
    assert plan.unties_head
    assert not plain.unties_head
    assert not plan.needs_data
    assert {layer.steps for layer in plan.layers} == {"rotate → rtn"}
    only = make_plan(
        recipe(Step("rotate", {"residual": False}), Step("rtn")), model, samples=1, seq_len=8
    )
    assert only.size_bytes == plain.size_bytes
    assert not only.unties_head
    turned = {layer.name.rpartition(".")[2] for layer in only.layers if layer.rotated}
    assert turned == {"v_proj", "o_proj"}
    # A quantized head has a tensor of its own anyway.
    both = [
        make_plan(recipe(*steps, keep=()), model, samples=1, seq_len=8).size_bytes
        for steps in ((Step("rtn"),), (Step("rotate"), Step("rtn")))
    ]
    assert both[0] == both[1]
    untied = make_plan(
        recipe(Step("rotate"), Step("rtn")), tiny_llama(tied=False), samples=1, seq_len=8
    )
    assert untied.size_bytes == untied.rotation.head_bytes + plan.size_bytes  # type: ignore[union-attr]


def test_a_plan_says_what_it_rotates(
    tiny: Path, traffic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("scheme: w8a8\nalgorithm: [rotate, rtn]\nkeep: [lm_head]\n")
    assert run_cli(arguments(tiny, path, traffic, tmp_path / "out", "--dry-run")) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "rotation the residual stream and the heads' values, folded into the weights" in shown
    assert "the head is untied: 0.2 MB more" in shown
    path.write_text("scheme: w8a8\nalgorithm: [{rotate: {mlp: true}}, rtn]\nkeep: [lm_head]\n")
    assert run_cli(arguments(tiny, path, traffic, tmp_path / "out", "--dry-run")) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "the inputs of down_proj (2), at inference: quantkit alone; the head is untied" in shown


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (recipe(Step("rtn"), Step("rotate")), "rotate comes once, before everything else"),
        (recipe(Step("awq"), Step("rotate"), Step("rtn")), "rotate comes once, before"),
        (recipe(Step("rotate"), Step("rotate"), Step("rtn")), "rotate comes once, before"),
        (recipe(Step("rotate")), "exactly one solver"),
        (recipe(Step("rotate", {"angle": 1}), Step("rtn")), "unknown option 'angle'; known: resid"),
        (recipe(Step("rotate", {"seed": -1}), Step("rtn")), "seed -1: is a whole number from 0"),
        (recipe(Step("rotate", {"seed": True}), Step("rtn")), "seed True: is a whole number"),
        (recipe(Step("rotate", {"heads": 1}), Step("rtn")), "heads 1: is true or false"),
        (recipe(Step("rotate", {"mlp": "yes"}), Step("rtn")), "mlp 'yes': is true or false"),
        (
            recipe(Step("rotate", {"heads": False, "residual": False}), Step("rtn")),
            "nothing is rotated",
        ),
        (
            replace(
                recipe(Step("rtn")),
                rules=(Rule("*.k_proj", SCHEMES["w8a16"], (Step("rotate"), Step("rtn"))),),
            ),
            r"rule '\*\.k_proj': rotate turns the whole model",
        ),
    ],
)
def test_refusals(how: Recipe, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(how, tiny_llama(), samples=1, seq_len=8)


@pytest.mark.parametrize(
    ("kind", "extra", "message"),
    [
        ("gemma2", {"head_dim": 16}, "residual: .*'gemma2': norms behind .*; set `residual: fal"),
        ("gemma3_text", {"head_dim": 16}, "residual: .*norms behind attention and MLP"),
        ("olmo2", {}, "residual: .*norms behind attention and MLP"),
        ("phi3", {}, "heads: .*'phi3': the values are some rows of a fused layer; set `heads: f"),
        ("llama", {"head_dim": 1, "num_key_value_heads": 6}, "heads of block 0: no Hadamard"),
        ("gpt_neox", {}, "architecture 'gpt_neox': .*known only for llama, .*; take rotate"),
    ],
)
def test_architectures_that_do_not_fold(kind: str, extra: dict, message: str) -> None:  # type: ignore[type-arg]
    if kind == "llama":
        extra = {**extra, "hidden_size": 48}
    if kind == "gpt_neox":
        config = AutoConfig.for_model(
            "gpt_neox", hidden_size=32, num_attention_heads=2, intermediate_size=64,
            num_hidden_layers=1, vocab_size=97,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = make(kind, extra)
    how = Recipe(SCHEMES["w8a16"], algorithm=(Step("rotate"), Step("rtn")), keep=("*head*",))
    if kind == "gpt_neox":
        how = replace(how, keep=())
    with pytest.raises(UsageError, match=message):
        make_plan(how, model, samples=1, seq_len=8)


def test_a_block_with_other_layers_is_refused() -> None:
    model = make("llama", {})
    model.model.layers[1].mlp.extra_proj = torch.nn.Linear(48, 48)
    with pytest.raises(UsageError, match=r"layers\.1 has the linear layers .*extra_proj"):
        make_plan(recipe(Step("rotate"), Step("rtn"), scheme="w8a16"), model, samples=1, seq_len=8)
