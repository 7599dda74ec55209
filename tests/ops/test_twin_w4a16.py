"""The W4A16 tensor-core kernels, run by the host twin, against the fp64 oracle."""

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


@dataclass(frozen=True)
class Layer:
    """A random integer weight in the kernels' layout."""

    codes: Tensor
    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    group_size: int

    def exact(self, x: Tensor) -> Tensor:
        """[m, N] in fp64."""
        counters = ops.new_w4a16_counters(self.codes.shape[0], "cpu")
        rest = (self.zero, self.bias, counters, self.codes.shape[0], self.group_size)
        return reference.w4a16_linear(x.double(), self.packed, self.scale, *rest)

    def allowed(self, x: Tensor) -> float:
        """Twice the error of torch with the weight dequantized to the dtype of x."""
        identity = torch.eye(x.shape[1], dtype=torch.float64)
        bias = 0 if self.bias is None else self.bias.double()
        weight = (self.exact(identity) - bias).t().to(x.dtype)
        y = torch.nn.functional.linear(x, weight, self.bias)
        return 2 * relative_error(y, self.exact(x)) + 2e-6


def random_layer(
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype,
    *,
    zero: bool = False,
    bias: bool = False,
) -> Layer:
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    groups = 1 if group_size == -1 else -(-k // group_size)
    scale = (torch.rand(n, groups) * 0.1 + 0.01).to(dtype)
    zeros = torch.randint(0, 16, (n, groups), dtype=torch.uint8)
    return Layer(
        codes,
        ops.pack_w4a16(codes),
        ops.pack_w4a16_table(scale),
        ops.pack_w4a16_table(zeros) if zero else None,
        torch.randn(n).to(dtype) if bias else None,
        group_size,
    )


def linear(layer: Layer, x: Tensor, multiprocessors: int = 4) -> Tensor:
    """y [m, N], written between guard columns that must stay NaN."""
    library = twin.library()
    library.qk_cuda_w4a16_partials.restype = ctypes.c_int64
    (m, k), n = x.shape, layer.codes.shape[0]
    whole = torch.full((m, n + 3), torch.nan, dtype=x.dtype)
    y = whole[:, 1 : n + 1]
    shape = [ctypes.c_int64(v) for v in (m, n, k)]
    count = library.qk_cuda_w4a16_partials(*shape, ctypes.c_int32(multiprocessors))
    partials = torch.full((max(count, 1),), torch.nan)
    counters = ops.new_w4a16_counters(n, "cpu")
    tables = (layer.packed, layer.scale, layer.zero, layer.bias)
    twin.watch(x, *tables, outputs=(whole, partials, counters))
    packed, scale, zero, bias = map(twin.pointer, tables)
    args = c_abi.W4A16Args(
        x=x.data_ptr(),
        ldx=x.stride(0),
        dtype=c_abi.DTYPES[x.dtype],
        m=m,
        n=n,
        k=k,
        group_size=layer.group_size if layer.group_size > 0 else k,
        groups=layer.scale.shape[1],
        packed=packed,
        scale=scale,
        zero=zero,
        bias=bias,
        y=y.data_ptr(),
        ldy=whole.stride(0),
        partials=partials.data_ptr(),
        counters=counters.data_ptr(),
        multiprocessors=multiprocessors,
    )
    twin.check(library.qk_cuda_w4a16_linear(ctypes.byref(args), None))
    assert whole[:, 0].isnan().all()
    assert whole[:, n + 1 :].isnan().all()
    assert not counters.any()
    return y


def test_packing_is_exact_and_pads_with_zero() -> None:
    for n, k in [(64, 64), (70, 100), (1, 1), (130, 320)]:
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        packed = ops.pack_w4a16(codes)
        assert packed.shape == (-(-n // 64), -(-k // 64), 2048)
        assert torch.equal(ops.unpack_w4a16(packed, n, k), codes)
        table = torch.randn(n, 3).half()
        assert torch.equal(reference.unpack_w4a16_table(ops.pack_w4a16_table(table), n), table)


def test_packed_words_are_where_the_header_says() -> None:
    codes = torch.randint(0, 16, (128, 192), dtype=torch.uint8)
    words = ops.pack_w4a16(codes).view(torch.int32).reshape(2, 3, 4, 32, 4)
    for b, slab, tile, lane, s in [(0, 0, 0, 0, 0), (1, 2, 3, 31, 3), (1, 0, 2, 13, 1)]:
        word, g, t = int(words[b, slab, tile, lane, s]), lane // 4, lane % 4
        for j in range(4):
            row = 64 * b + 16 * tile + g + 8 * (j % 2)
            column = 64 * slab + 32 * (s // 2) + 8 * t + 4 * (s % 2) + 2 * (j // 2)
            assert word >> (4 * j) & 15 == codes[row, column]
            assert word >> (16 + 4 * j) & 15 == codes[row, column + 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, -1])
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "asymmetric"])
def test_matches_the_oracle(dtype: torch.dtype, group_size: int, zero: bool) -> None:
    torch.manual_seed(0)
    # Every number of tiles a block, whole and short last groups, slabs and blocks of rows.
    for m, n, k, multiprocessors in [(1, 64, 640, 1), (8, 96, 1440, 2), (16, 80, 416, 132)]:
        layer = random_layer(n, k, group_size, dtype, zero=zero, bias=zero)
        x = torch.randn(m, k).to(dtype)
        error = relative_error(linear(layer, x, multiprocessors), layer.exact(x))
        assert error <= layer.allowed(x), (m, n, k, error)


@pytest.mark.parametrize("n", [1, 15, 17, 63, 130])
def test_tails_of_n_and_k(n: int) -> None:
    torch.manual_seed(n)
    for k in (1, 7, 8, 31, 40, 65, 129, 200):
        layer = random_layer(n, k, -1 if k % 2 else 32, torch.float16, zero=True, bias=True)
        for m in (2, 9):
            x = torch.randn(m, k).half()
            error = relative_error(linear(layer, x), layer.exact(x))
            assert error <= layer.allowed(x), (k, m, error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, -1])
