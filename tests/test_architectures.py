"""Every family end to end: calibrate, export, reload in plain transformers and here."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

from quantkit import model as models
from quantkit import numerics
from quantkit.cli.main import run
from quantkit.errors import UsageError
from quantkit.evals.forward import make_forward
from quantkit.layers import QuantLinear
from quantkit.models.load import load_runtime
from quantkit.models.verify import verify_reload
from quantkit.numerics import QTensor
from quantkit.serve.runner import Work, make_runner
from tests.architectures import ARCHITECTURES, Saved, build, run_model, save, spoken
from tests.conftest import byte_tokenizer
from tests.run_helpers import arguments

W4, W8A8 = "w4a16-g32", "w8a8"

#: transformers 5.23 decompresses fused experts from packed integers and FP8 only.
NOT_IN_TRANSFORMERS = {("mixtral", W8A8), ("qwen3_moe", W8A8)}

#: transformers 5.23 initializes weights by name before it loads them, and packed layers have no
#: tensor of that name: these load dequantized only.
DEQUANTIZED = {("t5", W4), ("modernbert", W4)}


#: One of each kind for the default suite; the others are slow.
FAST = ("mixtral", "gpt_neox", "bert", "llava", "whisper", "t5")
CAUSAL = [n for n, row in ARCHITECTURES.items() if row.auto == "AutoModelForCausalLM"]


def rows(names: Iterable[str]) -> list[Any]:
    """Names as parameters, the heavier rows marked."""
    slow = pytest.mark.slow
    return [pytest.param(name, marks=() if name in FAST else slow) for name in names]


#: Name and scheme → the folder of an export, made once.
Exported = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    @cache
    def make(name: str) -> Path:
        return save(name, tmp_path_factory.mktemp("models") / name)

    return make


@pytest.fixture(scope="module")
def exported(saved: Saved, traffic: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    @cache
    def make(name: str, scheme: str) -> Path:
        folder = tmp_path_factory.mktemp("exports")
        data = spoken(folder) if name == "whisper" else traffic
        assert calibrate(saved(name), data, folder / name, scheme) == 0
        return folder / name

    return make


def calibrate(
    model: Path, data: Path, out: Path, scheme: str = W4, numbers: str = "samples: 6, seq_len: 64"
) -> int:
    """Through the command line, as a user does."""
    recipe = out.with_suffix(".yaml")
    recipe.write_text(
        f"scheme: {scheme}\nalgorithm: gptq\nkeep: [lm_head]\ncalibrate: {{{numbers}}}\n"
    )
    return run(arguments(model, recipe, data, out))


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def dequantized(source: Path, reference: nn.Module) -> nn.Module:
    """The original with the export's weights, dequantized, in its place."""
    model = models.load_source(str(source)).model
    for path, layer in reference.named_modules():
        if isinstance(layer, QuantLinear):
            q = QTensor(layer.codes, layer.scale, layer.zero, layer.spec, layer.global_scale)
            weight = numerics.dequantize(q, torch.float32)
            model.get_submodule(path).weight = nn.Parameter(weight)
    return model


