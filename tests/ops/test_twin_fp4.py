"""The tensor-core kernels for 4-bit float weights, in the host twin, against the fp64 oracle."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import c_abi
import pytest
import torch
import twin
from ops_cases import relative_error, same_bits
from torch import Tensor

from quantkit import numerics, ops
from quantkit.ops import reference_fp4, schema
from quantkit.schemes import SCHEMES

GROUPS = {"nvfp4": 16, "mxfp4": 32, "nf4": 64}
DTYPES = [torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Layer:
    """A weight in the kernels' layout."""

    kind: str
    codes: Tensor
    packed: Tensor
    scale: Tensor
    global_scale: Tensor | None
    bias: Tensor | None
    group_size: int

    def exact(self, x: Tensor) -> Tensor:
        """[m, N] in fp64."""
        n = self.codes.shape[0]
        tables = (self.packed, self.scale, self.global_scale, self.bias)
        rest = (ops.new_w4a16_counters(n, "cpu"), n, self.kind, self.group_size)
        return reference_fp4.fp4a16_linear(x.double(), *tables, *rest)

    def allowed(self, x: Tensor) -> float:
        """Twice the error of torch with the weight dequantized to the dtype of x."""
        weight = replace(self, bias=None).exact(torch.eye(x.shape[1])).t().to(x.dtype)
        y = torch.nn.functional.linear(x, weight, self.bias)
        return 2 * relative_error(y, self.exact(x)) + 2e-6


def packed_layer(
    kind: str, codes: Tensor, scale: Tensor, global_scale: float = 1.0, bias: Tensor | None = None
) -> Layer:
    """scale: [N, groups] float8_e4m3fn, uint8 or 16-bit floats."""
    table = ops.pack_w4a16_table(scale) if kind == "nf4" else ops.pack_fp4_scales(scale)
    group_size = -1 if scale.shape[1] == 1 and kind == "nf4" else GROUPS[kind]
    whole = torch.tensor([global_scale]) if kind == "nvfp4" else None
    return Layer(kind, codes, ops.pack_fp4_mma(codes), table, whole, bias, group_size)


