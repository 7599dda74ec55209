"""The scheme table agrees with itself and with what is stored."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from quantkit import numerics, packing
from quantkit.errors import UsageError
from quantkit.schemes import (
    SCHEMES,
    DType,
    Granularity,
    QuantSpec,
    ScaleFormat,
    Scheme,
    parse_scheme,
)

ROWS = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)

#: Divisible by every group size of the table; N is not a multiple of a 128-row block.
SHAPE = (200, 768)


def stored_tensors(q: numerics.QTensor) -> list[torch.Tensor]:
    """What a checkpoint holds for this weight."""
    spec = q.spec
    if spec.dtype is DType.INT and spec.bits < 8:
        codes = packing.pack_int(q.codes, spec.bits)
    elif spec.dtype is DType.FLOAT and spec.bits == 4:
        codes = packing.pack_fp4(q.codes)
    else:
        codes = q.codes
    tensors = [codes, q.scale]
    if q.zero is not None:
        tensors.append(packing.pack_int(q.zero, spec.bits, dim=0))
    if q.global_scale is not None:
        tensors.append(q.global_scale)
    return tensors


@ROWS
def test_names_are_keys_and_parse(scheme: Scheme) -> None:
    assert parse_scheme(scheme.name) is SCHEMES[scheme.name]
    assert scheme.describe()


@ROWS
def test_stored_bits_are_the_bits_stored(scheme: Scheme) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    q = numerics.quantize_weight(weight, scheme.weight)
    assert tuple(q.scale.shape) == scheme.weight.scale_shape(SHAPE)
    stored = sum(t.numel() * t.element_size() * 8 for t in stored_tensors(q))
    assert scheme.weight.stored_bits(SHAPE) == stored


@ROWS
def test_codes_stay_in_range_and_reach_the_end(scheme: Scheme) -> None:
    spec = scheme.weight
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    values = numerics.code_values(numerics.quantize_weight(weight, spec))
    assert values.min() >= spec.qmin
    assert values.max() <= spec.qmax
    assert max(-values.min() / -spec.qmin, values.max() / spec.qmax) == 1


@ROWS
def test_inputs_are_8_bit_and_symmetric(scheme: Scheme) -> None:
    assert scheme.needs_static_input == (scheme.input is not None and not scheme.input.dynamic)
    if scheme.input is not None:
        assert scheme.input.bits == 8
        assert scheme.input.symmetric
        assert scheme.input.dtype is scheme.weight.dtype


def test_equal_rows_do_not_hide_behind_two_names() -> None:
    specs = [(s.weight, s.input) for s in SCHEMES.values()]
    assert len(set(specs)) == len(specs)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (QuantSpec(8, granularity=Granularity.TENSOR), (1,)),
        (QuantSpec(4), (200, 1)),
        (QuantSpec(4, granularity=Granularity.GROUP, group_size=64), (200, 12)),
        (QuantSpec(8, DType.FLOAT, Granularity.BLOCK, block=(128, 128)), (2, 6)),
    ],
)
def test_scale_shapes(spec: QuantSpec, shape: tuple[int, ...]) -> None:
    assert spec.scale_shape(SHAPE) == shape


@pytest.mark.parametrize(
    ("bits", "k", "words"), [(4, 768, 96), (3, 768, 72), (3, 11, 2), (5, 64, 10), (2, 1, 1)]
)
def test_rows_of_codes_are_padded_to_words(bits: int, k: int, words: int) -> None:
    assert QuantSpec(bits).stored_bits((3, k)) == 3 * (words * 32 + 16)


def test_a_group_that_does_not_fit_names_those_that_do() -> None:
    with pytest.raises(UsageError) as caught:
        SCHEMES["w4a16-g128"].weight.scale_shape((64, 576))
    assert str(caught.value) == (
        "in_features 576 is not divisible by group 128; try 16 or 32 or 64 or 96 or 192"
    )


def test_generic_schemes() -> None:
    scheme = parse_scheme(
        {
            "weight": {"bits": 5, "group_size": 64, "symmetric": False},
            "input": {"bits": 8, "granularity": "token"},
        }
    )
    assert scheme.weight == QuantSpec(
        5, granularity=Granularity.GROUP, group_size=64, symmetric=False
    )
    assert scheme.input == QuantSpec(8, granularity=Granularity.TOKEN, dynamic=True)
    assert scheme.name == "int5-asym-g64-x-int8-sym-token-dynamic"
    block = parse_scheme({"weight": {"bits": 8, "dtype": "float", "block": [64, 32]}})
    assert block.weight.block == (64, 32)
    assert block.name == "fp8-block-64x32"
    mx = parse_scheme(
        {"weight": {"bits": 4, "dtype": "float", "group_size": 32, "scale": "e8m0"}}
    ).weight
    assert mx == SCHEMES["mxfp4a16"].weight
    assert mx.scale is ScaleFormat.E8M0


@ROWS
def test_every_row_can_be_spelled_out(scheme: Scheme) -> None:
    def spelled(spec: QuantSpec) -> dict[str, Any]:
        keys = ("bits", "dtype", "granularity", "group_size", "block", "symmetric", "dynamic")
        values = {key: getattr(spec, key) for key in keys} | {"scale": spec.scale}
        return {k: v for k, v in values.items() if v is not None}

    raw = {"weight": spelled(scheme.weight)}
    if scheme.input:
        raw["input"] = spelled(scheme.input)
    again = parse_scheme(raw)
    assert (again.weight, again.input) == (scheme.weight, scheme.input)


MISTAKES: list[tuple[Any, str]] = [
    ("w8a9", "unknown scheme 'w8a9'; did you mean 'w8a8'?"),
    ({"wieght": {"bits": 4}}, "a spelled-out scheme has the keys weight and, optionally, input"),
    ({"weight": 4}, "spec 4: a spec is a mapping with at least `bits`"),
    ({"weight": {"group_size": 4}}, "a spec is a mapping with at least `bits`"),
    ({"weight": {"bits": 4, "grop": 1}}, "unknown key 'grop' in a spec; known: bits, dtype"),
    ({"weight": {"bits": "4"}}, "bits: '4' is not a whole number"),
    ({"weight": {"bits": True}}, "bits: True is not a whole number"),
    ({"weight": {"bits": 1}}, "int1: integer codes have 2 to 8 bits"),
    ({"weight": {"bits": 4, "symmetric": "no"}}, "symmetric: 'no' is not true or false"),
    ({"weight": {"bits": 4, "dtype": "posit"}}, "'posit' is not a valid DType"),
    ({"weight": {"bits": 4, "granularity": "row"}}, "'row' is not a valid Granularity"),
    ({"weight": {"bits": 6, "dtype": "float"}}, "float codes have 4 bits (E2M1) or 8 (E4M3)"),
    (
        {"weight": {"bits": 8, "dtype": "float", "symmetric": False}},
        "asymmetric float codes are not a format; set symmetric: true",
    ),
    (
        {"weight": {"bits": 4, "granularity": "channel", "group_size": 64}},
        "group_size goes with granularity group, and only with it",
    ),
    ({"weight": {"bits": 4, "granularity": "group"}}, "group_size None"),
    ({"weight": {"bits": 4, "granularity": "block"}}, "block goes with granularity block"),
    ({"weight": {"bits": 4, "block": [1]}}, "block: [1] is not [rows, columns]"),
    ({"weight": {"bits": 4, "granularity": "group", "group_size": -1}}, "must be at least 1"),
    ({"weight": {"bits": 4, "granularity": "token"}}, "scales per token are dynamic"),
    ({"weight": {"bits": 4, "dynamic": True}}, "weights have static scales; drop the key"),
    ({"weight": {"bits": 4, "dtype": "float"}}, "float4 needs a scale format"),
    (
        {"weight": {"bits": 4, "dtype": "float", "group_size": 64, "scale": "e8m0"}},
        "e8m0 scales belong to float4 codes in groups of 32",
    ),
    (
        {"weight": {"bits": 8}, "input": {"bits": 4}},
        "activations are symmetric int8 or fp8; set bits: 8 and symmetric: true",
    ),
    (
        {"weight": {"bits": 8}, "input": {"bits": 8, "granularity": "channel"}},
        "granularity channel does not apply to activations; use token, tensor or group",
    ),
]


@pytest.mark.parametrize(("raw", "message"), MISTAKES, ids=[m[-40:] for _, m in MISTAKES])
def test_mistakes_in_specs(raw: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_scheme(raw)
    assert message in str(caught.value)


def test_bits_per_weight_are_sensible() -> None:
    n, k = SHAPE
    for scheme in SCHEMES.values():
        per_weight = scheme.weight.stored_bits(SHAPE) / (n * k)
        assert scheme.weight.bits <= per_weight < scheme.weight.bits + 1, scheme.name
    assert math.isclose(SCHEMES["w4a16-g64"].weight.stored_bits(SHAPE) / (n * k), 4.25)
