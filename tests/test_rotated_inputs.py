"""The rotation in front of down_proj: half of it in the weights, half at inference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantkit import hadamard, numerics, ops
from quantkit import model as models
from quantkit.checkpoint.export import export
from quantkit.cli.main import run as run_cli
from quantkit.engines.artifact import read_artifact
from quantkit.engines.support import Host
from quantkit.engines.support import check as check_engine
from quantkit.errors import KernelMissingError, UsageError
from quantkit.layers import QuantLinear
from quantkit.limits import check_limits
from quantkit.models.load import load_runtime
from quantkit.models.runtime import Runtime
from quantkit.models.verify import verify_files
from quantkit.ops import library
from quantkit.plan import Plan, make_plan
from quantkit.recipe import Step
from quantkit.rotation import STREAMS, PlannedRotation
from quantkit.schemes import SCHEMES
from tests.conftest import tiny_llama
from tests.run_helpers import arguments
from tests.test_folding import VARIANTS, logits, make, relative
from tests.test_rotation import BOTH, IDS, folds, recipe, rotated, run


def with_mlp(model: PreTrainedModel, rotation: PlannedRotation) -> PlannedRotation:
    """Every down projection, too."""
    down = tuple(n for n in models.linear_layers(model) if n.endswith("mlp.down_proj"))
    return replace(rotation, mlp=True, down=down)


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize(("kind", "extra"), VARIANTS)
def test_an_mlp_turned_at_inference_keeps_the_function(
    kind: str,
    extra: dict,  # type: ignore[type-arg]
    folded: bool,
) -> None:
    model = make(kind, extra)
    before = logits(model)
    old = {name: p.clone() for name, p in model.named_parameters()}
    rotation = folds(kind) if folded else replace(BOTH, residual=False, heads=False)
    rotation = with_mlp(model, rotation)
    rotated(model, rotation)
    new = dict(model.named_parameters())
    up = STREAMS[kind].up
    for name in rotation.down:
        assert not torch.equal(new[f"{name}.weight"], old[f"{name}.weight"])
        assert rotation.turns(name, model)
        gated = name.replace("mlp.down_proj", up)
        assert rotation.turns(gated, model)
        if folded:
            continue
        # Signs alone, and of what is multiplied by the gate alone.
        same = new[f"{gated}.weight"] == old[f"{gated}.weight"]
        flipped = new[f"{gated}.weight"] == -old[f"{gated}.weight"]
        assert bool((same.all(1) | flipped.all(1)).all())
        channels = model.get_submodule(name).in_features
        assert 0.3 < float(flipped[-channels:].all(1).double().mean()) < 0.7
        assert bool(same[:-channels].all())
    after = logits(model)
    assert relative(after, before) < 1e-5
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


def test_a_down_projection_that_is_kept_stays_as_it_is() -> None:
    model = make("llama", {"mlp_bias": True})
    before = logits(model)
    old = {name: p.clone() for name, p in model.named_parameters()}
    rotation = replace(BOTH, residual=False, heads=False)
    rotation = with_mlp(model, rotation)
    rotation = replace(rotation, down=rotation.down[1:])
    rotated(model, rotation)
    for name, parameter in model.model.layers[0].named_parameters():
        assert torch.equal(parameter, old[f"model.layers.0.{name}"]), name
    assert not rotation.turns("model.layers.0.mlp.up_proj", model)
    assert rotation.order("model.layers.0.mlp.down_proj", 96) == 0
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)


def test_an_outlier_of_the_mlp_is_spread_in_front_of_whoever_watches() -> None:
    model = make("llama", {"hidden_size": 96, "head_dim": 8, "intermediate_size": 192})
    model.model.layers[1].mlp.up_proj.weight.data[5] *= 30.0

    def most() -> float:
        """The largest value against the root mean square, of the middle of the second MLP."""
        seen: list[Tensor] = []
        hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
            lambda _, x: seen.append(x[0])
        )
        logits(model)
        hook.remove()
        return float(seen[0].abs().max() / seen[0].square().mean().sqrt())

    before = most()
    rotated(model, with_mlp(model, BOTH))
    assert most() < before / 3


@pytest.mark.parametrize("kernels", ["native", "reference"])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g64", "fp8"])
def test_a_layer_multiplies_its_input_first(scheme: str, kernels: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 192, generator=generator).bfloat16()
    x = torch.randn(2, 5, 192, generator=generator).bfloat16()
    q = numerics.quantize_weight(weight, SCHEMES[scheme].weight)
    plain = QuantLinear(q, SCHEMES[scheme], kernels=kernels)
    layer = QuantLinear(q, SCHEMES[scheme], kernels=kernels, hadamard=96)
    product = ops.get_backend(kernels).hadamard(x, hadamard.factor(96), 96)
    assert torch.equal(layer(x), plain(product))
    wanted = torch.nn.functional.linear(hadamard.multiply(x.float(), 96), weight.float())
    assert relative(layer(x).float(), wanted) < (0.15 if scheme == "w4a16-g64" else 0.05)
    assert relative(plain(x).float(), wanted) > 1
    assert "hadamard=96" in repr(layer)
    assert "hadamard" not in repr(plain)


class Called(TorchDispatchMode):
    """Names of our operators, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "quantkit":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scheme", ["w4a16-g64", "w8a16", "fp8", "w8a8"])
