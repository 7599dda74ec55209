"""Packing is exact both ways, and byte for byte what compressed-tensors writes."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import numerics, packing
from quantkit.schemes import SCHEMES


@settings(max_examples=80, deadline=None)
@given(
    bits=st.integers(2, 8),
    n=st.integers(1, 40),
    k=st.integers(1, 200),
    dim=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**31 - 1),
)
def test_integers_round_trip(bits: int, n: int, k: int, dim: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (n, k), generator=gen).to(torch.int8)
    words = packing.pack_int(codes, bits, dim=dim)
    along = k if dim == 1 else n
    assert words.shape[dim] == packing.packed_columns(along, bits)
    assert torch.equal(packing.unpack_int(words, bits, (n, k), dim=dim), codes)
    if dim == 0 and -(-n * bits // 32) == 1:
        return  # their unpacker views a single transposed row as bytes, and torch refuses
    theirs = unpack_from_int32(words, bits, torch.Size((n, k)), packed_dim=dim)  # type: ignore[arg-type]
    assert torch.equal(theirs, codes)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 20), half=st.integers(1, 60), seed=st.integers(0, 2**31 - 1))
def test_fp4_round_trip(n: int, half: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, 2 * half), generator=gen).to(torch.uint8)
    words = packing.pack_fp4(codes)
    assert torch.equal(packing.unpack_fp4(words), codes)
    spec = SCHEMES["nvfp4a16"].weight
    values = numerics.code_values(numerics.QTensor(codes, torch.ones(1), None, spec))
    assert torch.equal(unpack_fp4_from_uint8(words, n, 2 * half, torch.float32), values)
    codes[codes == 8] = 0  # their packer has one zero
    values = numerics.code_values(numerics.QTensor(codes, torch.ones(1), None, spec))
    assert torch.equal(pack_fp4_to_uint8(values), packing.pack_fp4(codes))


def test_odd_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="even number"):
        packing.pack_fp4(torch.zeros(2, 3, dtype=torch.uint8))
