"""Pages and attention over them: every KV type against SDPA in fp64, and bits that stay put."""

from __future__ import annotations

import pytest
import torch
from attention_cases import KV_DTYPES, PAGE, Cache, batch, cut, deal_pages, int32
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import same_bits
from torch import Tensor

from quantkit import ops

# head_dim, heads, kv_heads: every register tile and tail, one head a group to eight.
SHAPES = [(16, 1, 1), (32, 3, 1), (64, 9, 3), (80, 4, 2), (96, 8, 1), (128, 7, 7), (256, 5, 1)]
# Tokens in the pages and new ones: page and span boundaries from both sides, decode and prefill.
PAST = [0, 0, 0, 62, 64, 100, 127, 129, 190, 300]
NEW = [1, 5, 67, 1, 2, 30, 1, 1, 9, 1]
# Errors as a share of the values' weighted magnitudes: what bf16 probabilities and results cost.
ALLOWED = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def history(cache: Cache, past: list[int], new: list[int], q_dtype: torch.dtype) -> tuple:
    """Fill pages with ``past`` tokens a sequence and store ``new`` ones behind: queries, pages."""
    pages = deal_pages([a + b for a, b in zip(past, new, strict=True)], cache.pages)
    old = [s for s, length in enumerate(past) if length]
    lengths = [past[s] for s in old]
    if old:
        cache.store(cache.random_qkv(sum(lengths)), [0] * len(old), lengths, pages[old])
    return cache.store(cache.random_qkv(sum(new), q_dtype), past, new, pages), pages


