"""Calibrated scales of keys and values: found, exported, read by others, used by the kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit import model as models
from quantkit import numerics
from quantkit.calibrate import CalibrationData, calibrate
from quantkit.cli.main import run
from quantkit.errors import QuantkitError
from quantkit.kv_cache import SIDES
from quantkit.models.load import load_runtime
from quantkit.plan import make_plan
from quantkit.recipe import KV_CACHES, parse_recipe
from tests.run_helpers import arguments

RECIPE = """\
scheme: {scheme}
algorithm: {algorithm}
keep: [lm_head]
kv_cache: {kv}
calibrate: {{samples: 4, seq_len: 64, observer: {observer}}}
"""
IDS = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(3))


def recipe_text(kv: str, scheme: str = "w8a16", algorithm: str = "rtn", observer: str = "minmax"):
    return RECIPE.format(kv=kv, scheme=scheme, algorithm=algorithm, observer=observer)


@pytest.fixture(scope="module", params=sorted(KV_CACHES))
def kv(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(
    kv: str, tiny: Path, traffic: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint whose run passed the reload check, in reference and in native kernels."""
    folder = tmp_path_factory.mktemp("kv") / kv
    folder.mkdir()
    (folder / "r.yaml").write_text(recipe_text(kv, observer="auto"))
    assert run(arguments(tiny, folder / "r.yaml", traffic, folder / "out")) == 0
    return folder / "out"


