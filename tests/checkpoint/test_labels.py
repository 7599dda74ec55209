"""compressed-tensors: every label of a layout that writers use, and none of another one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from torch import Tensor

from quantkit.checkpoint.config import build_config, to_args
from quantkit.checkpoint.formats import CompressedTensorsReader
from quantkit.errors import QuantkitError, UsageError
from quantkit.numerics import QTensor, quantize_weight
from quantkit.schemes import SCHEMES, Scheme, parse_scheme

SHAPE = (64, 96)
INT4 = {"bits": 4, "group_size": 32}
SCHEME: dict[str, Scheme] = {
    **SCHEMES,
    "int4-int8": parse_scheme({"weight": INT4, "input": {"bits": 8, "granularity": "token"}}),
    "int4-fp8": parse_scheme(
        {"weight": INT4, "input": {"bits": 8, "dtype": "float", "granularity": "token"}}
    ),
    "int3": parse_scheme({"weight": {"bits": 3, "group_size": 32, "symmetric": False}}),
}


def stored(scheme: Scheme, packed: bool) -> tuple[QTensor, dict[str, Tensor]]:
    """A random layer, and its tensors as the library writes them, codes in words or bytes."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    q = quantize_weight(weight, scheme.weight)
    state = {"weight": weight, "weight_scale": q.scale}
    if q.zero is not None:
        state["weight_zero_point"] = q.zero
    layout = "pack-quantized" if packed else "naive-quantized"
    write = BaseCompressor.get_value_from_registry(layout).compress
    theirs = QuantizationScheme(targets=["Linear"], weights=to_args(scheme.weight))
    return q, write(state, theirs)


def reader(scheme: Scheme, label: str | None, *, in_group: bool) -> CompressedTensorsReader:
    """Of a config that gives every linear layer the scheme, under a label or none."""
    group: dict[str, Any] = {"targets": ["Linear"], "weights": to_args(scheme.weight).model_dump()}
    if scheme.input is not None:
        group["input_activations"] = to_args(scheme.input).model_dump()
    raw: dict[str, Any] = {"quant_method": "compressed-tensors", "config_groups": {"g": group}}
    if label is not None:
        (group if in_group else raw)["format"] = label
    return CompressedTensorsReader(raw)


@pytest.mark.parametrize("in_group", [True, False])
@pytest.mark.parametrize(
    ("name", "label", "packed"),
    [
        ("int4-int8", "int-quantized", False),
        ("int4-int8", "pack-quantized", True),
        ("int4-fp8", "int-quantized", False),
        ("w4a16-g32", "naive-quantized", False),
        ("w4a16-g32", None, True),
        ("w4a16-g32", None, False),
        ("int3", "naive-quantized", False),
        ("w8a16", "int-quantized", False),
        ("w8a16", "naive-quantized", False),
        ("w8a8", "pack-quantized", True),
        ("w8a8", "int-quantized", False),
    ],
)
def test_a_label_of_the_layout_that_is_stored(
    name: str, label: str | None, packed: bool, in_group: bool
) -> None:
    q, tensors = stored(SCHEME[name], packed)
    opened = reader(SCHEME[name], label, in_group=in_group)
    schemes = opened.schemes(["a"], {f"a.{key}" for key in tensors})
    assert (schemes["a"].weight, schemes["a"].input) == (SCHEME[name].weight, SCHEME[name].input)
    found = opened.layer(tensors, schemes["a"], SHAPE, "a").weight
    assert torch.equal(found.codes, q.codes)
    assert torch.equal(found.scale, q.scale)
    assert (found.zero is None) == (q.zero is None)
    assert q.zero is None or torch.equal(found.zero, q.zero)


@pytest.mark.parametrize("packed", [True, False])
def test_a_label_of_a_whole_config_that_says_nothing_of_its_layers(packed: bool) -> None:
    _, tensors = stored(SCHEME["int3"], packed)
    opened = reader(SCHEME["int3"], "mixed-precision", in_group=False)
    assert opened.schemes(["a"], {f"a.{key}" for key in tensors}).keys() == {"a"}


def test_a_layer_that_is_not_quantized_at_all() -> None:
    """It is no other format's, and a tensor is missing."""
    scheme = SCHEME["w4a16-g32"]
    opened = reader(scheme, "pack-quantized", in_group=True)
    [found] = opened.schemes(["a"], {"a.weight"}).values()
    with pytest.raises(QuantkitError, match=r"a\.weight_scale: missing"):
        opened.layer({"weight": torch.zeros(SHAPE)}, found, SHAPE, "a")


