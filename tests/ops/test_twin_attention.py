"""Pages on a GPU: the kernels that write and read them, in the host twin, against the oracle."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import c_abi
import pytest
import torch
import twin
from attention_cases import deal_pages, int32
from ops_cases import relative_error, same_bits
from torch import Tensor

from quantkit import ops
from quantkit.ops import reference_gpu_attention as oracle
from quantkit.ops import schema

KV_DTYPES = ["bfloat16", "int8", "fp8"]


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@dataclass
class Cache:
    """One layer's pages, full of what is no number."""

    kv_dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    pages: int = 24
    kv: Tensor = field(init=False)
    kv_scale: Tensor | None = field(init=False)
    fixed: Tensor | None = None

    def __post_init__(self) -> None:
        sizes = (self.pages, self.kv_heads, self.head_dim)
        self.kv, self.kv_scale = ops.new_kv_rows(*sizes, self.kv_dtype, "cpu")
        self.kv.fill_(0xFF)
        if self.kv_scale is not None:
            self.kv_scale.fill_(torch.nan)

    def fill(self, lengths: Sequence[int], pages: Tensor, spread: float = 1.0) -> None:
        """Random keys and values of sequences of these lengths, and nothing behind them."""
        rows = oracle._rows(self.kv, self.kv_dtype)
        for s, length in enumerate(lengths):
            page, slot = oracle.places(pages[s], 0, length)
            values = torch.randn(length, self.kv_heads, 2, self.head_dim) * spread
            codes, scale = oracle._encode(values, schema.kv_code(self.kv_dtype), None)
            rows[page, :, :, slot] = codes
            if self.kv_scale is not None:
                self.kv_scale[page, :, :, slot] = scale

    def attend(
        self,
        q: Tensor,
        lengths: Sequence[int],
        pages: Tensor,
        softcap: float = 0.0,
        window: int = 0,
    ) -> Tensor:
        """y [sequences, heads, head_dim], written between guard columns that must stay NaN."""
        library, width = twin.library(), self.heads * self.head_dim
        library.qk_cuda_paged_decode_partials.restype = ctypes.c_int64
        whole = torch.full((len(lengths), width + 4), torch.nan, dtype=torch.bfloat16)
        sizes = (len(lengths), self.heads, self.head_dim, pages.shape[1])
        count = library.qk_cuda_paged_decode_partials(*(ctypes.c_int64(v) for v in sizes))
        partials, held = torch.full((count,), torch.nan), int32(lengths)
        twin.watch(q, held, pages, self.kv, self.kv_scale, outputs=(whole, partials))
        args = c_abi.PagedDecodeArgs(
            sequences=len(lengths),
            lengths=held.data_ptr(),
            pages=pages.data_ptr(),
            page_stride=pages.shape[1],
            kv_dtype=schema.kv_code(self.kv_dtype),
            data=self.kv.data_ptr(),
            scale=address(self.kv_scale),
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            score_scale=self.head_dim**-0.5,
            softcap=softcap,
            window=window,
            q=q.data_ptr(),
            ldq=q.stride(0),
            y=whole[:, 2:].data_ptr(),
            ldy=whole.stride(0),
            partials=partials.data_ptr(),
        )
        twin.check(library.qk_cuda_paged_decode(ctypes.byref(args), None))
        assert whole[:, :2].isnan().all()
        assert whole[:, width + 2 :].isnan().all()
        return whole[:, 2 : width + 2].unflatten(1, (self.heads, self.head_dim))

    def exact(
        self,
        q: Tensor,
        lengths: Sequence[int],
        pages: Tensor,
        softcap: float = 0.0,
        window: int = 0,
    ) -> Tensor:
        cache = (self.kv, self.kv_scale, self.kv_dtype, self.head_dim**-0.5, softcap, window)
        return oracle.paged_decode_attention(q.double(), int32(lengths), pages, *cache)

    def in_bf16(self, q: Tensor, lengths: Sequence[int], pages: Tensor) -> Tensor:
        """torch's attention in bf16 over the same keys and values, rounded to bf16."""
        out = []
        for s, length in enumerate(lengths):
            key, value = (
                v.bfloat16().repeat_interleave(self.heads // self.kv_heads, 1).transpose(0, 1)
                for v in ops.read_kv_rows(self.kv, self.kv_scale, self.kv_dtype, pages[s], length)
            )
            scores = (q[s].unsqueeze(1) @ key.transpose(1, 2)).float() * self.head_dim**-0.5
            out.append((scores.softmax(-1).bfloat16() @ value).squeeze(1))
        return torch.stack(out)

    def check(self, lengths: Sequence[int], q_spread: float = 1.0, spread: float = 1.0) -> None:
        """Within twice the error of torch in bf16."""
        pages = deal_pages(lengths, self.pages)
        self.fill(lengths, pages, spread)
        q = (torch.randn(len(lengths), self.heads, self.head_dim) * q_spread).bfloat16()
        exact = self.exact(q, lengths, pages)
        error = relative_error(self.attend(q, lengths, pages), exact)
        allowed = 2 * relative_error(self.in_bf16(q, lengths, pages), exact)
        assert error <= allowed, (lengths, error, allowed)


# ---- attention ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_matches_the_oracle(kv_dtype: str, head_dim: int) -> None:
    torch.manual_seed(0)
    # Warps without a token, a page's edges, several spans; heads that share one key-value head.
    Cache(kv_dtype, 6, 2, head_dim).check([1, 63, 64, 65, 17])
    Cache(kv_dtype, 1, 1, head_dim).check([16, 257, 320])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("group", [1, 8, 9, 16, 20])
def test_any_number_of_heads_shares_a_key(kv_dtype: str, group: int) -> None:
    torch.manual_seed(1)
    Cache(kv_dtype, 2 * group, 2, 64).check([70, 5])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_large_logits_and_a_sink(kv_dtype: str) -> None:
    torch.manual_seed(2)
    Cache(kv_dtype, 4, 1, 64).check([130, 64], q_spread=30, spread=3)
    # Nearly all of the probability on the first token, as in trained models.
    cache, lengths = Cache(kv_dtype, 4, 1, 64), [200]
    pages = deal_pages(lengths, cache.pages)
    cache.fill(lengths, pages)
    q = torch.randn(1, 4, 64).bfloat16()
    rows = oracle._rows(cache.kv, kv_dtype)
    sink = q[0].float().mean(0, keepdim=True) * 40
    codes, scale = oracle._encode(sink, schema.kv_code(kv_dtype), None)
    rows[int(pages[0, 0]), :, 0, 0] = codes
    if cache.kv_scale is not None:
        assert scale is not None
        cache.kv_scale[int(pages[0, 0]), :, 0, 0] = scale
    exact = cache.exact(q, lengths, pages)
    assert relative_error(cache.attend(q, lengths, pages), exact) <= 2 * relative_error(
        cache.in_bf16(q, lengths, pages), exact
    )


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_softcap_and_window(kv_dtype: str) -> None:
    torch.manual_seed(3)
    cache, lengths = Cache(kv_dtype, 4, 2, 64), [3, 64, 190, 300]
    pages = deal_pages(lengths, cache.pages)
    cache.fill(lengths, pages, 2)
    q = (torch.randn(4, 4, 64) * 3).bfloat16()
    floor = relative_error(cache.in_bf16(q, lengths, pages), cache.exact(q, lengths, pages))
    for softcap, window in [(5.0, 0), (0.0, 1), (0.0, 50), (30.0, 129), (0.0, 1000)]:
        exact = cache.exact(q, lengths, pages, softcap, window)
        error = relative_error(cache.attend(q, lengths, pages, softcap, window), exact)
        assert error <= 3 * floor, (softcap, window, error, floor)


def test_an_empty_sequence_is_zero_and_touches_no_page() -> None:
    cache = Cache("bfloat16", 4, 2, 64)
    pages = torch.full((3, 2), -1, dtype=torch.int32)
    pages[1, 0] = 5
    cache.fill([0, 1, 0], pages)
    y = cache.attend(torch.randn(3, 4, 64).bfloat16(), [0, 1, 0], pages)
    assert not y[[0, 2]].any()
    _, value = ops.read_kv_rows(cache.kv, None, "bfloat16", pages[1], 1)
    # One token has the probability 1.
    assert same_bits(y[1], value[0].repeat_interleave(2, 0).bfloat16())


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_bits_depend_on_the_sequence_alone(kv_dtype: str) -> None:
    torch.manual_seed(4)
    cache, lengths = Cache(kv_dtype, 4, 2, 64), [300, 65, 10]
    pages = deal_pages(lengths, cache.pages)
    cache.fill(lengths, pages)
    q = torch.randn(3, 4, 64).bfloat16()
    y = cache.attend(q, lengths, pages)
    for s, length in enumerate(lengths):
        alone = cache.attend(q[s : s + 1], [length], pages[s : s + 1].contiguous())
        assert same_bits(alone[0], y[s])
    for seed in (1, 2):
        twin.library().qk_twin_shuffle(seed)
        again = cache.attend(q, lengths, pages)
        twin.library().qk_twin_shuffle(0)
        assert same_bits(again, y)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_long_sequence_has_longer_spans(kv_dtype: str) -> None:
    # 64 spans of four pages end at 16,384 tokens. All of a sequence's pages may be one page.
    torch.manual_seed(5)
    cache, length = Cache(kv_dtype, 1, 1, 64, pages=3), 64 * 257 + 3
    pages = torch.randint(0, 3, (1, 258), dtype=torch.int32)
    cache.fill([192], int32([[0, 1, 2]]))
    q = torch.randn(1, 1, 64).bfloat16()
    exact = cache.exact(q, [length], pages)
    error = relative_error(cache.attend(q, [length], pages), exact)
    assert error <= 2 * relative_error(cache.in_bf16(q, [length], pages), exact)


# ---- the write ---------------------------------------------------------------------------------


def store(
    cache: Cache,
    qkv: Tensor,
    angles: tuple[Tensor, Tensor],
    past: Sequence[int],
    new: Sequence[int],
    pages: Tensor,
    norms: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """Queries [tokens, heads, head_dim] by the kernel."""
    q = torch.full((len(qkv), cache.heads, cache.head_dim), torch.nan, dtype=torch.bfloat16)
    starts = int32([sum(new[:i]) for i in range(len(new) + 1)])
    held, (cos, sin) = int32(past), angles
    inputs = (qkv, starts, held, pages, cos, sin, *norms, cache.fixed)
    twin.watch(*inputs, outputs=(q, cache.kv, cache.kv_scale))
    args = c_abi.RopeStoreArgs(
        sequences=len(new),
        tokens=len(qkv),
        starts=starts.data_ptr(),
        past=held.data_ptr(),
        pages=pages.data_ptr(),
        page_stride=pages.shape[1],
        kv_dtype=schema.kv_code(cache.kv_dtype),
        data=cache.kv.data_ptr(),
        scale=address(cache.kv_scale),
        fixed=address(cache.fixed),
        heads=cache.heads,
        kv_heads=cache.kv_heads,
        head_dim=cache.head_dim,
        rotary_dim=2 * cos.shape[1],
        qkv=qkv.data_ptr(),
        ld_qkv=qkv.stride(0),
        q_norm=address(norms[0]),
        k_norm=address(norms[1]),
        norm_epsilon=1e-6,
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        q=q.data_ptr(),
        ldq=q.stride(0),
    )
    twin.check(twin.library().qk_cuda_rope_store(ctypes.byref(args), None))
    return q


def stored_by_the_oracle(
    cache: Cache,
    qkv: Tensor,
    angles: tuple[Tensor, Tensor],
    past: Sequence[int],
    new: Sequence[int],
    pages: Tensor,
    norms: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    starts = int32([sum(new[:i]) for i in range(len(new) + 1)])
    rest = (cache.kv, cache.kv_scale, cache.fixed, cache.kv_dtype)
    return oracle.rope_store_kv_rows(qkv, *norms, *angles, starts, int32(past), pages, *rest)


def random_angles(positions: int, rotary_dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.rand(positions, rotary_dim // 2) * 6.28
    return angles.cos(), angles.sin()


#: bfloat16 pages have no scales that could be fixed.
WRITTEN = [(d, f) for d in KV_DTYPES for f in (False, True) if not (f and d == "bfloat16")]


@pytest.mark.parametrize(("kv_dtype", "fixed"), WRITTEN)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (96, 96), (128, 128)])
def test_rope_and_write_have_the_bits_of_the_oracle(
    kv_dtype: str, head_dim: int, rotary_dim: int, fixed: bool
) -> None:
    torch.manual_seed(6)
    past, new = [0, 63, 5, 100], [3, 2, 0, 1]
    pages = deal_pages([p + n for p, n in zip(past, new, strict=True)], 24)
    angles = random_angles(128, rotary_dim)
    caches = [Cache(kv_dtype, 4, 2, head_dim) for _ in range(2)]
    # Two tokens behind the last sequence's are padding.
    qkv = torch.randn(8, 8 * head_dim + 16).bfloat16()[:, : 8 * head_dim]
    qkv[1] *= 1e-3
    qkv[0, 4 * head_dim : 5 * head_dim] = 0  # a key whose own scale would be 0
    for cache in caches:
        cache.fixed = torch.tensor([0.02, 0.03]) if fixed else None
    q = store(caches[0], qkv, angles, past, new, pages)
    expected = stored_by_the_oracle(caches[1], qkv, angles, past, new, pages)
    assert same_bits(q[:6] + 0, expected[:6] + 0)
    assert q[6:].isnan().all()
    # -0 times a scale is -0 or +0: codes are compared as numbers, scales by their bits.
    ours, theirs = (oracle._rows(c.kv, kv_dtype).float().nan_to_num(nan=9999) for c in caches)
    assert torch.equal(ours, theirs)
    if kv_dtype != "bfloat16":
        assert torch.equal(*(c.kv_scale.nan_to_num(nan=9999) for c in caches))  # type: ignore


def test_norms_of_heads() -> None:
    torch.manual_seed(7)
    norms = (torch.rand(80) + 0.5, torch.rand(80) + 0.5)
    caches = [Cache("bfloat16", 2, 1, 80) for _ in range(2)]
    qkv, angles = torch.randn(5, 4 * 80).bfloat16() * 3, random_angles(8, 80)
    pages = int32([[7]])
    q = store(caches[0], qkv, angles, [0], [5], pages, norms)
    expected = stored_by_the_oracle(caches[1], qkv, angles, [0], [5], pages, norms)
    assert relative_error(q, expected) <= 2e-3  # sums of squares in another order
    keys = [ops.read_kv_rows(c.kv, None, "bfloat16", pages[0], 5)[0] for c in caches]
    assert relative_error(*keys) <= 2e-3


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_value_or_key_that_is_no_number_shows_in_its_sequence_alone(
    kv_dtype: str, fixed: bool
) -> None:
    torch.manual_seed(8)
    cache = Cache(kv_dtype, 2, 1, 64)
    if fixed and kv_dtype != "bfloat16":
        cache.fixed = torch.tensor([0.05, 0.05])
    pages, angles = int32([[3], [4], [5]]), random_angles(8, 64)
    qkv = torch.randn(12, 4 * 64).bfloat16()
    qkv[2, 3 * 64 + 5] = torch.inf  # a value of the first sequence
    qkv[5, 2 * 64 + 9] = torch.nan  # a key of the second
    q = store(cache, qkv, angles, [0, 0, 0], [4, 4, 4], pages)
    y = cache.attend(q[[3, 7, 11]], [4, 4, 4], pages)
    assert y[:2].isnan().all()
    assert y[2].isfinite().all()
    before = cache.attend(q[[1]], [2], pages[:1])  # has not seen the token
    assert before.isfinite().all()


def test_what_pages_do_not_hold_is_refused() -> None:
    library = twin.library()
    size = {"sequences": 1, "page_stride": 1, "heads": 1, "kv_heads": 1}
    for head_dim, kv_dtype in [(72, 1), (256, 1), (64, 0)]:
        args = c_abi.PagedDecodeArgs(**size, head_dim=head_dim, kv_dtype=kv_dtype)
        assert library.qk_cuda_paged_decode(ctypes.byref(args), None) == twin.UNSUPPORTED
        store_args = c_abi.RopeStoreArgs(**size, tokens=1, head_dim=2 * head_dim, kv_dtype=kv_dtype)
        assert library.qk_cuda_rope_store(ctypes.byref(store_args), None) == twin.UNSUPPORTED
    unscaled = c_abi.PagedDecodeArgs(**size, head_dim=64, kv_dtype=2)
    assert library.qk_cuda_paged_decode(ctypes.byref(unscaled), None) == twin.INVALID_ARGUMENT
