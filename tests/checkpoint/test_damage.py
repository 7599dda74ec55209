"""Tensors of another shape than the layer's, and folders whose files do not fit together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quantkit.checkpoint.formats import open_format
from quantkit.checkpoint.read import TensorFiles
from quantkit.checkpoint.tensors import from_disk, to_disk
from quantkit.errors import QuantkitError, UsageError
from quantkit.numerics import quantize_weight
from quantkit.schemes import SCHEMES, Scheme, parse_scheme
from tests.checkpoint.format_writers import gptq, quantize

SHAPE = (64, 96)
SCHEME: dict[str, Scheme] = {
    **SCHEMES,
    "int8-tensor": parse_scheme({"weight": {"bits": 8, "granularity": "tensor"}}),
    "int4-bytes": parse_scheme({"weight": {"bits": 4, "group_size": 32, "symmetric": False}}),
    "int5": parse_scheme({"weight": {"bits": 5}}),
}


def layer(name: str) -> dict[str, Tensor]:
    """A random layer's tensors, with an input scale if the scheme asks for one."""
    scheme = SCHEME[name]
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    inputs = torch.ones(1) if scheme.needs_static_input else None
    q = quantize_weight(weight, scheme.weight)
    if name == "int4-bytes":
        assert q.zero is not None
        return {"weight": q.codes, "weight_scale": q.scale, "weight_zero_point": q.zero}
    return to_disk(q, scheme, inputs)


@pytest.mark.parametrize(
    ("name", "key", "size", "message"),
    [
        # As many words, or more than enough: both would give codes of the layer's shape.
        ("w4a16-g32", "weight_packed", (32, 24), r"stored as \[32, 24\] where the layer has"),
        ("w4a16-g32", "weight_packed", (64, 13), r"stored as \[64, 13\] where the layer has"),
        ("int5", "weight_packed", (64, 16), r"stored as \[64, 16\] where the layer has"),
        ("w4a16-asym-g32", "weight_zero_point", (3, 8), r"stored as \[3, 8\] where the layer has"),
        ("mxfp4a16", "weight_packed", (32, 96), r"stored as \[32, 96\] where the layer has"),
        ("w8a8", "weight", (96, 64), r"stored as \[96, 64\] where the layer has"),
        ("w4a16-g32", "weight_scale", (64, 2), r"stored as \[64, 2\] where the layer has"),
        ("w4a16-g32", "weight_scale", (3, 64), r"stored as \[3, 64\] where the layer has"),
        ("w8a16", "weight_scale", (63, 1), r"stored as \[63, 1\] where the layer has"),
        ("int8-tensor", "weight_scale", (64, 1), r"stored as \[64, 1\] where the layer has"),
        ("nvfp4a16", "weight_global_scale", (2,), r"stored as \[2\] where the layer has"),
        ("w8a8-static", "input_scale", (2,), r"stored as \[2\] where the layer has"),
    ],
)
def test_a_tensor_of_another_shape(
    name: str, key: str, size: tuple[int, ...], message: str
) -> None:
    tensors = layer(name)
    assert key in tensors
    tensors[key] = torch.zeros(size, dtype=tensors[key].dtype)
    with pytest.raises(QuantkitError, match=rf"a\.{key}: {message}"):
        from_disk(tensors, SCHEME[name], SHAPE, "a")


def test_words_that_note_another_shape() -> None:
    """95 columns fill as many words as 96."""
    tensors = layer("w4a16-g32") | {"weight_shape": torch.tensor([64, 95])}
    with pytest.raises(QuantkitError, match=r"a\.weight_shape: says \[64, 95\]"):
        from_disk(tensors, SCHEME["w4a16-g32"], SHAPE, "a")


