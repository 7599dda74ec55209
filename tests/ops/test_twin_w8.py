"""The tensor-core kernels for 8-bit weights, run by the host twin, against the fp64 oracle."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import c_abi
import pytest
import torch
import twin
from ops_cases import relative_error, same_bits
from torch import Tensor

from quantkit import ops
from quantkit.ops import reference

KINDS = {"int8": c_abi.I8, "fp8": c_abi.F8}


def random_codes(kind: str, rows: int, columns: int) -> Tensor:
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    if kind == "int8":
        return codes.view(torch.int8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN has a test of its own
    return codes.view(torch.float8_e4m3fn)


@dataclass(frozen=True)
class Layer:
    """A random weight in the kernels' layout."""

    kind: str
    codes: Tensor
    packed: Tensor
    scale: Tensor  # [N, groups], as the checkpoint has it
    bias: Tensor | None
    group_size: int

    def spread(self, table: Tensor) -> Tensor:
        """[..., groups] -> [..., K] in fp64."""
        k = self.codes.shape[1]
        group = torch.arange(k) // (k if self.group_size == -1 else self.group_size)
        return table.double()[..., group]

    def exact(self, x: Tensor) -> Tensor:
        """[m, N] in fp64, for the values of x."""
        y = x.double() @ (self.codes.double() * self.spread(self.scale)).t()
        return y if self.bias is None else y + self.bias.double()


