"""The host twin itself: what each instruction computes, and that each broken rule is reported."""

from __future__ import annotations

import pytest
import torch
import twin
from torch import Tensor

from quantkit.ops.reference_fp4 import E2M1, NF4

NOTHING, NO_WAIT, WAIT_TOO_FEW, NO_BARRIER, OVERWRITES = range(5)


def bits(values: Tensor) -> Tensor:
    """[..., 2 n] 16-bit floats -> [..., n] words."""
    return values.contiguous().view(torch.int32)


def pairs(words: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., n] words -> [..., 2 n] 16-bit floats."""
    return words.contiguous().view(dtype)


@pytest.mark.parametrize("kind", [0, 1, 4], ids=["bf16", "f16", "bf16-ldmatrix"])
def test_mma_16_bit(kind: int) -> None:
    torch.manual_seed(kind)
    dtype = torch.float16 if kind == 1 else torch.bfloat16
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    d = torch.zeros(16, 8) if kind == 4 else torch.randn(16, 8)
    expected = (a.double() @ b.double() + d.double()).float()
    operand = b if kind == 4 else b.t().contiguous()
    twin.watch(a, operand, outputs=(d,))
    twin.check(twin.library().qk_probe_mma(kind, *map(twin.pointer, (a, operand, d))))
    assert torch.equal(d, expected)


def test_mma_int8() -> None:
    a, b = (torch.randint(-128, 128, (rows, 32), dtype=torch.int8) for rows in (16, 8))
    d = torch.randint(-1000, 1000, (16, 8), dtype=torch.int32)
    expected = a.int() @ b.int().t() + d
    twin.watch(a, b, outputs=(d,))
    twin.check(twin.library().qk_probe_mma(2, *map(twin.pointer, (a, b, d))))
    assert torch.equal(d, expected)


def test_mma_e4m3() -> None:
    a, b = (torch.randn(rows, 32).to(torch.float8_e4m3fn) for rows in (16, 8))
    d = torch.randn(16, 8)
    expected = (a.double() @ b.double().t() + d.double()).float()
    twin.watch(a, b, outputs=(d,))
    twin.check(twin.library().qk_probe_mma(3, *map(twin.pointer, (a, b, d))))
    assert torch.equal(d, expected)


def test_shuffles_ballot_and_byte_permutation() -> None:
    out = torch.empty(5, 32, dtype=torch.int32)
    twin.watch(outputs=(out,))
    twin.check(twin.library().qk_probe_warp(twin.pointer(out)))
    lane = torch.arange(32, dtype=torch.int32)
    assert torch.equal(out[0], 100 + (lane * 7 + 3) % 32)
    assert torch.equal(out[1], 100 + (lane ^ 5))
    assert torch.equal(out[2], 100 + torch.where(lane < 28, lane + 4, lane))
    assert out[3].unique().tolist() == [sum(1 << i for i in range(0, 31, 3))]
    first = [0x77005522, 0x77005533, 0x77005544, 0x77005555]  # selectors 0x7052 .. 0x7055
    assert out[4, :4].tolist() == first


def rounded_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """fp64 to a 16-bit float; torch's own conversion goes through fp32."""
    digits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    mantissa, exponent = torch.frexp(exact)
    return torch.ldexp(torch.round(mantissa * 2**digits), exponent - digits).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pair_arithmetic_rounds_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Magnitudes far apart, so that sums lose bits; fp64 holds every product and these sums. None
    # so small that a product is subnormal in f16.
    values = (torch.rand(2000, 6) + 0.5) * 2.0 ** torch.randint(-6, 7, (2000, 6))
    values *= torch.randint(0, 2, (2000, 6)) * 2 - 1
    a, b, c = values.to(dtype).split(2, 1)
    operands = bits(torch.stack((a, b, c), 1)).reshape(2000, 3)
    out = torch.empty(2000, 4, dtype=torch.int32)
    twin.watch(operands, outputs=(out,))
    is_f16 = int(dtype == torch.float16)
    probe = twin.library().qk_probe_pairs
    twin.check(probe(is_f16, twin.pointer(operands), twin.pointer(out), 2000))
    x, y, z = a.double(), b.double(), c.double()
    for i, exact in enumerate((x + y, x - y, x * y, x * y + z)):
        assert torch.equal(pairs(out[:, i : i + 1], dtype), rounded_once(exact, dtype)), i


