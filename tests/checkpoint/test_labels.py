"""compressed-tensors: every label of a layout that writers use, and none of another one."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from torch import Tensor

from quantkit.checkpoint.config import build_config, from_args, to_args
from quantkit.checkpoint.formats import CompressedTensorsReader, Reader, open_format
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


def group(scheme: str, *targets: str) -> dict[str, Any]:
    return {"targets": list(targets), "weights": to_args(SCHEMES[scheme].weight).model_dump()}


def opened(*groups: dict[str, Any], **more: Any) -> Reader:
    raw = {"quant_method": "compressed-tensors", **more}
    return open_format(raw | {"config_groups": {f"group_{i}": g for i, g in enumerate(groups)}})


def test_the_target_that_fits_best_counts() -> None:
    """A name before a pattern, a pattern before the class, in whichever order groups stand; what is
    ignored has none. So does compressed-tensors itself."""
    names = ["m.a_proj", "m.b_proj", "m.c_proj", "m.head"]
    groups = [
        group("w4a16-g32", "Linear"),
        group("w8a16", "re:.*[ab]_proj"),
        group("w4a16-g64", "m.a_proj"),
    ]
    expected = {"m.a_proj": "w4a16-g64", "m.b_proj": "w8a16", "m.c_proj": "w4a16-g32"}
    model = torch.nn.ModuleDict({"m": torch.nn.ModuleDict()})
    for name in names:
        model["m"].register_module(name.removeprefix("m."), torch.nn.Linear(64, 64, bias=False))
    for order in itertools.permutations(groups):
        found = opened(*order, ignore=["re:.*head"]).schemes(names, set())
        assert {name: scheme.name for name, scheme in found.items()} == expected
        theirs = copy.deepcopy(model)
        config = {f"group_{i}": QuantizationScheme(**g) for i, g in enumerate(order)}
        apply_quantization_config(
            theirs, QuantizationConfig(config_groups=config, ignore=["re:.*head"])
        )
        for name in names:
            scheme = getattr(theirs.get_submodule(name), "quantization_scheme", None)
            assert (scheme is None) == (name not in expected)
            if scheme is not None:
                assert from_args(scheme.weights) == found[name].weight


def test_every_linear_layer_may_be_ignored() -> None:
    assert opened(group("w8a16", "Linear"), ignore=["Linear"]).schemes(["a"], set()) == {}


def test_a_config_one_level_below() -> None:
    inner = {"config_groups": {"g": group("w8a16", "Linear")}, "format": "pack-quantized"}
    raw = {"quant_method": "compressed-tensors", "quantization_config": inner}
    assert open_format(raw).schemes(["a"], set()) == {"a": SCHEMES["w8a16"]}
    sparse = {**raw, "sparsity_config": {"format": "sparse-24-bitmask"}}
    with pytest.raises(UsageError, match="sparse-24-bitmask"):
        open_format(sparse).schemes(["a"], set())


def test_a_group_of_no_weights() -> None:
    """Rounded queries and keys would be left out without a word."""
    args = to_args(SCHEMES["fp8-static"].weight).model_dump()
    attention = {"targets": ["LlamaAttention"], "input_activations": args}
    with pytest.raises(UsageError, match="activations of LlamaAttention without weights"):
        opened(group("w8a16", "Linear"), attention).schemes(["a"], set())
    nothing = {"targets": ["LlamaAttention"]}
    assert opened(group("w8a16", "Linear"), nothing).schemes(["a"], set()).keys() == {"a"}


@pytest.mark.parametrize("block", [[0, 128], [128], [128, 128, 128], [128, 2**31]])
def test_blocks_that_are_none(block: list[int]) -> None:
    given = group("fp8-block", "Linear")
    given["weights"]["block_structure"] = block
    with pytest.raises(UsageError, match="block_structure"):
        opened(given).schemes(["a"], set())


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