@pytest.mark.parametrize(
    ("name", "label", "packed", "actual"),
    [
        ("w4a16-g32", "pack-quantized", False, "int-quantized"),
        ("w4a16-g32", "int-quantized", True, "pack-quantized"),
        ("w8a8", "naive-quantized", True, "pack-quantized"),
        ("w8a8", "pack-quantized", False, "int-quantized"),
        ("w8a8", "float-quantized", False, "int-quantized"),
        ("w4a16-g32", "nvfp4-pack-quantized", True, "pack-quantized"),
    ],
)
def test_a_label_of_another_layout(name: str, label: str, packed: bool, actual: str) -> None:
    scheme = SCHEME[name]
    _, tensors = stored(scheme, packed)
    message = f"format '{label}' for {scheme.name}, which is stored as {actual}"
    with pytest.raises(QuantkitError, match=message) as caught:
        reader(scheme, label, in_group=True).schemes(["a"], {f"a.{key}" for key in tensors})
    assert not isinstance(caught.value, UsageError)


# Rotated inputs


def rotated(**change: Any) -> CompressedTensorsReader:
    """What quantkit writes for two layers, one with rotated inputs; and what is changed of it."""
    layers = {"a": SCHEME["w8a8"], "b": SCHEME["w4a16-g32"]}
    raw = build_config(layers, ["a", "b", "c"], hadamards={"a": 96})
    for key, value in change.items():
        if value is None:
            raw.pop(key, None)
        elif isinstance(value, dict) and key in raw:
            raw[key] = {**raw[key], **value}
        else:
            raw[key] = value
    return CompressedTensorsReader(raw)


def test_rotated_inputs_come_back() -> None:
    found = rotated()
    assert found.hadamards() == {"a": 96}
    assert found.schemes(["a", "b", "c"], set()) == {"a": SCHEME["w8a8"], "b": SCHEME["w4a16-g32"]}
    groups = found.raw["config_groups"].values()
    assert sorted(g["format"] for g in groups) == [
        "rotated-int-quantized",
        "rotated-pack-quantized",
    ]
    assert found.raw["format"] == "rotated-mixed-precision"
    _, tensors = stored(SCHEME["w8a8"], packed=False)
    assert found.layer(tensors, SCHEME["w8a8"], SHAPE, "a").hadamard == 96
    assert found.layer(tensors, SCHEME["w8a8"], SHAPE, "b").hadamard == 0


def test_compressed_tensors_itself_refuses_rotated_inputs() -> None:
    """So does everything that parses its configs with it, as transformers does; and its parts, as
    vLLM does, whose 4-bit floats never meet the format."""
    raw = rotated().raw
    with pytest.raises(ValueError, match="rotated-int-quantized"):
        QuantizationConfig(**{k: v for k, v in raw.items() if v is not None})
    for group in raw["config_groups"].values():
        with pytest.raises(ValueError, match="rotated_inputs"):
            QuantizationArgs(**group["weights"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotated_inputs": None}, "formats .*rotated-mixed-precision.* without rotated_inputs"),
        (
            {"format": "mixed-precision"},
            "formats .* with rotated_inputs; all begin with 'rotated-'",
        ),
        ({"format": "rotated-marlin"}, "format 'rotated-marlin': not one"),
        ({"rotated_inputs": {"matrix": "random"}}, "rotated_inputs: 'random' with"),
        ({"rotated_inputs": {"seed": 3}}, r"rotated_inputs: 'sylvester-paley' with .*'seed'"),
        ({"rotated_inputs": {"orders": {}}}, "rotated_inputs: names no layer"),
        ({"rotated_inputs": {"orders": {"a": 1}}}, "a: no Hadamard matrix of order 1"),
        ({"rotated_inputs": {"orders": {"a": 18}}}, "a: no Hadamard matrix of order 18"),
        ({"rotated_inputs": {"orders": {"a": "many"}}}, "rotated_inputs: a"),
        ({"rotated_inputs": {"orders": {"c": 96}}}, "c is no quantized layer of the model"),
        ({"rotated_inputs": {"orders": {"d": 96}}}, "d is no quantized layer of the model"),
    ],
)
def test_rotated_inputs_that_do_not_agree(change: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantkitError, match=message):
        rotated(**change).schemes(["a", "b", "c"], set())


def test_an_order_that_does_not_divide_the_inputs() -> None:
    _, tensors = stored(SCHEME["w8a8"], packed=False)
    found = rotated(rotated_inputs={"orders": {"a": 64}})
    with pytest.raises(QuantkitError, match="a: a Hadamard matrix of order 64 for 96 inputs"):
        found.layer(tensors, SCHEME["w8a8"], SHAPE, "a")