def test_exponents_of_another_dtype() -> None:
    tensors = layer("mxfp4a16")
    tensors["weight_scale"] = tensors["weight_scale"].to(torch.bfloat16)
    with pytest.raises(QuantkitError, match=r"weight_scale: is torch\.bfloat16"):
        from_disk(tensors, SCHEME["mxfp4a16"], SHAPE, "a")


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("w4a16-g32", "weight_scale", torch.full((64, 3), torch.nan), "holds NaN or infinity"),
        ("w8a16", "weight_scale", torch.full((64, 1), torch.inf), "holds NaN or infinity"),
        ("w8a16", "weight_scale", torch.ones(64, 1, dtype=torch.int16), "is torch.int16, not a fl"),
        ("w8a16", "weight_scale", torch.ones(64, 1).double(), "is torch.float64, not a float of"),
        (
            "nvfp4a16",
            "weight_scale",
            torch.full((64, 6), 127, dtype=torch.uint8).view(torch.float8_e4m3fn),
            "holds NaN or infinity",
        ),
        ("mxfp4a16", "weight_scale", torch.full((64, 3), 255).byte(), "holds NaN or infinity"),
        ("nvfp4a16", "weight_global_scale", torch.zeros(1), "is 0, which nothing can be divided"),
        ("w8a8-static", "input_scale", torch.zeros(1), "is 0, which nothing can be divided by"),
        ("w8a8-static", "input_scale", torch.tensor([-1.0]), "is -1, which nothing can be divid"),
        ("fp8-static", "input_scale", torch.tensor([torch.nan]), "holds NaN or infinity"),
        (
            "int4-bytes",
            "weight",
            torch.full((64, 96), 8).char(),
            "8 to 8, where 4 bits are -8 to 7",
        ),
        ("int4-bytes", "weight_zero_point", torch.full((64, 3), -9), "-9 to -9, where 4 bits are"),
        ("int4-bytes", "weight_zero_point", torch.ones(64, 3), "is torch.float32, not integers"),
    ],
)
def test_numbers_that_a_layer_cannot_have(name: str, key: str, value: Tensor, message: str) -> None:
    tensors = layer(name)
    from_disk(tensors, SCHEME[name], SHAPE, "a")
    assert key in tensors
    with pytest.raises(QuantkitError, match=rf"a\.{key}: .*{message}"):
        from_disk(tensors | {key: value}, SCHEME[name], SHAPE, "a")


def test_zero_points_of_a_wider_type() -> None:
    tensors = layer("int4-bytes")
    expected = from_disk(tensors, SCHEME["int4-bytes"], SHAPE, "a").weight
    tensors["weight_zero_point"] = tensors["weight_zero_point"].long()
    found = from_disk(tensors, SCHEME["int4-bytes"], SHAPE, "a").weight
    assert found.zero is not None
    assert expected.zero is not None
    assert found.zero.dtype == torch.int8
    assert torch.equal(found.zero, expected.zero)


def test_inputs_that_their_groups_do_not_divide() -> None:
    with pytest.raises(UsageError, match="a: scales of 128 inputs each, which do not divide 96"):
        from_disk(layer("fp8-block"), SCHEME["fp8-block"], SHAPE, "a")


def test_scales_whose_axes_of_one_are_missing() -> None:
    """Writers differ there."""
    for name, size in (("int8-tensor", ()), ("int8-tensor", (1, 1)), ("w8a16", (64,))):
        tensors = layer(name)
        expected = from_disk(tensors, SCHEME[name], SHAPE, "a").weight
        tensors["weight_scale"] = tensors["weight_scale"].reshape(size)
        found = from_disk(tensors, SCHEME[name], SHAPE, "a").weight
        assert torch.equal(found.scale, expected.scale)
        assert found.scale.shape == expected.scale.shape


@pytest.mark.parametrize("columns", [2, 64, 97])
def test_groups_of_another_number_of_columns(columns: int) -> None:
    """Fewer columns than groups, fewer than the layer has, and more."""
    message = rf"g_idx: stored as \[{columns}\] where the layer has \[96\]"
    groups = torch.arange(columns, dtype=torch.int32) // 32
    ours = layer("w4a16-g32") | {"weight_g_idx": groups}
    with pytest.raises(QuantkitError, match=message):
        from_disk(ours, SCHEME["w4a16-g32"], SHAPE, "a")
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).half()
    theirs = gptq(quantize(weight, 4, 32, symmetric=True)) | {"g_idx": groups}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    reader = open_format(config)
    [scheme] = reader.schemes(["a"], {"a.qweight"}).values()
    with pytest.raises(QuantkitError, match=message):
        reader.layer(theirs, scheme, SHAPE, "a")


