"""Configs, layers and files with anything in them: read as what they say, or refused in words."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.checkpoint.config import build_config, to_args
from quantkit.checkpoint.formats import Reader, open_format
from quantkit.checkpoint.layer import StoredLayer
from quantkit.checkpoint.opened import open_checkpoint
from quantkit.checkpoint.tensors import to_disk
from quantkit.errors import QuantkitError
from quantkit.layers import QuantLinear
from quantkit.numerics import quantize_weight
from quantkit.schemes import SCHEMES, DType, Scheme, parse_scheme
from tests.checkpoint.format_writers import awq, gptq, quantize, write

SHAPE = (64, 128)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
SCHEME: dict[str, Scheme] = {
    **{name: SCHEMES[name] for name in ("w4a16-g32", "w3a16-asym-g32", "w8a8", "w8a8-static")},
    **{name: SCHEMES[name] for name in ("fp8-static", "fp8-block", "nvfp4a16", "mxfp4a16")},
    "int4-int8": parse_scheme({"weight": {"bits": 4, "group_size": 32}, "input": {"bits": 8}}),
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
GPTQ |= {"desc_act": True, "dynamic": {"+:b": {"bits": 8}}, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
AUTO_ROUND = {"quant_method": "auto-round", "packing_format": "auto_round", "bits": 4}
AUTO_ROUND |= {"group_size": 32, "sym": False, "extra_config": {"b": {"bits": 16}}}
OTHERS = {"gptq": GPTQ, "awq": AWQ, "auto-round": AUTO_ROUND}


def weight() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def config(name: str) -> dict[str, Any]:
    if name in OTHERS:
        return copy.deepcopy(OTHERS[name])
    raw = build_config({"a": SCHEME[name]}, ["a", "b"])
    return raw | {"kv_cache_scheme": to_args(SCHEMES["fp8-static"].weight).model_dump()}


def tensors(name: str) -> dict[str, Tensor]:
    """A layer's, as another program or quantkit stores it."""
    if name in OTHERS:
        layer = quantize(weight().half(), 4, 32, symmetric=False, scattered=name == "gptq")
        if name == "awq":
            return awq(layer)
        return gptq(layer, version=1 if name == "gptq" else 2, with_groups=name == "gptq")
    scheme = SCHEME[name]
    q = quantize_weight(weight().bfloat16(), scheme.weight)
    return to_disk(q, scheme, torch.ones(1) if scheme.needs_static_input else None)


NAMES = (*SCHEME, *OTHERS)
TENSORS = {name: tensors(name) for name in NAMES}


def read(raw: dict[str, Any], stored: dict[str, Tensor]) -> tuple[Reader, StoredLayer | None]:
    """A layer by the config's own word of it; None where it leaves the layer out."""
    reader = open_format(raw)
    reader.cache_spec()
    schemes = reader.schemes(["a", "b"], {f"a.{key}" for key in stored})
    if "a" not in schemes:
        return reader, None
    return reader, reader.layer(stored, schemes["a"], SHAPE, "a")


def check(found: StoredLayer, scheme: Scheme) -> None:
    """It is a layer that kernels may be given."""
    q, spec = found.weight, found.weight.spec
    shape = spec.scale_shape(SHAPE)
    assert tuple(q.codes.shape) == SHAPE
    assert tuple(q.scale.shape) == shape
    assert bool(torch.isfinite(q.scale.float()).all())
    assert q.scale.dtype in FLOATS or q.scale.dtype in (torch.uint8, torch.float8_e4m3fn)
    assert (q.zero is None) == spec.symmetric
    for integers in (q.codes, q.zero):
        if spec.dtype is DType.INT and integers is not None:
            assert integers.dtype == torch.int8
            assert int(spec.qmin) <= int(integers.min()) <= int(integers.max()) <= int(spec.qmax)
    if q.zero is not None:
        assert tuple(q.zero.shape) == shape
    if found.order is not None:
        assert torch.equal(found.order.sort().values, torch.arange(SHAPE[1]))
    layer = QuantLinear(q, scheme, None, found.input_scale, order=found.order)
    assert layer(torch.ones(2, SHAPE[1])).shape == (2, SHAPE[0])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read(name: str) -> None:
    reader, found = read(config(name), TENSORS[name])
    assert found is not None
    check(found, reader.schemes(["a"], {f"a.{key}" for key in TENSORS[name]})["a"])


# Configs

_ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.sampled_from([2**31, 2**70, -(2**63)]),
    st.floats(), st.text(max_size=4), st.lists(st.integers(-1, 1), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from(["re:(", "re:.*", "Linear", "a", "group", "block", "tensor", "int", "float"]),
    st.just([[]]), st.just(["Linear"]), st.just({"a": {}}),
)  # fmt: skip


def places(part: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a document."""
    inner = part.items() if isinstance(part, dict) else enumerate(part)
    for key, value in inner:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


@settings(max_examples=150)
@given(name=st.sampled_from(NAMES), data=st.data())
def test_a_config_with_anything_in_it(name: str, data: st.DataObject) -> None:
    raw = config(name)
    path = data.draw(st.sampled_from(list(places(raw))))
    owner = raw
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = data.draw(_ODD)
    try:
        reader, found = read(raw, dict(TENSORS[name]))
    except QuantkitError:
        return
    if found is not None:
        schemes = reader.schemes(["a"], {f"a.{key}" for key in TENSORS[name]})
        check(found, schemes["a"])


# Tensors

_DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int8,
    torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
)  # fmt: skip


def damage(tensor: Tensor, data: st.DataObject) -> Tensor | None:
    """The tensor as a header that lies, or a file with other bytes, would give it; None is gone."""
    kind = data.draw(st.sampled_from(["gone", "dtype", "cast", "shape", "bytes", "empty"]))
    raw = tensor.contiguous().clone()
    if kind == "dtype":  # the same bytes under another name
        width = raw.element_size()
        same = [d for d in _DTYPES if torch.empty(0, dtype=d).element_size() == width]
        return raw.reshape(-1).view(data.draw(st.sampled_from(same))).reshape(raw.shape)
    if kind == "cast":
        return raw.to(data.draw(st.sampled_from(_DTYPES)))
    if kind == "shape":
        shapes = [raw.t() if raw.ndim == 2 else raw[None], raw.reshape(-1), raw[..., :1], raw[:1]]
        return data.draw(st.sampled_from([*shapes, torch.cat((raw, raw))])).contiguous()
    if kind == "bytes":
        flat = raw.reshape(-1).view(torch.uint8)
        place = data.draw(st.integers(0, len(flat) - 1))
        flat[place : place + 8] = data.draw(st.sampled_from([0, 127, 128, 255]))
        return raw
    return None if kind == "gone" else raw[:0]


@settings(max_examples=250)
@given(name=st.sampled_from(NAMES), data=st.data())
def test_a_layer_with_anything_in_it(name: str, data: st.DataObject) -> None:
    stored = dict(TENSORS[name])
    key = data.draw(st.sampled_from(sorted(stored)))
    damaged = damage(stored.pop(key), data)
    if damaged is not None:
        stored[key] = damaged
    try:
        reader, found = read(config(name), stored)
    except QuantkitError:
        return
    if found is not None:
        check(found, reader.schemes(["a"], {f"a.{key}" for key in stored})["a"])


# Files


@pytest.fixture(scope="module")
def folder(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in GPTQ's format."""
    made = tmp_path_factory.mktemp("fuzz") / "gptq"
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    write(small, made, config, gptq, lambda _, x: quantize(x, 4, 32, symmetric=True))
    return made


@settings(max_examples=40)
@given(data=st.data())
def test_a_file_with_anything_in_its_header(folder: Path, data: st.DataObject) -> None:
    path = folder / "model.safetensors"
    good = path.read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    kind = data.draw(st.sampled_from(["cut", "byte", "field"]))
    damaged = bytearray(good)
    if kind == "cut":
        del damaged[data.draw(st.integers(0, len(good) - 1)) :]
    elif kind == "byte":
        damaged[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    else:
        header = json.loads(good[8:end])
        entry = header[data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))]
        entry |= data.draw(
            st.sampled_from([{"dtype": "F16"}, {"dtype": "F4"}, {"dtype": "I16"}, {"dtype": "F32"}])
            | st.just({"shape": [math.prod(entry["shape"])]})
            | st.just({"shape": entry["shape"][::-1]})
            | st.just({"data_offsets": [0, 4]})
        )
        text = json.dumps(header).encode()
        damaged[:end] = len(text).to_bytes(8, "little") + text
    path.write_bytes(damaged)
    try:
        with open_checkpoint(folder) as opened:
            for name in opened.schemes:
                assert tuple(opened.layer(name).weight.codes.shape) == opened.shapes[name]
            for _ in opened.plain():
                pass
    except QuantkitError:
        pass
    finally:
        path.write_bytes(good)