@pytest.mark.parametrize("q_dtype", list(ALLOWED), ids=str)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_matches_sdpa(isa: str, kv_dtype: str, q_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = {torch.float32: SHAPES, torch.bfloat16: SHAPES[::2], torch.float16: SHAPES[2:3]}
    for head_dim, heads, kv_heads in shapes[q_dtype]:
        cache = Cache(kv_dtype, heads, kv_heads, head_dim, pages=40).poison()
        q, pages = history(cache, PAST, NEW, q_dtype)
        del [torch.full(q.shape, torch.nan, dtype=q_dtype) for _ in range(3)][:]
        y = cache.attend(q, PAST, NEW, pages)
        exact, mass = cache.exact(q, PAST, NEW, pages)
        assert y.dtype == q_dtype
        error = (y.double() - exact).abs()
        assert bool((error <= ALLOWED[q_dtype] * mass).all()), (head_dim, heads, kv_heads)
        whole = float((y.double() - exact).norm() / exact.norm())
        assert whole <= ALLOWED[q_dtype] / 2, (head_dim, heads, kv_heads)
        if q_dtype == torch.float32 and heads < 5:
            reference = cache.attend(q, PAST, NEW, pages, backend="reference")
            torch.testing.assert_close(y, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [1, 5, 64, 129, 1000])
def test_window_and_softcap(isa: str, kv_dtype: str, window: int) -> None:
    torch.manual_seed(1)
    for softcap, q_dtype in [(0.0, torch.float32), (3.0, torch.float32), (3.0, torch.bfloat16)]:
        cache = Cache(kv_dtype, 4, 2, 32, pages=40)
        q, pages = history(cache, PAST, NEW, q_dtype)
        q = q * 4  # scores that the cap bends
        y = cache.attend(q, PAST, NEW, pages, softcap, window)
        exact, mass = cache.exact(q, PAST, NEW, pages, softcap, window)
        assert bool(((y.double() - exact).abs() <= 2 * ALLOWED[q_dtype] * mass).all()), softcap
        if window == 1000:
            assert same_bits(y, cache.attend(q, PAST, NEW, pages, softcap, 0))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_scores_of_every_size(isa: str, kv_dtype: str) -> None:
    """Large scores make one key win, tiny ones average; neither overflows nor loses the others."""
    torch.manual_seed(2)
    for size in (1e-20, 1e-3, 30.0, 1e4):
        cache = Cache(kv_dtype, 2, 1, 64, pages=8)
        q, pages = history(cache, [0, 140], [40, 1], torch.float32)
        q = q * size
        y = cache.attend(q, [0, 140], [40, 1], pages)
        exact, mass = cache.exact(q, [0, 140], [40, 1], pages)
        # A score's own rounding is an error of the probability: 2^-23 of it, times the score.
        allowed = 1e-5 + min(1.0, 3e-6 * size * 8)
        assert bool(((y.double() - exact).abs() <= allowed * mass + 1e-30).all()), size


# ---- bits that stay put ----------------------------------------------------------------------


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_chunks_of_a_prompt_give_the_same_bits(isa: str, kv_dtype: str) -> None:
    torch.manual_seed(3)
    total, pages, elsewhere = 150, int32([[7, 2, 5]]), int32([[0, 6, 1]])
    for window, softcap, dtype in [(0, 0.0, torch.float32), (50, 5.0, torch.bfloat16)]:
        qkv = Cache(kv_dtype, 6, 2, 48).random_qkv(total, dtype)
        whole = Cache(kv_dtype, 6, 2, 48, pages=8)
        expected = whole.in_chunks(qkv, [total], pages, softcap, window)
        for chunks in ([1] * total, cut(total, 7), cut(total, 64), [65, 1, 1, 83], [149, 1]):
            cache = Cache(kv_dtype, 6, 2, 48, pages=8).poison()
            y = cache.in_chunks(qkv, chunks, elsewhere, softcap, window)
            assert same_bits(y, expected), (window, chunks[:3])
            for mine, other in zip(pages[0], elsewhere[0], strict=True):
                # What lies behind the last token is the poison in keys, zeros in values.
                assert same_bits(whole.kv[mine, :, 1], cache.kv[other, :, 1])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_rows_do_not_depend_on_the_batch_or_on_the_pages(isa: str, kv_dtype: str) -> None:
    torch.manual_seed(4)
    for dtype in (torch.float32, torch.bfloat16):
        crowd = Cache(kv_dtype, 6, 2, 48, pages=40)
        lengths = [a + b for a, b in zip(PAST, NEW, strict=True)]
        pages = deal_pages(lengths, 40)
        old = [s for s in range(len(PAST)) if PAST[s]]
        before = [crowd.random_qkv(length, dtype) for length in PAST]
        after = [crowd.random_qkv(length, dtype) for length in NEW]
        crowd.store(torch.cat(before), [0] * len(old), [PAST[s] for s in old], pages[old])
        q = crowd.store(torch.cat(after), PAST, NEW, pages)
        y = crowd.attend(q, PAST, NEW, pages)
        first = 0
        for s in range(len(PAST)):
            alone = Cache(kv_dtype, 6, 2, 48, pages=8).poison()
            other = deal_pages([lengths[s]], 8)
            if PAST[s]:
                alone.store(before[s], [0], PAST[s : s + 1], other)
            query = alone.store(after[s], PAST[s : s + 1], NEW[s : s + 1], other)
            assert same_bits(query, q[first : first + NEW[s]])
            own = alone.attend(query, PAST[s : s + 1], NEW[s : s + 1], other)
            assert same_bits(own, y[first : first + NEW[s]]), s
            first += NEW[s]


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_decoding_sequences_have_the_same_bits_whatever_their_number(
    isa: str, kv_dtype: str
) -> None:
    torch.manual_seed(5)
    most = 129
    cache = Cache(kv_dtype, 4, 2, 32, pages=3 * most)
    past = torch.randint(0, 170, (most,)).tolist()
    q, pages = history(cache, past, [1] * most, torch.bfloat16)
    y = cache.attend(q, past, [1] * most, pages)
    for m in [*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128]:
        part = cache.attend(q[:m], past[:m], [1] * m, pages[:m])
        assert same_bits(part, y[:m]), m
        part = cache.attend(q[-m:], past[-m:], [1] * m, pages[-m:])
        assert same_bits(part, y[-m:]), m


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(6)
    for kv_dtype in KV_DTYPES:
        results = []
        for threads in (1, 2, 3, 7):
            ops.set_num_threads(threads)
            torch.manual_seed(7)
            cache = Cache(kv_dtype, 6, 2, 48, pages=40)
            q, pages = history(cache, PAST, NEW, torch.float32)
            y = cache.attend(q, PAST, NEW, pages)
            # Alone, the longest sequence's spans are shared between the threads.
            last = cache.attend(q[-1:], PAST[-1:], NEW[-1:], pages[-1:])
            assert same_bits(last, y[-1:])
            results.append((y, cache.kv))
        for y, kv in results[1:]:
            assert same_bits(y, results[0][0])
            assert same_bits(kv, results[0][1])


# ---- what is not a number --------------------------------------------------------------------


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_no_number_reaches_those_that_see_it(
    isa: str, kv_dtype: str, value: float
) -> None:
    torch.manual_seed(8)
    total, bad, pages = 90, 35, int32([[3, 1], [0, 4]])
    for where in ("query", "key", "value"):
        for window in (0, 20):
            cache = Cache(kv_dtype, 4, 2, 32, pages=5)
            qkv = cache.random_qkv(2 * total)
            q = cache.store(qkv, [0, 0], [total, total], pages)
            clean = cache.attend(q, [0, 0], [total, total], pages, window=window)
            # The bad token sits in the first sequence, in the key-value head 1 alone.
            column = {"query": 2 * 32 + 3, "key": 5 * 32 + 3, "value": 7 * 32 + 3}[where]
            qkv[bad, column] = value
            q = cache.store(qkv, [0, 0], [total, total], pages)
            y = cache.attend(q, [0, 0], [total, total], pages, window=window)
            sees = torch.zeros(2 * total, 4, dtype=torch.bool)
            if where == "query":
                sees[bad, 2] = True
            else:
                sees[bad : bad + window if window else total, 2:] = True
            assert same_bits(y[~sees], clean[~sees]), (where, window)
            lost = ~y[sees].isfinite().any(-1)
            if where == "key" and value != value:
                assert bool(lost.all()), (where, window)
            elif where == "key":
                # An infinite score of the other sign hides a key; an int8 row may cancel it.
                assert bool(lost.any()), (where, window)
            else:
                assert bool(lost.all()), (where, window)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_what_an_earlier_owner_left_does_not_leak(isa: str, kv_dtype: str) -> None:
    torch.manual_seed(9)
    pages = int32([[2, 0, 1]])
    for chunks in ([1] * 70, [70], [64, 6], [5, 100], [150]):
        clean, used = Cache(kv_dtype, 4, 2, 32, pages=3), Cache(kv_dtype, 4, 2, 32, pages=3)
        used.poison()
        qkv = clean.random_qkv(sum(chunks))
        assert same_bits(used.in_chunks(qkv, chunks, pages), clean.in_chunks(qkv, chunks, pages)), (
            chunks
        )


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_zeros_and_subnormals_are_stored_as_such(isa: str, kv_dtype: str) -> None:
    cache, pages = Cache(kv_dtype, 2, 1, 32, pages=1), int32([[0]])
    qkv = cache.random_qkv(12)
    qkv[3] = 0
    for row, size in ((5, 1e-38), (6, 1e-40), (7, 1e-43), (8, 1e-45)):
        qkv[row, 64:] = torch.where(torch.arange(64) % 3 == 0, size, 0.0)
    q = cache.store(qkv, [0], [12], pages)
    key, value = ops.read_kv_pages(cache.kv, cache.kv_scale, kv_dtype, pages[0], 12)
    for rows in (key, value):
        assert bool((rows[3] == 0).all())
        assert float(rows[5:9].abs().max()) < 2e-38
    y = cache.attend(q, [0], [12], pages)
    exact, mass = cache.exact(q, [0], [12], pages)
    assert bool(((y.double() - exact).abs() <= 1e-5 * mass + 1e-37).all())


# ---- storing ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    past=st.lists(st.integers(0, 200), min_size=1, max_size=5),
    data=st.data(),
    kv_dtype=st.sampled_from(KV_DTYPES),
    head_dim=st.sampled_from([16, 32, 80, 144]),
    kv_heads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_pages_scatter_and_gather_exactly(
    past: list[int],
    data: st.DataObject,
    kv_dtype: str,
    head_dim: int,
    kv_heads: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    new = data.draw(st.lists(st.integers(1, 90), min_size=len(past), max_size=len(past)))
    torch.manual_seed(seed)
    lengths = [a + b for a, b in zip(past, new, strict=True)]
    pool = sum(-(-length // PAGE) for length in lengths) + 2
    caches = [Cache(kv_dtype, kv_heads, kv_heads, head_dim, pages=pool) for _ in range(2)]
    pages = deal_pages(lengths, pool)
    held = [caches[0].random_qkv(length, dtype) for length in past]
    fresh = [caches[0].random_qkv(length, dtype) for length in new]
    old = [s for s, length in enumerate(past) if length]
    for cache, backend in zip(caches, ("native", "reference"), strict=True):
        if old:
            rows = torch.cat([held[s] for s in old])
            lengths_held = [past[s] for s in old]
            cache.store(rows, [0] * len(old), lengths_held, pages[old], backend=backend)
        q = cache.store(torch.cat(fresh), past, new, pages, backend=backend)
        assert same_bits(q.flatten(1), torch.cat(fresh)[:, : kv_heads * head_dim])
    # The native layout is the reference's, to the byte: data and scales, pages unused included.
    assert same_bits(caches[0].kv, caches[1].kv)
    if caches[0].kv_scale is not None:
        assert same_bits(caches[0].kv_scale, caches[1].kv_scale)
    for s, length in enumerate(lengths):
        arguments = (caches[0].kv, caches[0].kv_scale, kv_dtype, pages[s], length)
        key, value = ops.read_kv_pages(*arguments)
        rows = torch.cat((held[s], fresh[s])).float().unflatten(1, (3, kv_heads, head_dim))
        for stored, row in ((key, rows[:, 1]), (value, rows[:, 2])):
            most = row.abs().amax(-1, keepdim=True)
            if kv_dtype == "float32":
                assert same_bits(stored, row.contiguous())
            elif kv_dtype == "bfloat16":
                assert same_bits(stored, row.bfloat16().float())
            elif kv_dtype == "int8":
                assert bool(((stored - row).abs() <= most / 127.5 * 0.501).all())
            else:  # four significant bits, and steps of 2^-9 at the bottom of a range of 448
                assert bool(((stored - row).abs() <= row.abs() / 16 + most / 448 / 1000).all())


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_and_rotation_match_the_reference(
    isa: str, kv_dtype: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(10)
    past, new = [0, 60, 3], [5, 9, 1]
    for rotary_dim in (0, 2, 24, 48):
        for norms in ((None, None), (torch.rand(48), None), (torch.rand(48), torch.rand(48))):
            cache = Cache(kv_dtype, 4, 2, 48, pages=8).turn(rotary_dim)
            twin = Cache(kv_dtype, 4, 2, 48, pages=8)
            twin.cos, twin.sin = cache.cos, cache.sin
            pages = deal_pages([5, 69, 4], 8)
            qkv = cache.random_qkv(15, dtype)
            q = cache.store(qkv, past, new, pages, norms)
            expected = twin.store(qkv.double(), past, new, pages, norms, backend="reference")
            step = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
            assert q.dtype == dtype
            assert bool(((q.double() - expected).abs() <= step * expected.abs() + 2e-6).all())
            for s in range(3):
                arguments = (pages[s], past[s] + new[s])
                ours = ops.read_kv_pages(cache.kv, cache.kv_scale, kv_dtype, *arguments)
                theirs = ops.read_kv_pages(twin.kv, twin.kv_scale, kv_dtype, *arguments)
                # Pages round: a last bit before rounding may be a step after it.
                step = {"float32": 1e-6, "bfloat16": 2.0**-7, "int8": 2.0**-6, "fp8": 2.0**-3}
                for a, b in zip(ours, theirs, strict=True):
                    fresh = slice(past[s], past[s] + new[s])
                    a, b = a[fresh], b[fresh]
                    most = b.abs().amax(-1, keepdim=True)
                    assert bool(((a - b).abs() <= step[kv_dtype] * most).all())
                    assert float(((a - b).abs() > 1e-5 * most).float().mean()) < 0.02


def test_a_store_leaves_other_tokens_alone() -> None:
    torch.manual_seed(11)
    for kv_dtype in KV_DTYPES:
        cache = Cache(kv_dtype, 2, 1, 32, pages=6)
        pages = int32([[4, 1], [0, 3]])
        cache.store(cache.random_qkv(200), [0, 0], [100, 100], pages)
        held = [ops.read_kv_pages(cache.kv, cache.kv_scale, kv_dtype, row, 100) for row in pages]
        untouched = cache.kv[[2, 5]].clone()
        cache.store(cache.random_qkv(29), [100, 100], [28, 1], pages)
        for row, (key, value) in zip(pages, held, strict=True):
            now = ops.read_kv_pages(cache.kv, cache.kv_scale, kv_dtype, row, 100)
            assert same_bits(now[0], key)
            assert same_bits(now[1], value)
        assert same_bits(cache.kv[[2, 5]], untouched)


def test_strided_inputs_and_empty_batches() -> None:
    torch.manual_seed(12)
    cache, twin = Cache("int8", 4, 2, 32, pages=3), Cache("int8", 4, 2, 32, pages=3)
    pages = int32([[2, 0], [1, -1]])
    wide = torch.randn(40, 300)
    q = cache.store(wide[::2, 20:276], [0, 0], [18, 2], pages)
    expected = twin.store(wide[::2, 20:276].contiguous(), [0, 0], [18, 2], pages)
    assert same_bits(q, expected)
    assert same_bits(cache.kv, twin.kv)
    y = cache.attend(q, [0, 0], [18, 2], pages)
    turned = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert same_bits(cache.attend(turned, [0, 0], [18, 2], pages), y)
    more = torch.cat((pages, torch.full((2, 3), 9, dtype=torch.int32)), 1)[:, :2]
    assert same_bits(cache.attend(q, [0, 0], [18, 2], more), y)
    none = torch.zeros(0, 2, dtype=torch.int32)
    assert cache.store(wide[:0, :256], [], [], none).shape == (0, 4, 32)
    assert cache.attend(q[:0], [], [], none).shape == (0, 4, 32)


def test_errors_name_value_rule_and_remedy() -> None:
    cache, pages = Cache("int8", 4, 2, 32, pages=3, positions=100), int32([[2, 0]])
    qkv = cache.random_qkv(3)
    cache.store(qkv, [0], [3], pages)
    starts, past, _ = batch([0], [3], pages)

    def store(**change: object) -> None:
        arguments: dict[str, object] = {
            "qkv": qkv,
            "q_norm": None,
            "k_norm": None,
            "cos": cache.cos,
            "sin": cache.sin,
            "starts": starts,
            "past": past,
            "pages": pages,
            "kv": cache.kv,
            "kv_scale": cache.kv_scale,
            "kv_dtype": "int8",
        }
        ops.rope_store_kv(**(arguments | change))

    store()
    cases = [
        ({"qkv": qkv[:, :240]}, r"qkv has shape \[3, 240\], must be \[tokens, \(heads \+ 2 \* 2\)"),
        ({"qkv": qkv.double()}, "qkv has dtype Double, must be float32, float16"),
        ({"cos": cache.cos.repeat(1, 2)}, r"cos has shape \[100, 32\], must be .* head_dim = 32"),
        ({"sin": cache.sin[:9]}, r"sin has shape \[9, 16\], must be \[100, 16\]"),
        ({"q_norm": torch.ones(3)}, r"q_norm has shape \[3\], must be \[32\]"),
        ({"starts": starts.long()}, r"starts has dtype Long, must be int32; convert it with \.int"),
        ({"starts": int32([0, 2])}, "starts goes from 0 to 2, must go from 0 to the number of"),
        ({"starts": int32([0, 1, 3])}, "starts has 3 values and pages has 1 rows, must be 2 and 1"),
        ({"past": int32([-1])}, "sequence 0 has 3 new tokens behind -1; must be at least 1 behind"),
        ({"past": int32([98])}, "sequence 0 ends at position 101, past the 100 rows of cos and si"),
        ({"pages": pages[:, :0]}, "sequence 0 needs 1 pages of 64 tokens; pages has 0 columns"),
        ({"pages": int32([[3, 0]])}, r"pages\[0, 0\] is 3, must be in 0\.\.2"),
        ({"kv": cache.kv[:, :, :1]}, r"kv has dtype Byte and shape \[3, 2, 1, 2048\], must be con"),
        ({"kv": cache.kv[..., :1000].clone()}, "1000 bytes are no page of 64 tokens"),
        ({"kv_scale": None}, "kv_scale is missing; 8-bit pages need one"),
        ({"kv_scale": cache.kv_scale[:1]}, r"kv_scale has dtype Float and shape \[1, 2, 2, 64\]"),
    ]
    for change, message in cases:
        with pytest.raises(RuntimeError, match=message):
            store(**change)
    with pytest.raises(ValueError, match=r"kv_dtype 'int4' is unknown; use 'float32', .* or 'fp8'"):
        store(kv_dtype="int4")
    with pytest.raises(ValueError, match="head_dim 40 must be a multiple of 16, at most 512"):
        ops.new_kv_pages(3, 2, 40, "int8")

    q = torch.randn(3, 4, 32)

    def attend(*arguments: object, q: Tensor = q) -> None:
        ops.paged_attention(
            q, starts, past, pages, cache.kv, cache.kv_scale, "int8", 1.0, *arguments
        )

    attend()
    with pytest.raises(
        RuntimeError, match=r"q has shape \[3, 3, 32\], must be \[tokens, heads, 32"
    ):
        attend(q=q[:, :3])
    with pytest.raises(RuntimeError, match="softcap -1 must be positive, or 0 for none"):
        attend(-1.0)
    with pytest.raises(RuntimeError, match="window -1 must be positive, or 0 for all keys"):
        attend(0.0, -1)
    with pytest.raises(RuntimeError, match=r"starts goes from 0 to 3, must go .* tokens, 2"):
        attend(q=q[:2])


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 500), st.integers(1, 140)), min_size=1, max_size=6),
    kv_dtype=st.sampled_from(KV_DTYPES),
    shape=st.sampled_from([*SHAPES, (512, 2, 2), (112, 16, 2), (64, 32, 8), (48, 12, 1)]),
    q_dtype=st.sampled_from(list(ALLOWED)),
    window=st.sampled_from([0, 0, 1, 33, 128, 300]),
    softcap=st.sampled_from([0.0, 0.0, 2.0, 50.0]),
    isa=st.sampled_from(ops.available_isas()),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_any_batch_matches_sdpa(
    lengths: list[tuple[int, int]],
    kv_dtype: str,
    shape: tuple[int, int, int],
    q_dtype: torch.dtype,
    window: int,
    softcap: float,
    isa: str,
    threads: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    head_dim, heads, kv_heads = shape
    past, new = [a for a, _ in lengths], [b for _, b in lengths]
    pool = sum(-(-(a + b) // PAGE) for a, b in lengths)
    cache = Cache(kv_dtype, heads, kv_heads, head_dim, pages=pool).poison()
    ops.set_isa(isa)
    ops.set_num_threads(threads)
    try:
        q, pages = history(cache, past, new, q_dtype)
        y = cache.attend(q, past, new, pages, softcap, window)
    finally:
        ops.set_isa("auto")
    exact, mass = cache.exact(q, past, new, pages, softcap, window)
    # A half below 2^-14 is spaced evenly.
    assert bool(((y.double() - exact).abs() <= 2 * ALLOWED[q_dtype] * mass + 3e-8).all())