class Spy:
    """A cache that keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        self.seen.append((keys, values))
        return keys, values


def test_scales_cover_rotated_keys_and_values(tiny: Path, tmp_path: Path, kv: str) -> None:
    loaded = models.load_source(str(tiny))
    with torch.no_grad():  # so that keys and values are told apart
        loaded.model.model.layers[0].self_attn.v_proj.weight.mul_(3)
    recipe = parse_recipe(recipe_text(kv))
    plan = make_plan(recipe, loaded.model, samples=4, seq_len=64)
    found = calibrate(loaded, plan, CalibrationData(IDS, "h"), tmp_path / "w").caches
    assert list(found) == [f"model.layers.{i}.self_attn" for i in range(2)]
    # The first block's inputs are those of calibration; the model holds its quantized weights.
    spy = Spy()
    loaded.model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "past_key_values": spy}), with_kwargs=True
    )
    with torch.no_grad():
        loaded.model(IDS, use_cache=False)
    [(keys, values)] = spy.seen
    first = found["model.layers.0.self_attn"]
    steps = first.spec.qmax - first.spec.qmin
    for side, seen in zip(SIDES, (keys, values), strict=True):
        scale = first.scales(torch.bfloat16)[side]
        assert scale.shape == (1,)
        assert float(scale) == pytest.approx(float(seen.abs().max()) * 2 / steps, rel=0.01)
    assert float(values.abs().max()) > 2 * float(keys.abs().max())


def test_the_format_is_that_of_compressed_tensors(checkpoint: Path, kv: str) -> None:
    scheme = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    args = scheme["kv_cache_scheme"]
    assert (args["num_bits"], args["strategy"], args["dynamic"]) == (8, "tensor", False)
    assert args["type"] == ("float" if kv == "fp8" else "int")
    tensors = load_file(checkpoint / "model.safetensors")
    for block in range(2):
        for side in SIDES:
            scale = tensors[f"model.layers.{block}.self_attn.{side}"]
            assert scale.shape == (1,)
            assert scale.dtype == torch.bfloat16
            assert float(scale) > 0
    manifest = json.loads((checkpoint / "quantkit.json").read_text())["kv_cache"]
    chosen = manifest["ranges"]["model.layers.1.self_attn"]["keys"]
    assert chosen["errors"][chosen["observer"]] == min(chosen["errors"].values())


def test_inspect_and_report_show_the_ranges(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(checkpoint)]) == 0
    assert run(["report", str(checkpoint), "-o", str(tmp_path / "r.html")]) == 0
    html = (tmp_path / "r.html").read_text()
    shown = capfd.readouterr().out
    for side in SIDES:
        assert side in shown
        assert f"model.layers.1.self_attn.{side}" in html


def test_transformers_computes_what_the_reference_computes(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    stored = load_file(checkpoint / "model.safetensors")
    for block, layer in enumerate(theirs.model.layers):
        for side in SIDES:
            scale = stored[f"model.layers.{block}.self_attn.{side}"]
            assert torch.equal(getattr(layer.self_attn, side).data, scale)
    with torch.no_grad():
        logits = theirs(IDS[:1], use_cache=False).logits[0].float()
    ours = load_runtime(checkpoint, kernels="reference").logits(IDS[0].tolist())
    assert float((logits - ours).norm() / ours.norm()) < 0.01


def test_kernels_and_modules_round_by_the_stored_scales(checkpoint: Path, kv: str) -> None:
    """Also when they are wrong: then every kernel saturates alike."""
    path = checkpoint / "model.safetensors"
    whole = path.read_bytes()
    ids = IDS[0].tolist()
    try:
        usual = load_runtime(checkpoint, kernels="reference").logits(ids)
        tensors = load_file(path)
        for name in tensors:
            if name.endswith(SIDES):
                tensors[name] = tensors[name] / 16
        save_file(tensors, path, metadata={"format": "pt"})
        results = {}
        for kernels in ("reference", "modules", "native"):
            runtime = load_runtime(checkpoint, kernels=kernels)
            assert runtime.fingerprint["kernels"].endswith(f"+kv-{kv}-static")
            results[kernels] = runtime.logits(ids)
    finally:
        path.write_bytes(whole)
    saturated = results["reference"]
    assert float((saturated - usual).norm() / usual.norm()) > 0.2
    for kernels in ("modules", "native"):
        assert float((results[kernels] - saturated).norm() / saturated.norm()) < 0.05, kernels


def test_missing_and_broken_scales_are_named(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    whole = path.read_bytes()
    name = "model.layers.1.self_attn.v_scale"
    try:
        for value, said in ((None, f"{name}: missing"), (0.0, rf"{name}: \[0.0\] is not one")):
            tensors = load_file(path)
            del tensors[name]
            if value is not None:
                tensors[name] = torch.tensor([value], dtype=torch.bfloat16)
            save_file(tensors, path, metadata={"format": "pt"})
            with pytest.raises(QuantkitError, match=said):
                load_runtime(checkpoint)
            path.write_bytes(whole)
    finally:
        path.write_bytes(whole)


def test_resuming_gives_the_same_scales(tiny: Path, tmp_path: Path, kv: str) -> None:
    recipe = parse_recipe(recipe_text(kv, "w4a16-g64", "{gptq: {feedback: 1.0}}"))
    runs = []
    for resume in (False, True):
        loaded = models.load_source(str(tiny))
        plan = make_plan(recipe, loaded.model, samples=4, seq_len=64)
        if resume:
            (tmp_path / "w" / "blocks" / "0001.json").unlink()
        data = CalibrationData(IDS, "h")
        runs.append(calibrate(loaded, plan, data, tmp_path / "w", resume=resume))
    assert runs[0].caches == runs[1].caches
    assert torch.equal(runs[0].probe.head_input, runs[1].probe.head_input)


def test_what_attention_sees_is_what_the_cache_gives_back(tiny: Path, kv: str) -> None:
    """A sequence in one piece and the same one token by token, through transformers' own cache."""
    from transformers import DynamicCache

    from quantkit.kv_cache import CacheEntry, install_entry

    loaded = models.load_source(str(tiny), dtype=torch.float32)
    spec, scales = KV_CACHES[kv], {side: torch.tensor([0.02]) for side in SIDES}
    for block in loaded.model.model.layers:
        install_entry(block.self_attn, CacheEntry(spec, scales))
    ids = IDS[:1, :12]
    with torch.no_grad():
        whole = loaded.model(ids, use_cache=False).logits[0, -1]
        cache = DynamicCache()
        for i in range(ids.shape[1]):
            out = loaded.model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
    # Sums in another order may move a value over a rounding boundary.
    assert float((out.logits[0, -1] - whole).norm() / whole.norm()) < 0.01
    for layer in cache.layers:
        for held in (layer.keys, layer.values):
            assert held.shape[2] == 12
            assert torch.equal(held, numerics.fake_quantize_input(held, spec, scales["k_scale"]))
