"""Tensors of another shape than the layer's, and folders whose files do not fit together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quantkit.checkpoint.formats import open_format
from quantkit.checkpoint.read import TensorFiles
from quantkit.checkpoint.tensors import from_disk, to_disk
from quantkit.errors import QuantkitError
from quantkit.numerics import quantize_weight
from quantkit.schemes import SCHEMES, Scheme, parse_scheme
from tests.checkpoint.format_writers import gptq, quantize

SHAPE = (64, 96)
SCHEME: dict[str, Scheme] = {
    **SCHEMES,
    "int8-tensor": parse_scheme({"weight": {"bits": 8, "granularity": "tensor"}}),
    "int5": parse_scheme({"weight": {"bits": 5}}),
}


def layer(name: str) -> dict[str, Tensor]:
    """A random layer's tensors, with an input scale if the scheme asks for one."""
    scheme = SCHEME[name]
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    inputs = torch.ones(1) if scheme.needs_static_input else None
    return to_disk(quantize_weight(weight, scheme.weight), scheme, inputs)


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
