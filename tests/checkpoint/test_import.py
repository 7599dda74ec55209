"""Other programs' checkpoints: exact weights, the logits of the dequantized model, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.config import build_config
from quantkit.checkpoint.formats import READERS, open_format
from quantkit.checkpoint.opened import open_checkpoint
from quantkit.checkpoint.tensors import to_disk
from quantkit.cli.main import run
from quantkit.errors import QuantkitError, UsageError
from quantkit.model import linear_layers
from quantkit.models.load import load_runtime
from quantkit.numerics import dequantize, quantize_weight
from quantkit.schemes import SCHEMES
from tests.checkpoint.conftest import merging_tokenizer, small_llama
from tests.checkpoint.format_writers import Codes, awq, gptq, quantize, write

SHAPE = (64, 96)
IDS = list(range(5, 38))


def gptq_config(**more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False} | more


AWQ_CONFIG = {
    "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"
}  # fmt: skip


def random_layer(bits: int, group: int, symmetric: bool, scattered: bool = False) -> Codes:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(bits)).half()
    return quantize(weight, bits, group, symmetric=symmetric, scattered=scattered)


def read(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """A layer through the reader: its weight with columns where the model has them, and order."""
    reader = open_format(config)
    [scheme] = reader.schemes(["a"], {"a.qweight"}).values()
    found = reader.layer(tensors, scheme, SHAPE, "a")
    weight = dequantize(found.weight)
    if found.order is None:
        return weight, None
    placed = torch.empty_like(weight)
    placed[:, found.order] = weight
    return placed, found.order


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("group", "scattered"), [(32, False), (-1, False), (32, True)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_weights_are_exact(
    bits: int, symmetric: bool, group: int, scattered: bool, version: int
) -> None:
    layer = random_layer(bits, group, symmetric, scattered)
    fmt = "gptq" if version == 1 else "gptq_v2"
    config = gptq_config(bits=bits, group_size=group, sym=symmetric, checkpoint_format=fmt)
    weight, order = read(config, gptq(layer, version=version, with_groups=scattered))
    assert torch.equal(weight, layer.weight())
    assert (order is not None) == scattered


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, -1])
def test_awq_weights_are_exact(group: int, symmetric: bool) -> None:
    layer = random_layer(4, group, symmetric)
    config = {**AWQ_CONFIG, "group_size": group, "zero_point": not symmetric}
    assert torch.equal(read(config, awq(layer))[0], layer.weight())


@pytest.mark.parametrize(
    ("packing", "pack"),
    [
        ("auto_round:auto_gptq", partial(gptq, with_groups=False)),
        ("auto_round", partial(gptq, version=2, with_groups=False)),
        ("auto_round:gptqmodel", partial(gptq, version=2)),
        ("auto_round:auto_awq", awq),
    ],
)
def test_auto_round_weights_are_exact(
    packing: str, pack: Callable[[Codes], dict[str, Tensor]]
) -> None:
    layer = random_layer(4, 32, symmetric=False)
    config = gptq_config(quant_method="auto-round", packing_format=packing, data_type="int")
    assert torch.equal(read(config, pack(layer))[0], layer.weight())


def test_layers_have_options_of_their_own() -> None:
    names = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "lm_head"]
    stored = {f"{name}.qweight" for name in names[:2]}
    wide = {"bits": 8, "group_size": 64}
    configs = [
        gptq_config(dynamic={r"+:.*\.up_proj": wide, "-:lm_head": {}}),
        gptq_config(
            quant_method="auto-round", extra_config={names[0]: wide, "lm_head": {"bits": 16}}
        ),
        gptq_config(quant_method="auto-round", extra_config={".*up_proj": wide}),
    ]
    for config in configs:
        schemes = open_format(config).schemes(names, stored)
        labels = {name: scheme.weight.label() for name, scheme in schemes.items()}
        assert labels == {names[0]: "int8 asym g64", names[1]: "int4 asym g32"}


@pytest.mark.parametrize("kind", ["gptq", "act-order", "awq"])
def test_a_model_has_the_logits_of_its_dequantized_twin(
    kind: str, small: Path, tmp_path: Path
) -> None:
    """The twin's weights are products rounded to fp16, as in the reference; the native kernels
    keep codes and scales apart, so that they are off by that rounding."""
    folder = tmp_path / kind
    scattered = kind == "act-order"
    config = AWQ_CONFIG if kind == "awq" else gptq_config(desc_act=scattered)
    plain = write(
        small, folder, config, awq if kind == "awq" else gptq,
        lambda _, weight: quantize(weight, 4, 32, symmetric=False, scattered=scattered),
    )  # fmt: skip
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
        theirs = model(torch.tensor([IDS])).logits[0]
    for kernels, limit in (("native", 1e-3), ("reference", 1e-5)):
        runtime = load_runtime(folder, kernels=kernels, dtype=torch.float32)
        error = (runtime.logits(IDS) - theirs).norm() / theirs.norm()
        assert error < limit, kernels
        if kernels == "native":
            assert ("activation order" in str(runtime.fallback)) == scattered
    assert run(["verify", str(folder)]) == 0
    assert run(["inspect", str(folder)]) == 0


def test_an_older_folder_keeps_its_config_in_a_file_of_its_own(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    write(
        small, folder, {}, gptq, lambda _, weight: quantize(weight, 4, 32, symmetric=True)
    )  # fmt: skip
    document = json.loads((folder / "config.json").read_text())
    del document["quantization_config"]
    (folder / "config.json").write_text(json.dumps(document))
    old = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    (folder / "quantize_config.json").write_text(json.dumps(old))
    assert torch.isfinite(load_runtime(folder).logits(IDS)).all()
    (folder / "quantize_config.json").rename(folder / "quant_config.json")
    with pytest.raises(UsageError, match=r"quant_config\.json without"):
        load_runtime(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes'"),
        (gptq_config(bits=5), "bits 5"),
        (gptq_config(checkpoint_format="marlin"), "checkpoint_format 'marlin'"),
        (gptq_config(is_marlin_format=True), "checkpoint_format 'marlin'"),
        (gptq_config(pack_dtype="int16"), "pack_dtype 'int16'"),
        ({"quant_method": "gptq", "bits": 4}, "has no 'group_size'"),
        (gptq_config(sym="false"), "sym: 'false' is not true or false"),
        (gptq_config(desc_act="yes"), "desc_act: 'yes' is not true or false"),
        ({**AWQ_CONFIG, "zero_point": 0}, "zero_point: 0 is not true or false"),
        (gptq_config(dynamic={"+:(": {}}), "no regular expression"),
        (gptq_config(dynamic={"-:a": {}}), "has a qweight where the config leaves it out"),
        ({**AWQ_CONFIG, "version": "gemv"}, "version 'gemv'"),
        ({**AWQ_CONFIG, "bits": 8}, "bits 8"),
        (gptq_config(quant_method="auto-round", packing_format="mlx"), "packing_format 'mlx'"),
        (gptq_config(quant_method="auto-round", data_type="mx_fp"), "data_type 'mx_fp'"),
        (gptq_config(quant_method="auto-round", act_bits=8), "act_bits 8"),
    ],
)
def test_variants_that_are_not_read(config: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantkitError, match=message.replace("(", r"\(")):
        open_format(config).schemes(["a"], {"a.qweight"})


def test_every_method_has_a_reader_and_is_tested() -> None:
    assert set(READERS) == {"compressed-tensors", "gptq", "awq", "auto-round", "intel/auto-round"}


def without(key: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != key}


def test_damaged_layers() -> None:
    layer = random_layer(4, 32, symmetric=False)
    config, good = gptq_config(), gptq(layer)
    uneven = good["g_idx"].clone()
    uneven[0] = 2
    cases: list[tuple[dict[str, Any], dict[str, Tensor], str]] = [
        (config, without("qzeros", good), r"a\.qzeros: missing"),
        (config, good | {"perm": uneven}, r"a\.perm: a tensor that quantkit does not know"),
        (config, good | {"scales": good["scales"][:1]}, r"a\.scales: stored as \[1, 64\]"),
        (config, good | {"qweight": good["qweight"].float()}, r"a\.qweight: is torch.float32"),
        (config, good | {"g_idx": uneven}, r"columns of its groups number \[31, 32, 33\]"),
        (config, good | {"qzeros": good["qzeros"] | -1}, "a stored zero point of 15"),
        (gptq_config(sym=True), good, "zero points are not in the middle"),
        ({**AWQ_CONFIG, "zero_point": False}, awq(layer), "zero points are not in the middle"),
    ]
    for given, tensors, message in cases:
        with pytest.raises(QuantkitError, match=message):
            read(given, tensors)


def test_compressed_tensors_activation_order() -> None:
    """``actorder: group`` stores which group each column is in: moved together, and exact."""
    from quantkit.checkpoint.config import to_args
    from quantkit.checkpoint.formats import CompressedTensorsReader
    from quantkit.packing import pack_int
    from quantkit.schemes import SCHEMES

    scheme = SCHEMES["w4a16-g32"]
    layer = random_layer(4, 32, symmetric=True, scattered=True)
    tensors = {
        "weight_packed": pack_int((layer.codes - 8).to(torch.int8), 4),
        "weight_scale": layer.scale,
        "weight_shape": torch.tensor(SHAPE),
        "weight_g_idx": layer.group.to(torch.int32),
    }
    group = {"targets": ["Linear"], "weights": to_args(scheme.weight).model_dump()}
    raw = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    found = CompressedTensorsReader(raw).layer(tensors, scheme, SHAPE, "a")
    assert found.order is not None
    placed = torch.empty_like(layer.weight())
    placed[:, found.order] = dequantize(found.weight)
    assert torch.equal(placed, layer.weight())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({"format": "marlin-24"}, "format 'marlin-24'"),
        ({"input": {"num_bits": 4, "type": "float", "group_size": 16}}, "input_activations"),
        ({"input": {"num_bits": 8, "type": "int", "symmetric": False}}, "input_activations"),
        ({"output": {"num_bits": 8, "type": "int"}}, "output_activations"),
        ({"weights": {"num_bits": 8, "type": "float", "group_size": 32,
                      "scale_dtype": "torch.uint8"}}, "MXFP8"),
    ],
)  # fmt: skip
def test_what_compressed_tensors_may_say_and_no_kernel_runs(
    change: dict[str, Any], message: str
) -> None:
    weights = change.pop("weights", {"num_bits": 4, "type": "int", "group_size": 32})
    group = {"targets": ["Linear"], "weights": weights}
    for side in ("input", "output"):
        if side in change:
            group[f"{side}_activations"] = change.pop(side)
    raw = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "format": "pack-quantized",
        **change,
    }
    with pytest.raises(UsageError, match=message):
        open_format(raw).schemes(["a"], set())


def changed(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Store other tensors in a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.0.mlp.up_proj"


def test_tensors_that_are_none_of_the_model(small: Path, tmp_path: Path) -> None:
    """Some writers store zeros where the model has no bias."""
    folder = tmp_path / "awq"
    write(
        small, folder, AWQ_CONFIG, awq, lambda _, weight: quantize(weight, 4, 32, symmetric=False)
    )  # fmt: skip
    plain = load_runtime(folder).logits(IDS)
    changed(folder, lambda t: t.update({f"{UP}.bias": torch.zeros(96).half()}))
    assert torch.equal(load_runtime(folder).logits(IDS), plain)
    changed(folder, lambda t: t[f"{UP}.bias"].fill_(1))
    with pytest.raises(QuantkitError, match=r"up_proj\.bias: stored, where the model has none"):
        load_runtime(folder)
    changed(folder, lambda t: t.update({f"{UP}.bias": torch.zeros(95).half()}))
    with pytest.raises(QuantkitError, match=r"up_proj\.bias: stored as \[95\] where .* \[96\]"):
        load_runtime(folder)
    changed(folder, lambda t: t.pop(f"{UP}.bias"))
    changed(folder, lambda t: t.update({"model.norm.weight": torch.ones(64).int()}))
    with pytest.raises(QuantkitError, match=r"model\.norm\.weight: is torch\.int32 where the mod"):
        load_runtime(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_that_the_config_names_and_no_file_holds(tied: bool, tmp_path: Path) -> None:
    """As AutoRound leaves it; a head that is not tied is missing."""
    model = small_llama(torch.bfloat16)
    model.save_pretrained(tmp_path)
    merging_tokenizer().save_pretrained(tmp_path)
    scheme = SCHEMES["w8a16"]
    names = [name for name in linear_layers(model) if name != "lm_head"]
    tensors = load_file(tmp_path / "model.safetensors")
    for name in names:
        q = quantize_weight(tensors.pop(f"{name}.weight"), scheme.weight)
        tensors |= {f"{name}.{key}": value for key, value in to_disk(q, scheme, None).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["tie_word_embeddings"] = tied
    config["quantization_config"] = build_config(dict.fromkeys([*names, "lm_head"], scheme), [])
    assert config["quantization_config"]["ignore"] == []
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not tied:
        with pytest.raises(QuantkitError, match=r"lm_head\.weight_scale: missing"):
            load_runtime(tmp_path)
        return
    runtime = load_runtime(tmp_path, kernels="reference")
    assert isinstance(runtime.model.get_output_embeddings(), torch.nn.Linear)
    assert torch.isfinite(runtime.logits(IDS)).all()
    with open_checkpoint(tmp_path) as opened:
        assert set(opened.schemes) == set(names)
        assert "lm_head" in opened.shapes


def test_verify_without_a_manifest(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "awq"
    write(
        small, folder, AWQ_CONFIG, awq, lambda _, weight: quantize(weight, 4, 32, symmetric=False)
    )  # fmt: skip
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"][1, 2] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert run(["verify", str(folder)]) == 4
