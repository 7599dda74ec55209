"""Packing is exact both ways, and the layout is the documented one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import ops
from quantkit.ops import reference

shapes = st.tuples(st.integers(1, 150), st.integers(1, 90), st.integers(0, 2**31))


def random_codes(n: int, k: int, seed: int, high: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (n, k), dtype=torch.uint8, generator=generator)


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_pack_w4_round_trips_and_matches_the_reference(shape: tuple[int, int, int]) -> None:
    n, k, seed = shape
    codes = random_codes(n, k, seed, 16)
    packed = ops.pack_w4(codes)
    assert torch.equal(packed, reference.pack_w4(codes))
    assert torch.equal(ops.unpack_w4(packed, n, k), codes)


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_pack_w8_round_trips_and_matches_the_reference(shape: tuple[int, int, int]) -> None:
    n, k, seed = shape
    codes = random_codes(n, k, seed, 256).view(torch.int8)
    packed = ops.pack_w8(codes)
    assert torch.equal(packed, reference.pack_w8(codes))
    assert torch.equal(ops.unpack_w8(packed, n, k), codes)


def test_w4_layout_byte_for_byte() -> None:
    codes = torch.zeros(17, 9, dtype=torch.uint8)
    codes[3, :8] = torch.arange(1, 9)
    codes[16, 8] = 15
    packed = ops.pack_w4(codes)
    assert packed.shape == (2, 2, 64)
    packed = packed.reshape(2, 2, 64).transpose(0, 1)  # chunks of the two blocks alternate
    # Row 3: even columns 1, 3, 5, 7 in the low half of the word, odd columns in the high half.
    assert packed[0, 0, 12:16].tolist() == [0x31, 0x75, 0x42, 0x86]
    assert packed[1, 1, :4].tolist() == [15, 0, 0, 0]
    assert int(packed.count_nonzero()) == 5


def test_w8_layout_byte_for_byte() -> None:
    codes = torch.zeros(17, 5, dtype=torch.int8)
    codes[2, :4] = torch.tensor([1, -2, 3, -4])
    codes[16, 4] = -1
    packed = ops.pack_w8(codes)
    assert packed.shape == (2, 2, 64)
    packed = packed.reshape(2, 2, 64).transpose(0, 1)  # chunks of the two blocks alternate
    assert packed[0, 0, 8:12].view(torch.int8).tolist() == [1, -2, 3, -4]
    assert packed[1, 1, :4].tolist() == [255, 0, 0, 0]
    assert int(packed.count_nonzero()) == 5


def test_pack_accepts_any_strides_and_fp8() -> None:
    codes = torch.randint(0, 16, (40, 24), dtype=torch.uint8)
    assert torch.equal(ops.pack_w4(codes.t()), ops.pack_w4(codes.t().contiguous()))
    assert torch.equal(ops.pack_w4(codes[::2, ::3]), ops.pack_w4(codes[::2, ::3].contiguous()))
    fp8 = torch.randn(20, 12).to(torch.float8_e4m3fn)
    restored = ops.unpack_w8(ops.pack_w8(fp8), 20, 12, "fp8")
    assert torch.equal(restored.view(torch.uint8), fp8.view(torch.uint8))


@pytest.mark.parametrize("table", [torch.rand(33, 5), torch.rand(33, 5).bfloat16()])
def test_pack_scale_keeps_values_and_makes_rows_dense(table: torch.Tensor) -> None:
    packed = ops.pack_scale(table)
    assert packed.dtype == torch.float32
    assert torch.equal(packed, table.float())
    assert packed.stride(0) == 1


def test_consolidate_copies_side_by_side() -> None:
    tensors = [
        torch.randint(0, 256, (3, 5, 64), dtype=torch.uint8),
        torch.randn(7, 9),
        torch.empty(0, 4),
        torch.randn(5, 6).t(),
    ]
    copies = ops.consolidate(tensors)
    for copy, tensor in zip(copies, tensors, strict=True):
        assert torch.equal(copy, tensor)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 256 == 0 or copy.numel() == 0
    assert copies[0].untyped_storage().data_ptr() == copies[3].untyped_storage().data_ptr()
    assert ops.consolidate([]) == []
    with pytest.raises(ValueError, match="a tensor is on meta; consolidate takes CPU tensors"):
        ops.consolidate([torch.empty(1, device="meta")])


def test_pack_errors_name_value_and_remedy() -> None:
    with pytest.raises(RuntimeError, match=r"dtype Int, must be uint8 with values 0\.\.15"):
        ops.pack_w4(torch.zeros(4, 4, dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"shape \[4\], must be \[N, K\]"):
        ops.pack_w8(torch.zeros(4, dtype=torch.int8))
    with pytest.raises(RuntimeError, match="N and K must be positive"):
        ops.pack_w4(torch.zeros(0, 4, dtype=torch.uint8))
