"""Every row of the scheme table: calibrate, export, reload here, reload in plain transformers."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from quantkit import model as models
from quantkit.calibrate import CalibrationData, calibrate
from quantkit.checkpoint.write import write_checkpoint
from quantkit.layers import QuantLinear
from quantkit.models.load import KERNELS, load_runtime
from quantkit.plan import Plan, make_plan
from quantkit.quantize import QuantizedLayer
from quantkit.recipe import Recipe
from quantkit.schemes import SCHEMES, ScaleFormat, Scheme, parse_scheme
from tests.run_helpers import contents

GENERIC = {
    "int5-g32-asym": {"weight": {"bits": 5, "group_size": 32, "symmetric": False}},
    "int2-g16": {"weight": {"bits": 2, "group_size": 16}},
    "int6-channel": {"weight": {"bits": 6}},
    "int4-g64-int8-token": {
        "weight": {"bits": 4, "group_size": 64},
        "input": {"bits": 8, "granularity": "token"},
    },
}
TABLE: dict[str, Scheme] = {
    **SCHEMES,
    **{name: parse_scheme(spec) for name, spec in GENERIC.items()},
}
#: They differ from other rows of their width in nothing but what shares a scale.
ALIKE = (
    "w3a16-asym-g32", "w3a16-asym-g96", "w3a16-asym-g128", "w3a16-asym-channel", "w2a16-g64",
    "w2a16-g128", "w2a16-asym-g32", "w2a16-asym-g128",
)  # fmt: skip
ROWS = [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in TABLE]


def prompt(vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (2, 33), generator=torch.Generator().manual_seed(5))


def export(
    source: Path, scheme: Scheme, folder: Path, keep: tuple[str, ...] = ("lm_head",)
) -> tuple[Plan, dict[str, QuantizedLayer]]:
    """Quantize a model with round to nearest and write it."""
    loaded = models.load_source(str(source))
    plan = make_plan(Recipe(scheme, keep=keep), loaded.model, samples=4, seq_len=32)
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(1))
    done = calibrate(loaded, plan, CalibrationData(ids, "test"), folder.with_suffix(".work"))
    write_checkpoint(folder, loaded, plan, done.layers, {})
    return plan, done.layers


def in_transformers(folder: Path, scheme: Scheme, dtype: torch.dtype) -> torch.nn.Module:
    """The export in plain transformers, in the mode that runs its activation quantization.

    Asymmetric weights are loaded dequantized: transformers' default mode gives the packed
    zero points the wrong shape. That mode drops activation quantization, which these schemes
    do not have.
    """
    config = {}
    # FP4 weights are decompressed to bf16 whatever dtype was asked for, so fp32 is cast after.
    fp4 = scheme.weight.scale is not ScaleFormat.MODEL
    if not scheme.weight.symmetric or fp4:
        config["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    load = torch.bfloat16 if fp4 else dtype
    return AutoModelForCausalLM.from_pretrained(folder, dtype=load, **config).eval().to(dtype)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("name", ROWS)
def test_reload_agrees_with_transformers(name: str, tiny: Path, tmp_path: Path) -> None:
    scheme = TABLE[name]
    folder = tmp_path / "export"
    plan, layers = export(tiny, scheme, folder)
    ids = prompt(256)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = in_transformers(folder, scheme, torch.bfloat16)(ids).logits
        noise = relative(theirs, in_transformers(folder, scheme, torch.float32)(ids).logits)
        runs = {}
        for kernels in KERNELS:
            native = load_runtime(folder, kernels=kernels)
            assert (native.decoder is not None) == kernels.startswith("native")
            runs[kernels] = native.logits(ids[0].tolist())
            assert torch.isfinite(runs[kernels]).all()
    # Their own bf16 against their own fp32, on this very checkpoint, is what rounding costs.
    for kernels in ("reference", "modules", "native-float"):
        assert relative(runs[kernels], theirs[0]) <= 2 * noise, kernels
    # int8 activations are another system, a little further away.
    assert relative(runs["native"], theirs[0]) <= max(2 * noise, 0.04)
    quantized = {n for n, m in native.model.named_modules() if isinstance(m, QuantLinear)}
    assert quantized == {layer.name for layer in plan.layers}
    assert native.bits_per_weight == pytest.approx(plan.bits_per_weight, rel=0.01)
    for layer in layers.values():
        assert layer.output_error is not None
        assert 0 < layer.output_error < 1.0


def test_export_is_byte_identical_on_a_rerun(tiny: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        export(tiny, SCHEMES["w4a16-g64"], folder)
    assert contents(first) == contents(second)


def test_quantized_head_is_untied_and_counted(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    plan, _ = export(tiny, SCHEMES["w8a16"], folder, keep=())
    assert plan.unties_head
    config = models.load_config(folder, "export")
    assert config.tie_word_embeddings is False
    stored = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert stored == pytest.approx(plan.size_bytes, rel=0.05)
    ids = prompt(256)
    with torch.no_grad():
        theirs = in_transformers(folder, SCHEMES["w8a16"], torch.bfloat16)(ids).logits
        ours = load_runtime(folder, kernels="native-float").logits(ids[0].tolist())
    assert relative(ours, theirs[0]) < 0.02


def test_mixed_precision_runs_in_transformers(tiny: Path, tmp_path: Path) -> None:
    from quantkit.recipe import Rule

    loaded = models.load_source(str(tiny))
    recipe = Recipe(
        SCHEMES["w4a16-g64"],
        keep=("lm_head",),
        rules=(Rule("*.down_proj", SCHEMES["w8a8"]), Rule("*.o_proj", None)),
    )
    plan = make_plan(recipe, loaded.model, samples=4, seq_len=32)
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(1))
    done = calibrate(loaded, plan, CalibrationData(ids, "x"), tmp_path / "work")
    folder = tmp_path / "export"
    write_checkpoint(folder, loaded, plan, done.layers, {})
    ids = prompt(256)
    with torch.no_grad():
        # dequantize=True fails on mixed formats in transformers, its default mode works.
        theirs = in_transformers(folder, SCHEMES["w4a16-g64"], torch.bfloat16)(ids).logits
        ours = load_runtime(folder).logits(ids[0].tolist())
    assert relative(ours, theirs[0]) < 0.03


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_model_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    from tests.conftest import save_model, tiny_llama

    source = save_model(tiny_llama(dtype=dtype), tmp_path / "model")
    folder = tmp_path / "export"
    export(source, SCHEMES["w4a16-g32"], folder)
    ids = prompt(256)
    runtime = load_runtime(folder)
    assert runtime.model.dtype is dtype
    with torch.no_grad():
        theirs = in_transformers(folder, SCHEMES["w4a16-g32"], dtype)(ids).logits
        assert relative(runtime.logits(ids[0].tolist()), theirs[0]) < 0.02