def random_layer(kind: str, n: int, k: int, dtype: torch.dtype, *, bias: bool = False) -> Layer:
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    groups = -(-k // GROUPS[kind])
    scale = {
        "nvfp4": (torch.rand(n, groups) * 400 + 1).to(torch.float8_e4m3fn),
        "mxfp4": torch.randint(120, 128, (n, groups), dtype=torch.uint8),
        "nf4": (torch.rand(n, groups) * 0.1 + 0.01).to(dtype),
    }[kind]
    return packed_layer(kind, codes, scale, 2100.0, torch.randn(n).to(dtype) if bias else None)


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
    tables = (layer.packed, layer.scale, layer.global_scale, layer.bias)
    twin.watch(x, *tables, outputs=(whole, partials, counters))
    packed, scale, global_scale, bias = map(twin.pointer, tables)
    group_size = layer.group_size if layer.group_size > 0 else k
    args = c_abi.FP4A16Args(
        x=x.data_ptr(),
        ldx=x.stride(0),
        dtype=c_abi.DTYPES[x.dtype],
        format=schema.fp4_code(layer.kind),
        m=m,
        n=n,
        k=k,
        group_size=group_size,
        groups=-(-k // group_size),
        packed=packed,
        scale=scale,
        global_scale=global_scale,
        bias=bias,
        y=y.data_ptr(),
        ldy=whole.stride(0),
        partials=partials.data_ptr(),
        counters=counters.data_ptr(),
        multiprocessors=multiprocessors,
    )
    twin.check(library.qk_cuda_fp4a16_linear(ctypes.byref(args), None))
    assert whole[:, 0].isnan().all()
    assert whole[:, n + 1 :].isnan().all()
    assert not counters.any()
    return y


def weight_of(layer: Layer, dtype: torch.dtype) -> Tensor:
    """[N, K] as the kernel decodes it: one column at a time, times 1."""
    identity = torch.eye(layer.codes.shape[1], dtype=dtype)
    return torch.cat([linear(layer, rows) for rows in identity.split(8)]).t()


def test_packing_is_exact_and_where_the_header_says() -> None:
    for n, k in [(64, 64), (70, 100), (1, 1), (130, 320)]:
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        packed = ops.pack_fp4_mma(codes)
        assert packed.shape == (-(-n // 64), -(-k // 64), 2048)
        assert torch.equal(ops.unpack_fp4_mma(packed, n, k), codes)
        for dtype, columns in ((torch.float8_e4m3fn, 16), (torch.uint8, 32)):
            scale = torch.randint(0, 127, (n, -(-k // columns)), dtype=torch.uint8).view(dtype)
            table = ops.pack_fp4_scales(scale)
            assert table.shape == (-(-n // 64), -(-k // 64), 4096 // columns)
            assert same_bits(ops.unpack_fp4_scales(table, *scale.shape), scale)
    codes = torch.randint(0, 16, (128, 192), dtype=torch.uint8)
    words = ops.pack_fp4_mma(codes).view(torch.int32).reshape(2, 3, 4, 32, 4)
    for b, slab, tile, lane, s in [(0, 0, 0, 0, 0), (1, 2, 3, 31, 3), (1, 0, 2, 13, 1)]:
        word, g, t = int(words[b, slab, tile, lane, s]), lane // 4, lane % 4
        for i in range(8):
            row = 64 * b + 16 * tile + g + 8 * (i // 2 % 2)
            column = 64 * slab + 32 * (s // 2) + 8 * t + 4 * (s % 2) + 2 * (i // 4) + i % 2
            low = word >> (4 * i) & 7
            high = word >> (8 * (i % 4) + (7 if i < 4 else 3)) & 1
            assert low + 8 * high == codes[row, column]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", GROUPS)
def test_matches_the_oracle(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # One, two and eight rows a tile, every number of weight tiles a block, split K, fewer slabs
    # than stages, a last group that is short, x aligned and not.
    cases = [(1, 64, 640, 1), (8, 48, 1440, 2), (16, 80, 416, 132), (9, 33, 71, 4), (3, 20, 1, 4)]
    for m, n, k, multiprocessors in [*cases, (33, 96, 416, 4), (65, 70, 200, 4), (40, 20, 75, 4)]:
        layer = random_layer(kind, n, k, dtype, bias=m > 1)
        x = torch.randn(m, k).to(dtype)
        error = relative_error(linear(layer, x, multiprocessors), layer.exact(x))
        assert error <= layer.allowed(x), (m, n, k, error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", GROUPS)
def test_every_code_is_decoded_exactly(kind: str, dtype: torch.dtype) -> None:
    codes = torch.arange(16).to(torch.uint8).repeat(64, 4).roll(3, 1)
    scale = {
        "nvfp4": torch.ones(64, 4).to(torch.float8_e4m3fn),
        "mxfp4": torch.full((64, 2), 127, dtype=torch.uint8),
        "nf4": torch.ones(64, 1).to(dtype),
    }[kind]
    e2m1 = numerics.E2M1 + tuple(-v for v in numerics.E2M1)
    values = torch.tensor(reference_fp4.NF4 if kind == "nf4" else e2m1).to(dtype)
    layer = packed_layer(kind, codes, scale)
    assert torch.equal(weight_of(layer, dtype), values[codes.long()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_e4m3_scale_times_every_code_is_exact(dtype: torch.dtype) -> None:
    # Rows are scales, all 256 with their subnormals, signs and NaNs; columns are codes.
    codes = torch.arange(16).to(torch.uint8).repeat(256, 1)
    scale = torch.arange(256).to(torch.uint8).reshape(256, 1).view(torch.float8_e4m3fn)
    layer = packed_layer("nvfp4", codes, scale)
    expected = numerics.E2M1 + tuple(-v for v in numerics.E2M1)
    weight = torch.tensor(expected).double() * scale.double()
    assert torch.equal(weight[:127].to(dtype).double(), weight[:127])
    decoded = weight_of(layer, dtype).double()
    # A row with a NaN is NaN: 0 times NaN.
    assert torch.equal(decoded.nan_to_num(nan=7777), weight.nan_to_num(nan=7777))


def test_every_e8m0_scale_is_exact() -> None:
    codes = torch.full((256, 32), 2, dtype=torch.uint8)  # 1.0
    exponents = torch.arange(256).to(torch.uint8).reshape(256, 1)
    layer = packed_layer("mxfp4", codes, exponents)
    weight = weight_of(layer, torch.bfloat16)
    assert weight[255].isnan().all()
    exact = torch.exp2(torch.arange(255).double() - 127)
    assert torch.equal(weight[:255].double(), exact.unsqueeze(1).expand(-1, 32))


@pytest.mark.parametrize("name", ["nvfp4a16", "mxfp4a16"])
def test_a_checkpoint_tensor_comes_out_as_the_oracle_dequantizes_it(name: str) -> None:
    torch.manual_seed(1)
    weight = torch.randn(80, 96).bfloat16() * 0.02
    q = numerics.quantize_weight(weight, SCHEMES[name].weight)
    scale = ops.pack_fp4_scales(q.scale)
    layer = Layer(
        name[:5], q.codes, ops.pack_fp4_mma(q.codes), scale, q.global_scale, None, GROUPS[name[:5]]
    )
    decoded = weight_of(layer, torch.bfloat16)
    assert torch.equal(decoded, numerics.dequantize(q, torch.bfloat16))


@pytest.mark.parametrize("kind", GROUPS)
def test_rows_have_the_same_bits_whatever_m_is(kind: str) -> None:
    torch.manual_seed(3)
    layer = random_layer(kind, 48, 2112, torch.bfloat16)
    x = torch.randn(17, 2112).bfloat16()
    y = linear(layer, x, 132)
    for m in (1, 2, 7, 8, 9, 16):
        assert same_bits(linear(layer, x[:m], 132), y[:m]), m
        assert same_bits(linear(layer, x[17 - m :], 132), y[17 - m :]), m
    layer = random_layer(kind, 40, 272, torch.bfloat16)
    x = torch.randn(129, 272).bfloat16()
    y = linear(layer, x, 132)
    for m in (33, 64, 65, 128):
        assert same_bits(linear(layer, x[:m], 132), y[:m]), m


@pytest.mark.parametrize("kind", GROUPS)
def test_strided_and_unaligned_x_and_any_order_of_blocks(kind: str) -> None:
    torch.manual_seed(4)
    for rows in (5, 34):
        layer = random_layer(kind, 40, 2112, torch.float16)
        wide = torch.randn(2 * rows, 2 * 2112).half()
        for x in (wide[:rows, :2112], wide[:rows, 3:2115], wide[::2, 16:2128]):
            expected = linear(layer, x.contiguous(), 132)
            twin.library().qk_twin_shuffle(rows)
            y = linear(layer, x, 132)
            twin.library().qk_twin_shuffle(0)
            assert same_bits(y, expected)


@pytest.mark.parametrize("kind", GROUPS)
def test_values_that_are_no_numbers_stay_in_their_row(kind: str) -> None:
    torch.manual_seed(5)
    layer = random_layer(kind, 64, 128, torch.bfloat16)
    x = torch.randn(4, 128).bfloat16()
    clean = linear(layer, x)
    x[2, 77] = torch.nan
    x[1, 3] = torch.inf
    y = linear(layer, x)
    assert y[2].isnan().all()
    assert not y[1].isfinite().any()
    assert same_bits(y[[0, 3]], clean[[0, 3]])


def test_what_the_layout_does_not_hold_is_refused() -> None:
    size = {"m": 1, "n": 64, "k": 192, "multiprocessors": 1}
    refused = [("nvfp4", 32), ("mxfp4", 16), ("nf4", 32), ("nf4", 96)]
    for kind, group_size in refused:
        args = c_abi.FP4A16Args(
            **size,
            dtype=c_abi.DTYPES[torch.bfloat16],
            format=schema.fp4_code(kind),
            group_size=group_size,
            groups=-(-192 // group_size),
        )
        status = twin.library().qk_cuda_fp4a16_linear(ctypes.byref(args), None)
        assert status == twin.UNSUPPORTED, (kind, group_size)