def random_layer(
    kind: str, n: int, k: int, group_size: int, dtype: torch.dtype, *, bias: bool = False
) -> Layer:
    codes = random_codes(kind, n, k)
    groups = 1 if group_size == -1 else -(-k // group_size)
    scale = (torch.rand(n, groups) * 0.1 + 0.01).to(dtype)
    added = torch.randn(n).to(dtype) if bias else None
    return Layer(kind, codes, ops.pack_w8_mma(codes), scale, added, group_size)


class Call:
    """What both operators share: sizes, scratch memory and guards around y."""

    def __init__(self, layer: Layer, x: Tensor, dtype: torch.dtype, multiprocessors: int) -> None:
        library = twin.library()
        library.qk_cuda_w4a16_partials.restype = ctypes.c_int64
        (self.m, k), self.n = x.shape, layer.codes.shape[0]
        self.whole = torch.full((self.m, self.n + 3), torch.nan, dtype=dtype)
        self.y = self.whole[:, 1 : self.n + 1]
        shape = [ctypes.c_int64(v) for v in (self.m, self.n, k)]
        count = library.qk_cuda_w4a16_partials(*shape, ctypes.c_int32(multiprocessors))
        self.partials = torch.full((max(count, 1),), torch.nan)
        self.counters = ops.new_w4a16_counters(self.n, "cpu")
        self.outputs = (self.whole, self.partials, self.counters)
        self.args = {
            "x": x.data_ptr(),
            "ldx": x.stride(0),
            "format": KINDS[layer.kind],
            "m": self.m,
            "n": self.n,
            "k": k,
            "group_size": layer.group_size if layer.group_size > 0 else k,
            "groups": layer.scale.shape[1],
            "packed": layer.packed.data_ptr(),
            "bias": None if layer.bias is None else layer.bias.data_ptr(),
            "y": self.y.data_ptr(),
            "ldy": self.whole.stride(0),
            "partials": self.partials.data_ptr(),
            "counters": self.counters.data_ptr(),
            "multiprocessors": multiprocessors,
        }

    def finish(self, status: int) -> Tensor:
        twin.check(status)
        assert self.whole[:, 0].isnan().all()
        assert self.whole[:, self.n + 1 :].isnan().all()
        assert not self.counters.any()
        return self.y


def w8a16(layer: Layer, x: Tensor, multiprocessors: int = 4) -> Tensor:
    call = Call(layer, x, x.dtype, multiprocessors)
    scale = ops.pack_w4a16_table(layer.scale.to(x.dtype))
    twin.watch(x, layer.packed, scale, layer.bias, outputs=call.outputs)
    args = c_abi.W8A16Args(**call.args, dtype=c_abi.DTYPES[x.dtype], scale=scale.data_ptr())
    return call.finish(twin.library().qk_cuda_w8a16_linear(ctypes.byref(args), None))


def w8a8(
    layer: Layer,
    xq: Tensor,
    x_scale: Tensor,
    out_dtype: torch.dtype = torch.float32,
    multiprocessors: int = 4,
) -> Tensor:
    call = Call(layer, xq, out_dtype, multiprocessors)
    grouped = layer.scale.shape[1] > 1
    scale = ops.pack_w4a16_table(layer.scale.float()) if grouped else layer.scale.float()
    twin.watch(xq, x_scale, layer.packed, scale, layer.bias, outputs=call.outputs)
    args = c_abi.W8A8Args(
        **call.args,
        x_scale=x_scale.data_ptr(),
        x_scale_dtype=c_abi.DTYPES[x_scale.dtype],
        x_scale_stride=0 if x_scale.numel() == 1 else x_scale.shape[1],
        scale=scale.data_ptr(),
        bias_dtype=0 if layer.bias is None else c_abi.DTYPES[layer.bias.dtype],
        y_dtype=c_abi.DTYPES[out_dtype],
    )
    return call.finish(twin.library().qk_cuda_w8a8_linear(ctypes.byref(args), None))


def test_packing_is_exact_and_where_the_header_says() -> None:
    for kind, n, k in [("int8", 64, 64), ("fp8", 70, 100), ("int8", 1, 1), ("fp8", 130, 320)]:
        codes = random_codes(kind, n, k)
        packed = ops.pack_w8_mma(codes)
        assert packed.shape == (-(-n // 64), -(-k // 64), 4096)
        assert same_bits(ops.unpack_w8_mma(packed, n, k, kind), codes)
    codes = random_codes("int8", 128, 192)
    bytes_ = ops.pack_w8_mma(codes).view(torch.int8).reshape(2, 3, 4, 2, 32, 4, 4)
    for b, slab, tile, half, lane in [(0, 0, 0, 0, 0), (1, 2, 3, 1, 31), (1, 0, 2, 0, 13)]:
        g, t = lane // 4, lane % 4
        for r in range(4):
            row = 64 * b + 16 * tile + g + 8 * (r % 2)
            column = 64 * slab + 32 * half + 8 * t + 4 * (r // 2)
            held = bytes_[b, slab, tile, half, lane, r]
            assert torch.equal(held, codes[row, column : column + 4])


# ---- 16-bit activations ----------------------------------------------------------------------


def allowed(layer: Layer, x: Tensor) -> float:
    """Twice the error of torch with the weight dequantized to the dtype of x."""
    weight = (layer.codes.double() * layer.spread(layer.scale)).to(x.dtype)
    y = torch.nn.functional.linear(x, weight, layer.bias)
    return 2 * relative_error(y, layer.exact(x)) + 2e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [32, 96, 128, -1])
def test_w8a16_matches_the_oracle(kind: str, dtype: torch.dtype, group_size: int) -> None:
    torch.manual_seed(0)
    # One, two and eight rows a tile, several tiles, every number of weight tiles a block, split K,
    # fewer slabs than stages, x aligned and not.
    cases = [(1, 64, 640, 1), (8, 48, 1440, 2), (16, 80, 416, 132), (9, 33, 71, 4)]
    for m, n, k, multiprocessors in [*cases, (33, 96, 416, 4), (65, 70, 200, 4), (40, 20, 75, 4)]:
        layer = random_layer(kind, n, k, group_size, dtype, bias=m > 1)
        x = torch.randn(m, k).to(dtype)
        error = relative_error(w8a16(layer, x, multiprocessors), layer.exact(x))
        assert error <= allowed(layer, x), (m, n, k, error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_decoded_exactly(kind: str, dtype: torch.dtype) -> None:
    codes = torch.arange(256).to(torch.uint8).reshape(4, 64).repeat(16, 1)
    element = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    layer = Layer(
        kind,
        codes.view(element),
        ops.pack_w8_mma(codes.view(element)),
        torch.ones(64, 1, dtype=dtype),
        None,
        -1,
    )
    for first in range(0, 64, 8):  # one column a row of x: y is the weight
        x = torch.eye(64, dtype=dtype)[first : first + 8]
        y = w8a16(layer, x)
        expected = codes.view(element)[:, first : first + 8].t().to(dtype)
        # 0 times a NaN elsewhere in the row of the weight is NaN.
        clean = ~(layer.codes.float().isnan().any(1))
        assert same_bits(y[:, clean] + 0, expected[:, clean] + 0)
        assert y[:, ~clean].isnan().all()


# ---- 8-bit activations -----------------------------------------------------------------------


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_has_the_bits_of_the_cpu_operator(out_dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    cases = [(1, 64, 640, 1), (3, 20, 1, 4), (8, 130, 1440, 2), (16, 80, 4160, 132)]
    for m, n, k, multiprocessors in [*cases, (31, 33, 71, 4), (65, 70, 208, 4), (130, 64, 100, 4)]:
        layer = random_layer("int8", n, k, -1, torch.float32, bias=m > 3)
        xq = random_codes("int8", m, k)
        x_scale = (torch.rand(1 if m == 8 else m, 1) * 0.01).to(out_dtype)
        y = w8a8(layer, xq, x_scale, out_dtype, multiprocessors)
        rest = (layer.codes, layer.scale, layer.bias, out_dtype)
        assert same_bits(y, reference.w8a8_linear(xq, x_scale, *rest)), (m, n, k)


def test_int8_extremes_do_not_overflow() -> None:
    k = 131071
    layer = random_layer("int8", 16, k, -1, torch.float32)
    for w_code, x_code in ((-128, -128), (-128, 127)):
        layer.packed.fill_(w_code % 256)
        xq = torch.full((1, k), x_code, dtype=torch.int8)
        y = w8a8(layer, xq, torch.ones(1, 1))
        expected = float(w_code * x_code * k) * layer.scale.reshape(1, -1)
        assert torch.equal(y, expected)


@pytest.mark.parametrize("group_size", [-1, 64, 128])
def test_fp8_matches_the_oracle(group_size: int) -> None:
    torch.manual_seed(2)
    cases = [(1, 64, 640, 1), (5, 20, 72, 4), (16, 80, 4160, 132)]
    for m, n, k, multiprocessors in [*cases, (33, 96, 416, 4), (65, 70, 200, 4)]:
        layer = random_layer("fp8", n, k, group_size, torch.float32, bias=m > 1)
        xq = random_codes("fp8", m, k)
        x_scale = torch.rand(m, layer.scale.shape[1]) * 0.1 + 0.01
        y = w8a8(layer, xq, x_scale, multiprocessors=multiprocessors)
        exact = layer.exact(xq.double() * layer.spread(x_scale))
        assert relative_error(y, exact) <= 2e-6, (m, n, k)


# ---- all of them -----------------------------------------------------------------------------


def run(name: str, layer: Layer, x: Tensor, x_scale: Tensor, multiprocessors: int = 132) -> Tensor:
    if name.startswith("w8a16"):
        return w8a16(layer, x, multiprocessors)
    return w8a8(layer, x, x_scale, torch.bfloat16, multiprocessors)


def example(name: str, n: int, k: int, rows: int) -> tuple[Layer, Tensor, Tensor]:
    kind, group_size = {
        "w8a16-int8": ("int8", 32),
        "w8a16-fp8": ("fp8", -1),
        "int8": ("int8", -1),
        "fp8": ("fp8", -1),
        "fp8-128": ("fp8", 128),
    }[name]
    layer = random_layer(kind, n, k, group_size, torch.bfloat16)
    wide = torch.randn(rows, k).bfloat16() if "a16" in name else random_codes(kind, rows, k)
    return layer, wide, torch.rand(rows, layer.scale.shape[1]) + 0.1


NAMES = ["w8a16-int8", "w8a16-fp8", "int8", "fp8", "fp8-128"]


@pytest.mark.parametrize("name", NAMES)
def test_rows_have_the_same_bits_whatever_m_is(name: str) -> None:
    torch.manual_seed(3)
    layer, x, s = example(name, 48, 2112, 17)
    y = run(name, layer, x, s)
    for m in (1, 2, 7, 8, 9, 16):
        assert same_bits(run(name, layer, x[:m], s[:m]), y[:m]), m
        assert same_bits(run(name, layer, x[17 - m :], s[17 - m :]), y[17 - m :]), m
    layer, x, s = example(name, 40, 272, 129)
    y = run(name, layer, x, s)
    for m in (33, 64, 65, 128):
        assert same_bits(run(name, layer, x[:m], s[:m]), y[:m]), m


@pytest.mark.parametrize("name", NAMES)
def test_strided_and_unaligned_x(name: str) -> None:
    torch.manual_seed(4)
    for rows in (5, 34):
        layer, wide, s = example(name, 40, 192, 2 * rows)
        wide = torch.cat((wide, wide), 1)
        for x in (wide[:rows, :192], wide[:rows, 3:195], wide[::2, 16:208]):
            scales = s[: len(x)]
            assert same_bits(run(name, layer, x, scales), run(name, layer, x.contiguous(), scales))


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_added_in_the_same_order_whoever_arrives_last(name: str) -> None:
    torch.manual_seed(5)
    layer, x, s = example(name, 48, 4160, 5)
    y = run(name, layer, x, s)
    for seed in (1, 2):
        twin.library().qk_twin_shuffle(seed)
        again = run(name, layer, x, s)
        twin.library().qk_twin_shuffle(0)
        assert same_bits(again, y), seed


def test_a_nan_stays_in_its_row() -> None:
    layer, x, s = example("fp8-128", 64, 256, 4)
    clean = run("fp8-128", layer, x, s)
    s[2, 1] = torch.nan
    x.view(torch.uint8)[1, 77] = 0x7F
    y = run("fp8-128", layer, x, s)
    assert y[1:3].isnan().all()
    assert same_bits(y[[0, 3]], clean[[0, 3]])


def test_what_the_layout_does_not_hold_is_refused() -> None:
    library, x = twin.library(), torch.zeros(1, 96, dtype=torch.int8)
    layer = random_layer("int8", 64, 96, 32, torch.bfloat16)
    call = Call(layer, x, torch.bfloat16, 1)
    grouped = c_abi.W8A8Args(**call.args, y_dtype=2)
    assert library.qk_cuda_w8a8_linear(ctypes.byref(grouped), None) == twin.UNSUPPORTED
    odd = c_abi.W8A16Args(**(call.args | {"group_size": 48, "groups": 2}), dtype=2)
    assert library.qk_cuda_w8a16_linear(ctypes.byref(odd), None) == twin.UNSUPPORTED