def test_many_rows_match_the_oracle(dtype: torch.dtype, group_size: int) -> None:
    torch.manual_seed(6)
    # One and two tiles of rows, both sizes of tile, aligned x and not, fewer slabs than stages.
    for m, n, k in [(33, 96, 416), (65, 64, 328), (130, 70, 72), (40, 70, 203)]:
        layer = random_layer(n, k, group_size, dtype, zero=m > 33, bias=m > 64)
        x = torch.randn(m, k).to(dtype)
        error = relative_error(linear(layer, x), layer.exact(x))
        assert error <= layer.allowed(x), (m, n, k, error)


def test_many_rows_have_the_same_bits_whatever_m_is() -> None:
    torch.manual_seed(7)
    layer = random_layer(64, 392, 128, torch.bfloat16, zero=True)
    wide = torch.randn(129, 400).bfloat16()
    x = wide[:, 3:395]
    y = linear(layer, x)  # unaligned
    for m in (33, 64, 65, 128, 129):
        assert same_bits(linear(layer, x[:m].contiguous()), y[:m]), m
        assert same_bits(linear(layer, x[129 - m :].contiguous()), y[129 - m :]), m


def test_strided_and_unaligned_x() -> None:
    torch.manual_seed(2)
    layer = random_layer(96, 192, 64, torch.bfloat16)
    wide = torch.randn(6, 400).bfloat16()
    for x in (wide[:, :192], wide[:, 3:195], wide[::2, 8:200], wide[:, 1:193]):
        assert same_bits(linear(layer, x), linear(layer, x.contiguous()))


@pytest.mark.parametrize("group_size", [32, 128])
def test_rows_have_the_same_bits_whatever_m_is(group_size: int) -> None:
    torch.manual_seed(3)
    layer = random_layer(80, 2112, group_size, torch.bfloat16, zero=True)
    x = torch.randn(19, 2112).bfloat16()
    y = linear(layer, x, 132)
    for m in (*range(1, 18), 19):
        assert same_bits(linear(layer, x[:m], 132), y[:m]), m
        assert same_bits(linear(layer, x[19 - m :], 132), y[19 - m :]), m


def test_splits_are_added_in_the_same_order_whoever_arrives_last() -> None:
    torch.manual_seed(4)
    layer = random_layer(48, 4096 + 64, 64, torch.float16, bias=True)
    x = torch.randn(5, 4096 + 64).half()
    library = twin.library()
    library.qk_cuda_w4a16_partials.restype = ctypes.c_int64
    shape = [ctypes.c_int64(v) for v in (5, 48, x.shape[1])]
    assert library.qk_cuda_w4a16_partials(*shape, ctypes.c_int32(132)) == 4 * 5 * 48
    y = linear(layer, x, 132)
    assert relative_error(y, layer.exact(x)) <= layer.allowed(x)
    for seed in (1, 2, 3):
        library.qk_twin_shuffle(seed)
        again = linear(layer, x, 132)
        library.qk_twin_shuffle(0)
        assert same_bits(again, y), seed


def test_values_that_are_no_numbers_stay_in_their_row() -> None:
    torch.manual_seed(5)
    layer = random_layer(64, 128, 64, torch.bfloat16, zero=True)
    x = torch.randn(4, 128).bfloat16()
    clean = linear(layer, x)
    x[2, 77] = torch.nan
    x[1, 3] = torch.inf
    y = linear(layer, x)
    assert y[2].isnan().all()
    assert not y[1].isfinite().any()
    assert same_bits(y[[0, 3]], clean[[0, 3]])


def test_group_sizes_that_the_layout_does_not_hold_are_refused() -> None:
    layer = random_layer(64, 96, 32, torch.bfloat16)
    args = c_abi.W4A16Args(
        dtype=c_abi.DTYPES[torch.bfloat16],
        m=1,
        n=64,
        k=96,
        group_size=48,
        groups=2,
        packed=layer.packed.data_ptr(),
        multiprocessors=1,
    )
    assert twin.library().qk_cuda_w4a16_linear(ctypes.byref(args), None) == twin.UNSUPPORTED
