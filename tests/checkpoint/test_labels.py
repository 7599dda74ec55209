"""compressed-tensors: every label of a layout that writers use, and none of another one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

from quantkit.checkpoint.config import to_args
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