def test_a_layer_on_a_gpu_takes_the_tensor_cores_product(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without data on a GPU that need not be there; w8a8's layer has no kernel there."""
    monkeypatch.setattr(library.CUDA, "handle", object())
    q = numerics.quantize_weight(torch.randn(32, 192).bfloat16(), SCHEMES[scheme].weight)
    layer = QuantLinear(q, SCHEMES[scheme], hadamard=96)
    elsewhere, gpu = FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda:0")
    for name, buffer in list(layer.named_buffers()):
        setattr(layer, name, FakeTensor(elsewhere, buffer.to("meta"), gpu))
    with elsewhere, Called() as called:
        x = torch.empty(2, 5, 192, dtype=torch.bfloat16, device=gpu)
        if scheme == "w8a8":
            with pytest.raises(KernelMissingError, match="w8a8_linear has no CUDA kernel"):
                layer(x)
        else:
            assert layer(x).shape == (2, 5, 32)
    assert called.names[0] == "hadamard_mma"
    assert "hadamard" not in called.names


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "w4a16-g64"])
def test_a_checkpoint_with_a_turned_mlp_runs_here_and_nowhere_else(
    scheme: str, tiny: Path, traffic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run; then every kernel, verify, and whoever must refuse it."""
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(
        f"scheme: {scheme}\nalgorithm: [{{rotate: {{residual: false, mlp: true}}}}, rtn]\n"
        "keep: [lm_head, model.layers.1.mlp.down_proj]\ncalibrate: {samples: 4, seq_len: 64}\n"
    )
    assert run_cli(arguments(tiny, path, traffic, out)) == 0
    first = "model.layers.0.mlp.down_proj"
    assert json.loads((out / "quantkit.json").read_text())["rotation"]["down"] == [first]
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["rotated_inputs"] == {"matrix": "sylvester-paley", "orders": {first: 768}}
    assert config["format"].startswith("rotated-")

    def load(kernels: str) -> Runtime:
        return load_runtime(out, kernels=kernels, dtype=torch.float32)  # so that codes are the same

    oracle = load("reference")
    assert oracle.model.get_submodule(first).hadamard == 768
    with torch.no_grad():
        original = models.load_source(str(tiny)).model(IDS).logits.float()
        wanted = oracle.model(IDS).logits
        in_modules = load("modules").model(IDS).logits
    assert relative(wanted, original) < 0.4  # without the product it is above 1
    # A code that another order of summation moves is a large step in so small a model.
    limit = 0.02 if scheme == "w4a16-g64" else 0.1
    assert relative(in_modules, wanted) < limit
    runtime = load("native-float")
    assert runtime.fallback is None
    assert runtime.fingerprint["kernels"].endswith("+rotated-down")
    assert relative(runtime.logits(IDS[0].tolist()), wanted[0]) < limit

    if scheme != "w4a16-g64":
        monkeypatch.setattr("quantkit.models.load.check_target", lambda *_: None)
        with pytest.raises(
            KernelMissingError, match=r"layers\.0\.\S+ multiplies int8 by int8, which"
        ):
            load_runtime(out, device="cuda")

    with pytest.raises(Exception, match="rotated-"):
        AutoModelForCausalLM.from_pretrained(out)
    for fmt in ("gguf", "gptq"):
        with pytest.raises(UsageError, match=f"order 768 at inference, .* reads {fmt}"):
            export(out, fmt, tmp_path / fmt)
    artifact = read_artifact(str(out))
    for device in ("cpu", "cuda"):
        with pytest.raises(UsageError, match="vLLM does not run rotated inputs"):
            check_engine(artifact, Host(device))
    assert all(finding.ok for finding in verify_files(out))
    assert not [*tmp_path.glob("*gguf*"), *tmp_path.glob("*gptq*")]


@pytest.mark.parametrize("last", [Step("signround", {"steps": 2}), Step("distill", {"steps": 2})])
def test_what_trains_goes_through_the_product(last: Step, tiny: Path, tmp_path: Path) -> None:
    """Gradients of a rounding reach gate_proj and up_proj; the reload would tell another one."""
    how = recipe(Step("rotate", {"mlp": True}), Step("rtn"), last)
    with torch.no_grad():
        before = models.load_source(str(tiny)).model(IDS).logits.float()
        model, layers = run(tiny, tmp_path, how)
        assert relative(model(IDS).logits.float(), before) < 0.35
    assert len(layers) == 14


def test_hidden_states_on_disk_change_no_byte(tiny: Path, tmp_path: Path) -> None:
    how = recipe(Step("rotate", {"mlp": True}), Step("gptq"))
    _, layers = run(tiny, tmp_path / "held", how)
    _, spilled = run(tiny, tmp_path / "spilled", how, activation_memory=1 << 20)
    for name, layer in layers.items():
        for part, tensor in layer.qtensor.tensors().items():
            assert torch.equal(tensor, spilled[name].qtensor.tensors()[part]), name


def test_a_plan_turns_quantized_down_projections_alone() -> None:
    def plan(keep: tuple[str, ...], *steps: Step) -> Plan:
        how = recipe(Step("rotate", {"mlp": True}), *steps, keep=("lm_head", *keep))
        return make_plan(how, tiny_llama(), samples=1, seq_len=8)

    second = "model.layers.1.mlp.down_proj"
    found = plan((second,), Step("rtn")).layers
    assert {x.name: x.hadamard for x in found if x.hadamard} == {
        "model.layers.0.mlp.down_proj": 768
    }
    with pytest.raises(UsageError, match=r"no mlp\.down_proj is quantized; set `mlp: false`"):
        plan(("*.down_proj",), Step("rtn"))
    # What scales all pairs leaves out the one that the product stands in.
    scaled = plan((second,), Step("awq", {"pairs": "all"}), Step("gptq"))
    [reason] = [r for label, r in scaled.unscaled.items() if "layers.0.mlp.up_proj" in label]
    assert reason == "a rotation stands between, which runs at inference"
    behind = {fold.consumers[0] for fold in scaled.folds}
    assert second in behind or not any(second in label for label in scaled.unscaled)
    assert "model.layers.0.mlp.down_proj" not in behind


def test_it_calibrates_on_a_gpu_too() -> None:
    """There the product is torch's, as the reference kernels compute it."""
    plan = make_plan(
        recipe(Step("rotate", {"mlp": True}), Step("rtn")), tiny_llama(), samples=1, seq_len=8
    )
    elsewhere = SimpleNamespace(device=torch.device("cuda"))
    check_limits(plan, elsewhere, [])  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_checkpoint_is_made_again(tiny: Path, traffic: Path, tmp_path: Path) -> None:
    """From its manifest, with the product in it and the list of layers that have one."""
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(
        "scheme: w8a8-static\nalgorithm: [{rotate: {mlp: true}}, gptq]\n"
        "keep: [lm_head]\ncalibrate: {samples: 4, seq_len: 64}\n"
    )
    assert run_cli(arguments(tiny, path, traffic, out)) == 0
    again = ["verify", str(out), "--rebuild", "--model", str(tiny), "--data", str(traffic)]
    assert run_cli(again) == 0