def test_conversions_round_to_nearest_even() -> None:
    torch.manual_seed(1)
    numbers = torch.randn(3000) * 2.0 ** torch.randint(-30, 20, (3000,))
    halfway = torch.tensor(
        [0.0, 2049.0, 2051.0, 257.0, 259.0, 65519.0, 65520.0, 448.0, 464.0, 17.0]
    )
    v = torch.cat((numbers, halfway, torch.tensor([torch.inf])))
    out = torch.empty(len(v), 3, dtype=torch.int32)
    twin.watch(v, outputs=(out,))
    twin.check(twin.library().qk_probe_conversions(twin.pointer(v), twin.pointer(out), len(v)))
    both = torch.stack((v, -v), 1)
    assert torch.equal(pairs(out[:, :1], torch.float16), both.half())
    assert torch.equal(pairs(out[:, 1:2], torch.bfloat16), both.bfloat16())
    clamped = both.clamp(-448, 448).to(torch.float8_e4m3fn)  # the instruction saturates
    assert torch.equal(pairs(out[:, 2:], torch.float16), clamped.half())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_int4_decode_is_exact(dtype: torch.dtype) -> None:
    words = twin.words(512)
    out = torch.empty(512, 4, dtype=torch.int32)
    twin.watch(words, outputs=(out,))
    is_f16 = int(dtype == torch.float16)
    twin.check(twin.library().qk_probe_int4(is_f16, twin.pointer(words), twin.pointer(out), 512))
    shift = torch.tensor([[0, 16], [4, 20], [8, 24], [12, 28]])
    codes = (words.long()[:, None, None] >> shift) & 15
    even, odd = torch.arange(512) % 16, torch.arange(512) // 16 % 16
    zero = torch.stack((even, odd, even, odd), 1)[:, :, None]
    assert torch.equal(pairs(out, dtype).reshape(512, 4, 2), (codes - zero).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp4_decode_is_exact(dtype: torch.dtype) -> None:
    words = twin.words(512)
    out = torch.empty(512, 8, dtype=torch.int32)
    twin.watch(words, outputs=(out,))
    is_f16 = int(dtype == torch.float16)
    twin.check(twin.library().qk_probe_fp4(is_f16, twin.pointer(words), twin.pointer(out), 512))
    i = torch.arange(8)
    top = 8 * (i % 4) + torch.where(i < 4, 7, 3)
    wide = words.long()[:, None]
    codes = (wide >> (4 * i) & 7) + 8 * (wide >> top & 1)
    tables = (E2M1 + tuple(-v for v in E2M1), NF4)
    expected = torch.stack([torch.tensor(table)[codes] for table in tables], 1)
    assert torch.equal(pairs(out, dtype).reshape(512, 2, 8), expected.to(dtype))


def run_pipeline(mistake: int) -> tuple[int, Tensor, Tensor]:
    source = twin.words(4, 64, 4)
    out = torch.zeros(4, 64, 4, dtype=torch.int32)
    twin.watch(source, outputs=(out,))
    status = twin.library().qk_probe_pipeline(mistake, twin.pointer(source), twin.pointer(out))
    expected = source.clone()
    expected[3, :, 2:] = 0  # cp.async of 8 bytes fills the rest with zeros
    return status, out, expected.roll(-33, 1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cp_async_pipeline(seed: int) -> None:
    twin.library().qk_twin_shuffle(seed)
    status, out, expected = run_pipeline(NOTHING)
    twin.library().qk_twin_shuffle(0)
    twin.check(status)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (NO_WAIT, "is read while a cp.async to it has not been waited for"),
        (WAIT_TOO_FEW, "is read while a cp.async to it has not been waited for"),
        # Which of two threads the machine runs first decides which of them is told.
        (NO_BARRIER, "is read (without a barrier after thread|while a cp.async to it)"),
        (OVERWRITES, "(is written without a barrier after thread|is read while a cp.async to it)"),
    ],
)
def test_a_missing_wait_or_barrier_is_an_error(mistake: int, message: str) -> None:
    for seed in (0, 7):
        twin.library().qk_twin_shuffle(seed)
        status, _, _ = run_pipeline(mistake)
        twin.library().qk_twin_shuffle(0)
        assert status == twin.LAUNCH_FAILED
        with pytest.raises(AssertionError, match=message):
            twin.check(status)


def test_named_barriers_order_the_warps_that_meet() -> None:
    out = torch.empty(64, dtype=torch.int32)
    twin.watch(outputs=(out,))
    twin.check(twin.library().qk_probe_producers(twin.pointer(out)))
    assert torch.equal(out, torch.arange(63, -1, -1, dtype=torch.int32) ** 2)


RULES = [
    "element 64 of a shared array of 64",
    "an array of 65536 bytes at 0 of shared memory, which has 2048",
    "of shared memory: not aligned",
    "16 bytes of global memory at .*: not aligned",
    "4 bytes of global memory read at .*, outside every argument",
    "at (shuffle|ballot) while other threads of its warp are at (shuffle|ballot)",
    "thread 5 has ended.*diverged at a collective",
    "thread 0 waits at a barrier; .* thread 32 has ended",
    "without a barrier after thread",
    "",
    "is written, it is an input",
    "",
]


@pytest.mark.parametrize("rule", range(len(RULES)), ids=[r or "none" for r in RULES])
def test_a_broken_rule_is_reported(rule: int) -> None:
    source = torch.zeros(64, dtype=torch.int32)
    out = torch.zeros(64, dtype=torch.int32)
    twin.watch(source, outputs=(out,))
    status = twin.library().qk_probe_break(rule, twin.pointer(source), twin.pointer(out))
    if RULES[rule]:
        assert status == twin.LAUNCH_FAILED
        with pytest.raises(AssertionError, match=RULES[rule]):
            twin.check(status)
    else:
        twin.check(status)
    if rule == 9:  # shared memory starts as NaNs
        assert out.view(torch.float32).isnan().all()
