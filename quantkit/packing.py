"""Codes ↔ storage words of the compressed-tensors formats, exact both ways.

Writing goes through compressed-tensors' own packers, so that what is on disk is by
construction what that library makes; reading is our own, and the two are tested against
each other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pack_int(codes: Tensor, bits: int, *, dim: int = 1) -> Tensor:
    """Signed codes int8 ``[N, K]`` → int32 words, dense, element 0 in the lowest bits.

    A code q is stored as q + 2^(bits−1).

    Returns:
        int32 ``[N, ceil(K·bits/32)]``, or ``[ceil(N·bits/32), K]`` for ``dim=0``.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    if dim not in (0, 1):
        raise ValueError(f"dim {dim}: codes are packed along 0 or 1")
    return pack_to_int32(codes, bits, packed_dim=0 if dim == 0 else 1).contiguous()


def unpack_int(words: Tensor, bits: int, shape: tuple[int, int], *, dim: int = 1) -> Tensor:
    """The inverse of `pack_int`: int32 words → int8 codes of this shape."""
    if dim == 0:
        return unpack_int(words.t(), bits, (shape[1], shape[0])).t().contiguous()
    n, k = shape
    # A copy into fresh memory: a transposed view with one row calls itself contiguous whatever
    # its stride is, and bytes can only be viewed at stride 1.
    dense = torch.empty(words.numel(), dtype=words.dtype, device=words.device)
    dense.copy_(words.reshape(-1))
    as_bytes = dense.view(torch.uint8).reshape(n, -1)
    if bits == 8:
        return (as_bytes[:, :k].to(torch.int16) - 128).to(torch.int8)
    if bits == 4:
        pairs = torch.stack((as_bytes & 15, as_bytes >> 4), dim=-1).reshape(n, -1)[:, :k]
        return pairs.to(torch.int8) - 8
    # Any width: gather each code from the two bytes that it may straddle.
    first = torch.arange(k, device=words.device) * bits
    byte, shift = first // 8, first % 8
    padded = torch.nn.functional.pad(as_bytes, (0, 2)).to(torch.int32)
    pair = padded[:, byte] | (padded[:, byte + 1] << 8)
    return (((pair >> shift) & (2**bits - 1)) - 2 ** (bits - 1)).to(torch.int8)


def packed_columns(k: int, bits: int) -> int:
    """Number of int32 words that ``k`` codes take."""
    return math.ceil(k * bits / 32)


def pack_fp4(codes: Tensor) -> Tensor:
    """E2M1 codes uint8 ``[N, K]`` (0..15) → uint8 ``[N, K/2]``, low nibble = even column."""
    if codes.shape[1] % 2:
        raise ValueError(f"{codes.shape[1]} columns: pairs of FP4 codes need an even number")
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_fp4(words: Tensor) -> Tensor:
    """The inverse of `pack_fp4`."""
    return torch.stack((words & 15, words >> 4), dim=-1).reshape(words.shape[0], -1)