def in_transformers(name: str, folder: Path, scheme: str = W4) -> Any:
    auto = getattr(transformers, ARCHITECTURES[name].auto)
    config = {}
    if (name, scheme) in DEQUANTIZED:
        config["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = auto.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **config
        )
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["mismatched_keys"], info["mismatched_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("scheme", [W4, pytest.param(W8A8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", rows(ARCHITECTURES))
def test_end_to_end(name: str, scheme: str, saved: Saved, exported: Exported) -> None:
    row, source, out = ARCHITECTURES[name], saved(name), exported(name, scheme)
    manifest = json.loads((out / "quantkit.json").read_text())
    reference = load_runtime(out, kernels="reference").model
    loaded = {n for n, m in reference.named_modules() if isinstance(m, QuantLinear)}
    assert loaded == set(manifest["layers"])
    assert len(loaded) == row.layers * row.blocks
    assert all(m["solver"] == "gptq" for m in manifest["layers"].values())
    for part in row.kept:
        assert any(part in kept for kept in manifest["kept"]), part
        assert not any(part in layer for layer in loaded), part

    with safe_open(out / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    for memory, disk in row.renamed.items():
        assert any(disk in key for key in stored)
        assert not any(memory in key for key in stored)

    ours = run_model(name, reference)
    if scheme == W4:
        assert relative(ours, run_model(name, dequantized(source, reference))) < 1e-4
    native = run_model(name, load_runtime(out, kernels="modules").model)
    assert relative(native, ours) < 0.02
    if (name, scheme) in NOT_IN_TRANSFORMERS:
        with pytest.raises(RuntimeError, match="automatic conversion"):
            in_transformers(name, out, scheme)
    else:
        theirs = run_model(name, in_transformers(name, out, scheme))
        assert relative(theirs, ours) < (1e-4 if scheme == W4 else 0.02)
    # Quantized, and still the model that it was.
    assert 1e-4 < relative(ours, run_model(name, models.load_source(str(source)).model)) < 0.7


@pytest.mark.parametrize("name", rows([*CAUSAL, "llava"]))
def test_what_predicts_tokens_is_scored_and_served(name: str, exported: Exported) -> None:
    """Through transformers' modules: at once, and from a cache."""
    runtime = load_runtime(exported(name, W4), kernels="modules")
    ids = list(range(40, 60))
    whole = runtime.logits(ids)
    forward = make_forward(runtime)
    scored = forward.logits(forward.states(torch.tensor([ids]))[0])
    torch.testing.assert_close(scored, whole, rtol=1e-3, atol=1e-3)
    runner = make_runner(runtime, 64)
    sequence = runner.new_cache()
    for part in (ids[:13], ids[13:]):
        [logits] = runner.run([Work(sequence, part)])
        assert isinstance(logits, torch.Tensor), logits
    torch.testing.assert_close(logits[-1], whole[-1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_what_predicts_none_is_refused(
    name: str, exported: Exported, traffic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported(name, W4)
    options = ["--text", str(traffic), "-o", str(folder.parent / "results.json")]
    assert run(["eval", str(folder), *options]) == 2
    assert "scores next-token predictions" in capsys.readouterr().err
    with pytest.raises(UsageError, match="samples next-token predictions"):
        make_runner(load_runtime(folder, kernels="modules"), 64)
    [forward] = [f for f in verify_reload(folder, kernels="modules") if f.check == "forward"]
    assert (forward.ok, forward.detail) == (True, "finite hidden states")


@pytest.mark.parametrize("name", rows(["bert", "modernbert"]))
def test_embeddings_stay_where_they_were(name: str, saved: Saved, exported: Exported) -> None:
    def embedding(folder: Path) -> torch.Tensor:
        return run_model(name, load_runtime(folder, kernels="modules").model).mean(1)

    before, after = embedding(saved(name)), embedding(exported(name, W4))
    assert float(torch.cosine_similarity(before, after)) > 0.95


def test_whisper_writes_what_it_wrote_in_transformers(exported: Exported) -> None:
    folder = exported("whisper", W4)
    ours = load_runtime(folder, kernels="reference").model
    theirs = in_transformers("whisper", folder)
    run_model("whisper", theirs)  # packed weights are decompressed by a forward pass alone
    heard = torch.randn(1, 80, 100, generator=torch.Generator().manual_seed(6))
    written = [
        model.generate(input_features=heard, max_new_tokens=6, do_sample=False)
        for model in (ours, theirs)
    ]
    assert written[0].tolist() == written[1].tolist()


def test_the_plan_shows_what_is_kept(
    saved: Saved, traffic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("scheme: w8a16\n")
    options = arguments(saved("llava"), recipe, traffic, tmp_path / "out", "--dry-run")
    assert run(options) == 0
    plan = capsys.readouterr().err
    assert "vision_tower" in plan
    assert "multi_modal_projector" in plan


def test_an_expert_without_tokens_ends_the_run(
    saved: Saved, traffic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two tokens, two experts each: at least four of eight see nothing."""
    numbers = "samples: 1, seq_len: 2"
    assert calibrate(saved("qwen3_moe"), traffic, tmp_path / "out", numbers=numbers) == 4
    message = capsys.readouterr().err
    assert "0 calibration tokens reached this expert" in message
    [row] = re.findall(r"^ +model\.layers\.0\.mlp\.experts +([\d ]+)$", message, re.MULTILINE)
    assert sum(int(n) for n in row.split()) == 4
    assert "all_experts: true" in message
    assert not (tmp_path / "out").exists()
    numbers += ", all_experts: true"
    assert calibrate(saved("qwen3_moe"), traffic, tmp_path / "all", numbers=numbers) == 0


def test_least_tokens_of_an_expert(
    saved: Saved, traffic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = "samples: 6, seq_len: 64, min_expert_tokens: 385"
    assert calibrate(saved("mixtral"), traffic, tmp_path / "out", numbers=numbers) == 4
    assert "4 experts of this block saw fewer than 385" in capsys.readouterr().err


def test_all_experts_changes_what_is_observed_and_not_what_is_computed(saved: Saved) -> None:
    model = models.load_source(str(saved("mixtral"))).model
    routed = run_model("mixtral", model)
    [first, *_] = models.find_experts(model).values()
    with models.expert_inputs(model, "all"):
        assert first.mode == "all"
        torch.testing.assert_close(run_model("mixtral", model), routed, rtol=1e-4, atol=1e-4)
    assert first.mode == "routed"


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_linear_experts_compute_what_fused_ones_do(name: str, saved: Saved) -> None:
    linear = models.load_source(str(saved(name))).model
    assert len(models.find_experts(linear)) == 2
    difference = relative(run_model(name, linear), run_model(name, build(name)))
    assert difference < 1e-5


@pytest.mark.parametrize("option", ["{fisher: 1.0}", "{feedback: 1.0}"])
def test_what_experts_cannot_take_is_refused_before_any_work(
    option: str,
    saved: Saved,
    traffic: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"scheme: w4a16-g32\nalgorithm: {{gptq: {option}}}\nkeep: [lm_head]\n")
    assert run(arguments(saved("mixtral"), recipe, traffic, tmp_path / "out")) == 2
    assert "router" in capsys.readouterr().err


REFUSED = {
    "GPT2LMHeadModel": (
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 272},
        "Conv1D",
    ),
    "GptOssForCausalLM": (
        {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_local_experts": 4,
            "vocab_size": 272,
        },
        "these experts cannot be calibrated",
    ),
    "BertForQuestionAnswering": (
        {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 272},
        "of no family that quantkit calibrates",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_architectures_are_refused(
    name: str, traffic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, reason = REFUSED[name]
    make = getattr(transformers, name)
    make(make.config_class(**options)).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    assert calibrate(tmp_path / "model", traffic, tmp_path / "out") == 2
    assert reason in capsys.readouterr().err