def gptq_layer(config: dict[str, Any], shape: tuple[int, int] = SHAPE) -> dict[str, Tensor]:
    """A layer with scattered columns, of the bits that a config says."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).half()
    return gptq(quantize(weight, config["bits"], 32, symmetric=True, scattered=True))


def test_groups_without_end() -> None:
    """A count of each group would take 16 GiB."""
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    tensors = gptq_layer(config)
    tensors["g_idx"][5] = 2**31 - 1
    reader = open_format(config)
    [scheme] = reader.schemes(["a"], {"a.qweight"}).values()
    with pytest.raises(UsageError, match="columns of its groups number"):
        reader.layer(tensors, scheme, SHAPE, "a")


@pytest.mark.parametrize("more", [{}, {"static_groups": True}, {"group_size": -1}])
def test_scattered_columns_that_nothing_places(more: dict[str, Any]) -> None:
    """Static groups lie together, and one group is all there is of a channel."""
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True}
    config |= more
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).half()
    tensors = gptq(quantize(weight, 4, config["group_size"], symmetric=True), with_groups=False)
    reader = open_format(config)
    [scheme] = reader.schemes(["a"], {"a.qweight"}).values()
    if more:
        assert reader.layer(tensors, scheme, SHAPE, "a").order is None
        return
    with pytest.raises(QuantkitError, match=r"a\.g_idx: missing, where desc_act"):
        reader.layer(tensors, scheme, SHAPE, "a")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_outputs_that_end_within_a_word(method: str) -> None:
    config = {"quant_method": method, "bits": 4, "group_size": 32}
    reader = open_format(config)
    [scheme] = reader.schemes(["a"], {"a.qweight"}).values()
    with pytest.raises(UsageError, match="a: 12 codes of 4 bits do not fill words"):
        reader.layer({}, scheme, (12, 96), "a")


def test_a_type_of_numbers_that_torch_lacks(tmp_path: Path) -> None:
    header = {"a.weight": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}
    text = json.dumps(header).encode()
    (tmp_path / "0.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"abc")
    with (
        pytest.raises(QuantkitError, match=r"a\.weight: cannot be read|0\.safetensors: truncated"),
        TensorFiles(tmp_path) as files,
    ):
        files.tensor("a.weight")


def shards(folder: Path, *files: tuple[str, ...]) -> Path:
    """A folder of files that hold tensors of these names."""
    for i, names in enumerate(files):
        save_file({name: torch.zeros(1) for name in names}, folder / f"{i}.safetensors")
    return folder


def test_a_shard_that_the_index_names_and_the_folder_lacks(tmp_path: Path) -> None:
    shards(tmp_path, ("a", "b"))
    listed = {"a": "0.safetensors", "b": "0.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    with TensorFiles(tmp_path) as files:
        assert files.names == ["a", "b"]
    index.write_text(json.dumps({"weight_map": listed | {"c": "1.safetensors"}}))
    with pytest.raises(QuantkitError, match=r"c is missing, which the index places in 1\.safet"):
        TensorFiles(tmp_path)
    index.write_text(json.dumps({"weight_map": ["a"]}))
    with pytest.raises(QuantkitError, match=r"weight_map: .* where an object"):
        TensorFiles(tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match=r"1\.safetensors: b is in another file"):
        TensorFiles(shards(tmp_path, ("a", "b"), ("b", "c")))


def test_two_tensors_of_one_name_in_memory(tmp_path: Path) -> None:
    with TensorFiles(shards(tmp_path, ("embed_out.weight", "lm_head.weight"))) as files:
        names = dict.fromkeys(files.names, "lm_head.weight")
        with pytest.raises(QuantkitError, match=r"embed_out\.weight and lm_head\.weight are both"):
            files.rename(names)
        files.rename({"embed_out.weight": "head.weight", "lm_head.weight": "lm_head.weight"})
        assert files.stored_name("head.weight") == "embed_out.weight"
        assert files.stored_module("head") == "embed_out"
