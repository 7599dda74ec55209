"""Every operator in plain torch: the oracle of the native kernels, with their signatures.

Sums are computed in fp32 (in fp64 when x is float64), over the dequantized weight. These run on any
device and in any Python, and are what ``--kernels reference`` uses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.ops import schema


def _pad_to(codes: Tensor, rows: int, columns: int) -> Tensor:
    n, k = codes.shape
    return torch.nn.functional.pad(codes, (0, -k % columns, 0, -n % rows))


def _alternate(blocks: Tensor) -> Tensor:
    """[blocks, chunks, 64] in order -> the same shape, the chunks of four blocks alternating."""
    whole = blocks.shape[0] // 4 * 4
    _, chunks, width = blocks.shape
    fours = blocks[:whole].reshape(-1, 4, chunks, width).transpose(1, 2)
    rest = blocks[whole:].transpose(0, 1)
    return torch.cat((fours.reshape(-1), rest.reshape(-1))).reshape(blocks.shape)


def _in_order(packed: Tensor) -> Tensor:
    """The inverse of :func:`_alternate`."""
    whole = packed.shape[0] // 4 * 4
    _, chunks, width = packed.shape
    fours = packed[:whole].reshape(-1, chunks, 4, width).transpose(1, 2)
    rest = packed[whole:].reshape(chunks, -1, width).transpose(0, 1)
    return torch.cat((fours.reshape(-1, chunks, width), rest))


def pack_w4(codes: Tensor) -> Tensor:
    """uint8 [N, K] -> uint8 [ceil(N/16), ceil(K/8), 64]."""
    padded = _pad_to(codes & 15, 16, 8)
    blocks, chunks = padded.shape[0] // 16, padded.shape[1] // 8
    # [block, row, chunk, pair j, parity] -> bytes of the low half (even columns), then the high.
    pairs = padded.reshape(blocks, 16, chunks, 4, 2).permute(0, 2, 1, 4, 3)
    nibbles = pairs.reshape(blocks, chunks, 16, 4, 2)
    return _alternate((nibbles[..., 0] | (nibbles[..., 1] << 4)).reshape(blocks, chunks, 64))


def unpack_w4(packed: Tensor, n: int, k: int) -> Tensor:
    """uint8 [ceil(N/16), ceil(K/8), 64] -> uint8 [N, K]: the inverse of :func:`pack_w4`."""
    blocks, chunks, _ = packed.shape
    packed = _in_order(packed)
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).reshape(blocks, chunks, 16, 2, 4)
    rows = halves.permute(0, 2, 1, 4, 3).reshape(blocks * 16, chunks * 8)
    return rows[:n, :k].contiguous()


def pack_w8(codes: Tensor) -> Tensor:
    """int8, float8_e4m3fn or uint8 [N, K] -> uint8 [ceil(N/16), ceil(K/4), 64]."""
    padded = _pad_to(codes.view(torch.uint8), 16, 4)
    blocks, chunks = padded.shape[0] // 16, padded.shape[1] // 4
    quads = padded.reshape(blocks, 16, chunks, 4).permute(0, 2, 1, 3)
    return _alternate(quads.reshape(blocks, chunks, 64))


def unpack_w8(packed: Tensor, n: int, k: int, kind: int | str = "int8") -> Tensor:
    """uint8 [ceil(N/16), ceil(K/4), 64] -> int8 or float8_e4m3fn [N, K]."""
    blocks, chunks, _ = packed.shape
    quads = _in_order(packed).reshape(blocks, chunks, 16, 4).permute(0, 2, 1, 3)
    rows = quads.reshape(blocks * 16, chunks * 4)[:n, :k].contiguous()
    fp8 = schema.kind_code(kind) == schema.KIND_FP8
    return rows.view(torch.float8_e4m3fn if fp8 else torch.int8)


def w4a16_order(padded: Tensor) -> Tensor:
    """[64 b, 64 s, ...] rows and columns -> [b, s, tile, g, t, step, pair, row half, element]."""
    blocks, slabs = padded.shape[0] // 64, padded.shape[1] // 64
    # Rows 16 tile + 8 half + g; columns 32 (step / 2) + 8 t + 4 (step % 2) + 2 pair + element.
    split = padded.reshape(blocks, 4, 2, 8, slabs, 2, 4, 2, 2, 2)
    b, tile, half, g, s, high, t, low, pair, element = range(10)
    order = split.permute(b, s, tile, g, t, high, low, pair, half, element)
    return order.reshape(blocks, slabs, 4, 8, 4, 4, 2, 2, 2)


def pack_w4a16(codes: Tensor) -> Tensor:
    """uint8 [N, K], values 0..15, to the layout of :func:`w4a16_linear`.

    Returns:
        uint8 [ceil(N/64), ceil(K/64), 2048], padded with code 0: fragments of mma.m16n8k16 in the
        order in which a warp loads them (the C header has the formula).
    """
    n, k = codes.shape
    padded = torch.nn.functional.pad(codes & 15, (0, -k % 64, 0, -n % 64))
    nibbles = w4a16_order(padded)
    blocks, slabs = nibbles.shape[:2]
    # A word has nibble 2 pair + half of the even columns below, of the odd columns above.
    words = nibbles.movedim(-1, -3).reshape(blocks, slabs, 4, 8, 4, 4, 4, 2)
    return (words[..., 0] | (words[..., 1] << 4)).reshape(blocks, slabs, 2048)


def unpack_w4a16(packed: Tensor, n: int, k: int) -> Tensor:
    """uint8 [ceil(N/64), ceil(K/64), 2048] -> uint8 [N, K]: the inverse of :func:`pack_w4a16`."""
    blocks, slabs, _ = packed.shape
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1)
    # [block, slab, tile, g, t, high, low, element, pair, row half]
    split = nibbles.reshape(blocks, slabs, 4, 8, 4, 2, 2, 2, 2, 2)
    b, s, tile, g, t, high, low, element, pair, half = range(10)
    rows = split.permute(b, tile, half, g, s, high, t, low, pair, element)
    return rows.reshape(blocks * 64, slabs * 64)[:n, :k].contiguous()


def pack_w4a16_table(table: Tensor) -> Tensor:
    """A table [N, groups] of scales or zeros for the linear layers on tensor cores.

    float16 or bfloat16 scales and uint8 zeros for :func:`w4a16_linear`, scales for
    :func:`quantkit.ops.w8a16_linear`, float32 scales for :func:`quantkit.ops.w8a8_mma_linear`.

    Returns:
        [ceil(N/64), groups, 64] in the dtype of table, padded with 0: the rows of four tiles in
        the order in which lanes need them.
    """
    n, groups = table.shape
    padded = torch.nn.functional.pad(table, (0, 0, 0, -n % 64)).reshape(-1, 4, 2, 8, groups)
    return padded.permute(0, 4, 3, 1, 2).reshape(-1, groups, 64).contiguous()


def unpack_w4a16_table(packed: Tensor, n: int) -> Tensor:
    """The inverse of :func:`pack_w4a16_table`: [N, groups]."""
    blocks, groups, _ = packed.shape
    split = packed.reshape(blocks, groups, 8, 4, 2).permute(0, 3, 4, 2, 1)
    return split.reshape(blocks * 64, groups)[:n].contiguous()


def new_w4a16_counters(n: int, device: torch.device | str = "cuda") -> Tensor:
    """Counters that the linear layers on tensor cores need for N rows, and leave as they were.

    Calls that may run at the same time need counters of their own.

    Returns:
        int32 [4, ceil(N/16)] of zeros.
    """
    return torch.zeros(4, -(-n // 16), dtype=torch.int32, device=device)


def pack_float(values: Tensor) -> Tensor:
    """bfloat16 or float32 [N, K] -> [ceil(N/16), ceil(K/2), 32] or [ceil(N/16), K, 16]."""
    codes = 4 // values.element_size()
    padded = _pad_to(values, 16, codes)
    blocks, chunks = padded.shape[0] // 16, padded.shape[1] // codes
    runs = padded.reshape(blocks, 16, chunks, codes).permute(0, 2, 1, 3)
    return _alternate(runs.reshape(blocks, chunks, 16 * codes))


def unpack_float(packed: Tensor, n: int, k: int) -> Tensor:
    """The inverse of :func:`pack_float`: [N, K] in the dtype of packed."""
    blocks, chunks, width = packed.shape
    runs = _in_order(packed).reshape(blocks, chunks, 16, width // 16).permute(0, 2, 1, 3)
    return runs.reshape(blocks * 16, -1)[:n, :k].contiguous()


def _scaled(
    values: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    """(values - zero) * scale with [N, groups] tables spread over the K columns of values."""
    k = values.shape[1]
    group = torch.arange(k, device=values.device) // (k if group_size == -1 else group_size)
    values = values.to(dtype)
    if zero is not None:
        values = values - zero.to(dtype)[:, group]
    return values * scale.to(dtype)[:, group]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.to(weight.dtype) @ weight.t()
    if bias is not None:
        y = y + bias.to(weight.dtype)
    return y.to(x.dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def w4_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    lut: Tensor,
    bias: Tensor | None,
    n: int,
    group_size: int,
) -> Tensor:
    values = lut[unpack_w4(packed, n, x.shape[-1]).long()]
    return _linear(x, _scaled(values, scale, zero, group_size, _compute_dtype(x)), bias)


def w4a16_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    n: int,
    group_size: int,
) -> Tensor:
    compute = _compute_dtype(x)
    codes = unpack_w4a16(packed, n, x.shape[-1])
    table = torch.full_like(scale, 8, dtype=torch.uint8) if zero is None else zero
    zeros = unpack_w4a16_table(table, n)
    weight = _scaled(codes, unpack_w4a16_table(scale, n), zeros, group_size, compute)
    return _linear(x, weight, bias)


def w8_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    kind: int | str,
    group_size: int,
) -> Tensor:
    packed = codes if codes.dim() == 3 else pack_w8(codes)
    values = unpack_w8(packed, scale.shape[0], x.shape[-1], kind)
    return _linear(x, _scaled(values, scale, zero, group_size, _compute_dtype(x)), bias)


def w8a8_linear(
    xq: Tensor,
    x_scale: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    n, k = w_scale.numel(), xq.shape[-1]
    weight = unpack_w8(wq, n, k) if wq.dim() == 3 else wq
    # float64 holds every sum of 131071 products of two int8 exactly.
    # Nor is there a negative zero among whole numbers: BLAS makes one of 0 · (−3) at K = 1.
    exact = (xq.reshape(-1, k).double() @ weight.t().double()).float() + 0.0
    y = exact * (x_scale.float().reshape(-1, 1) * w_scale.float().reshape(1, -1))
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype).reshape(*xq.shape[:-1], n)


def int8_linear(
    xq: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    lut: Tensor | None,
    bias: Tensor | None,
    n: int,
    group_size: int,
    out_dtype: torch.dtype,
    x_group_size: int | None = None,
) -> Tensor:
    k = xq.shape[-1]
    if x_group_size is None:
        x_group_size = schema.x_group_size(x_scale, group_size, k)
    values = unpack_w8(packed, n, k) if lut is None else lut[unpack_w4(packed, n, k).long()]
    # In float64 throughout: codes, their sums and their products with two fp32 scales are exact.
    weight = _scaled(values, scale, zero, group_size, torch.float64)
    x_scale = x_scale.double().reshape(-1) if x_scale.numel() == 1 else x_scale.double()
    x_group = torch.arange(k, device=xq.device) // (k if x_group_size == -1 else x_group_size)
    if x_scale.numel() == 1:
        x_group = torch.zeros_like(x_group)
    y = (xq.double() * x_scale[..., x_group]) @ weight.t()
    if bias is not None:
        y = y + bias.double()
    return y.to(out_dtype)


def float_linear(x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return _linear(x, unpack_float(packed, n, x.shape[-1]).to(_compute_dtype(x)), bias)


def dequantize_w4(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    lut: Tensor,
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    values = lut[unpack_w4(packed, n, k).long()]
    return _scaled(values, scale, zero, group_size, torch.float32).to(dtype)


def dequantize_w8(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    n: int,
    k: int,
    kind: int | str,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    values = unpack_w8(packed, n, k, kind)
    return _scaled(values, scale, zero, group_size, torch.float32).to(dtype)


def _dynamic_scale(x: Tensor, half_range: float) -> Tensor:
    """absmax / half_range over the last dimension, in the dtype of x; epsilon where it is 0."""
    scale = x.abs().amax(dim=-1, keepdim=True) / half_range
    return torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)


def _int8_codes(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).nan_to_num(nan=0.0).clamp(-128, 127).round().to(torch.int8)


def _fp8_codes(x: Tensor, scale: Tensor) -> Tensor:
    # Adding 0 turns -0 into +0, as compressed-tensors' zero point does.
    return (x / scale + 0.0).clamp(-448, 448).to(torch.float8_e4m3fn)


def quantize_int8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = _dynamic_scale(x, 127.5)
    return _int8_codes(x, scale), scale


def quantize_int8_per_group(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    k = x.shape[-1]
    group = min(group, k)
    groups = torch.nn.functional.pad(x.float(), (0, -k % group)).unflatten(-1, (-1, group))
    scale = groups.abs().amax(dim=-1, keepdim=True) / 127.5
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    # Comparisons and not clamp: what is no number becomes -128.
    codes = groups * (1 / scale)
    codes = torch.where(codes > -128, codes, -128.0)
    codes = torch.where(codes < 127, codes, 127.0)
    return codes.round().to(torch.int8).flatten(-2)[..., :k].contiguous(), scale.squeeze(-1)


def quantize_int8_static(x: Tensor, scale: Tensor) -> Tensor:
    return _int8_codes(x, scale.reshape(1))


def quantize_fp8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = _dynamic_scale(x, 448.0)
    return _fp8_codes(x, scale), scale


def quantize_fp8_per_block(x: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    k = x.shape[-1]
    blocks = torch.nn.functional.pad(x, (0, -k % block)).unflatten(-1, (-1, block))
    scale = _dynamic_scale(blocks, 448.0)
    codes = _fp8_codes(blocks, scale).flatten(-2)[..., :k]
    return codes.contiguous(), scale.squeeze(-1)


def quantize_fp8_static(x: Tensor, scale: Tensor) -> Tensor:
    return _fp8_codes(x, scale.reshape(1))
