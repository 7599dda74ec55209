"""4-bit float weights on a GPU: the layout of codes and scales; the layer in plain torch.

The layout is made once, when a layer is loaded, from the codes and scales of a checkpoint
(``quantkit.numerics.QTensor``): E2M1 codes 0..15 with the sign highest, or NF4 codes in ascending
order of their values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.ops import reference, schema

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: Dettmers et al., "QLoRA", arXiv 2305.14314, appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def _bits(device: torch.device) -> tuple[Tensor, Tensor]:
    """For the eight codes of a word: where the low three bits lie, and where the highest."""
    code = torch.arange(8, device=device)
    return 4 * code, 8 * (code % 4) + torch.where(code < 4, 7, 3)


def pack_fp4_mma(codes: Tensor) -> Tensor:
    """uint8 [N, K], values 0..15, to the layout of :func:`quantkit.ops.fp4a16_linear`.

    Returns:
        uint8 [ceil(N/64), ceil(K/64), 2048], padded with code 0: fragments of mma.m16n8k16 in the
        order in which a warp loads them, their highest bits where decoding wants signs (the C
        header has the formula).
    """
    n, k = codes.shape
    padded = torch.nn.functional.pad(codes & 15, (0, -k % 64, 0, -n % 64))
    ordered = reference.w4a16_order(padded)
    blocks, slabs = ordered.shape[:2]
    eights = ordered.reshape(blocks, slabs, 512, 8).long()
    low, high = _bits(codes.device)
    words = ((eights & 7) << low | (eights >> 3) << high).sum(-1)
    as_int32 = (words - ((words >> 31) << 32)).to(torch.int32)
    return as_int32.view(torch.uint8).reshape(blocks, slabs, 2048)


def unpack_fp4_mma(packed: Tensor, n: int, k: int) -> Tensor:
    """The inverse of :func:`pack_fp4_mma`: uint8 [N, K]."""
    blocks, slabs, _ = packed.shape
    words = packed.reshape(blocks, slabs, 512, 4).view(torch.int32).long()
    low, high = _bits(packed.device)
    eights = words >> low & 7 | (words >> high & 1) << 3
    # [block, slab, tile, g, t, step / 2, step % 2, pair, row half, element]
    split = eights.to(torch.uint8).reshape(blocks, slabs, 4, 8, 4, 2, 2, 2, 2, 2)
    b, s, tile, g, t, high_step, low_step, pair, half, element = range(10)
    rows = split.permute(b, tile, half, g, s, high_step, t, low_step, pair, element)
    return rows.reshape(blocks * 64, slabs * 64)[:n, :k].contiguous()


def pack_fp4_scales(scale: Tensor) -> Tensor:
    """float8_e4m3fn scales [N, ceil(K/16)] or uint8 E8M0 exponents [N, ceil(K/32)] for
    :func:`quantkit.ops.fp4a16_linear`.

    Returns:
        uint8 [ceil(N/64), ceil(K/64), 256] or [..., 128], padded with 0: the bytes of a slab in the
        order in which lanes need them.
    """
    parts = 2 if scale.dtype == torch.float8_e4m3fn else 1  # of half a slab
    n, groups = scale.shape
    padded = torch.nn.functional.pad(
        scale.view(torch.uint8), (0, -groups % (2 * parts), 0, -n % 64)
    )
    split = padded.reshape(-1, 4, 2, 8, padded.shape[1] // (2 * parts), 2, parts)
    b, tile, i, g, s, half, part = range(7)
    ordered = split.permute(b, s, g, part, tile, half, i)
    return ordered.reshape(*ordered.shape[:2], 128 * parts)


def unpack_fp4_scales(packed: Tensor, n: int, groups: int) -> Tensor:
    """The inverse of :func:`pack_fp4_scales`: float8_e4m3fn or uint8 [N, groups]."""
    blocks, slabs, width = packed.shape
    parts = width // 128
    split = packed.reshape(blocks, slabs, 8, parts, 4, 2, 2)
    b, s, g, part, tile, half, i = range(7)
    rows = split.permute(b, tile, i, g, s, half, part).reshape(blocks * 64, slabs * 2 * parts)
    table = rows[:n, :groups].contiguous()
    return table.view(torch.float8_e4m3fn) if parts == 2 else table


def fp4a16_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    n: int,
    kind: int | str,
    group_size: int,
) -> Tensor:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    code, k = schema.fp4_code(kind), x.shape[-1]
    width = k if group_size == -1 else group_size
    groups = -(-k // width)
    if code == schema.FP4_KINDS["nf4"]:
        values = torch.tensor(NF4, dtype=torch.float32, device=x.device).to(scale.dtype).to(compute)
        table = reference.unpack_w4a16_table(scale, n).to(compute)
    else:
        values = torch.tensor(E2M1 + tuple(-v for v in E2M1), dtype=compute, device=x.device)
        table = unpack_fp4_scales(scale, n, groups)
        if code == schema.FP4_KINDS["mxfp4"]:
            exact = torch.exp2(table.double() - 127).masked_fill(table == 255, torch.nan)
            table = exact.to(compute)
        else:
            table = table.to(compute)
    group = torch.arange(k, device=x.device) // width
    weight = values[unpack_fp4_mma(packed, n, k).long()] * table[:, group]
    y = x.to(compute) @ weight.t()
    if global_scale is not None:
        y = y / global_scale.to(compute)
    return (y if bias is None else y + bias.to(compute)).to(x.dtype)
