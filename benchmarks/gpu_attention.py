"""Paged attention on a GPU: correctness, and speed beside torch's SDPA in bf16.

SDPA reads keys and values that already lie side by side, and knows no pages: it is given the same
tokens and its time is a bound for a kernel that reads bf16. Run by ``benchmarks/gpu_session.sh``;
needs a CUDA build of torch and the built libraries.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu_command import run
from benchmarks.gpu_timing import Contenders, Table, same_bits
from quantkit import ops
from quantkit.ops import reference_gpu_attention as reference

PAGE = ops.PAGE_TOKENS
KV_DTYPES = ("bfloat16", "int8", "fp8")


class Cache:
    """Random keys and values of sequences of these lengths, written by the kernel."""

    def __init__(
        self, kv_dtype: str, heads: int, kv_heads: int, head_dim: int, lengths: list[int]
    ) -> None:
        self.kv_dtype, self.heads, self.kv_heads = kv_dtype, heads, kv_heads
        self.scale, self.lengths = head_dim**-0.5, lengths
        counts = [-(-length // PAGE) for length in lengths]
        drawn = torch.randperm(sum(counts), dtype=torch.int32)
        self.pages = torch.full((len(lengths), max(1, *counts)), -1, dtype=torch.int32)
        first = 0
        for s, count in enumerate(counts):
            self.pages[s, :count] = drawn[first : first + count]
            first += count
        self.pages = self.pages.cuda()
        self.kv, self.kv_scale = ops.new_kv_rows(max(1, first), kv_heads, head_dim, kv_dtype)
        self.kv.fill_(0xFF)
        tokens, longest = sum(lengths), max(1, *lengths)
        self.qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device="cuda").bfloat16()
        angles = torch.rand(longest, head_dim // 2, device="cuda") * 6.28
        self.angles = (angles.cos(), angles.sin())
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        self.starts = bounds.int().cuda()
        self.past = torch.zeros(len(lengths), dtype=torch.int32, device="cuda")
        self.held = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        self.q = torch.randn(len(lengths), heads, head_dim, device="cuda").bfloat16()
        self.stored = self.store()

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.starts, self.past, self.pages

    def store(self) -> Tensor:
        cache = (self.kv, self.kv_scale, None, self.kv_dtype)
        return ops.rope_store_kv_rows(self.qkv, None, None, *self.angles, *self.batch(), *cache)

    def attend(self, softcap: float = 0.0, window: int = 0) -> Tensor:
        cache = (self.kv, self.kv_scale, self.kv_dtype, self.scale, softcap, window)
        return ops.paged_decode_attention(self.q, self.held, self.pages, *cache)

    def exact(self, softcap: float = 0.0, window: int = 0) -> Tensor:
        cache = (self.kv, self.kv_scale, self.kv_dtype, self.scale, softcap, window)
        return reference.paged_decode_attention(self.q.double(), self.held, self.pages, *cache)

    @property
    def bytes(self) -> int:
        """Of the keys, values and scales that a call must read."""
        value = 2 if self.kv_dtype == "bfloat16" else 1
        head_dim = self.q.shape[-1]
        scales = 0 if self.kv_scale is None else 4
        return sum(self.lengths) * self.kv_heads * 2 * (head_dim * value + scales)


def check_store(cache: Cache) -> None:
    """The write against the reference: queries near it, codes the same but for a few."""
    kv = torch.empty_like(cache.kv).fill_(0xFF)
    scale = None if cache.kv_scale is None else torch.empty_like(cache.kv_scale)
    tables = (kv, scale, None, cache.kv_dtype)
    q = reference.rope_store_kv_rows(cache.qkv, None, None, *cache.angles, *cache.batch(), *tables)
    if not torch.equal(q, cache.stored):
        raise SystemExit(f"{cache.kv_dtype}: queries differ from the reference")
    for s, length in enumerate(cache.lengths):
        ours, theirs = (
            torch.cat(ops.read_kv_rows(pages, table, cache.kv_dtype, cache.pages[s], length), -1)
            for pages, table in ((cache.kv, cache.kv_scale), (kv, scale))
        )
        if not torch.equal(ours, theirs):
            raise SystemExit(f"{cache.kv_dtype}: {(ours != theirs).sum()} values differ")


def check(small: bool) -> None:
    torch.manual_seed(0)
    cases = 0
    heads = [(4, 4), (8, 2), (32, 2)] if small else [(4, 4), (8, 2), (32, 8), (32, 2), (9, 3)]
    batches = [[1], [63, 64, 65, 0], [300, 5]]
    if not small:
        batches += [[4097, 128, 1], [20000], [256] * 64]
    for kv_dtype, head_dim, (q_heads, kv_heads), lengths in itertools.product(
        KV_DTYPES, (64, 80, 96, 128), heads, batches
    ):
        where = f"{kv_dtype}, {q_heads}/{kv_heads} heads of {head_dim}, lengths {lengths[:4]}"
        cache = Cache(kv_dtype, q_heads, kv_heads, head_dim, lengths)
        check_store(cache)
        for softcap, window in ((0.0, 0), (20.0, 0), (0.0, 100)):
            exact, y = cache.exact(softcap, window), cache.attend(softcap, window)
            error = float((y.double() - exact).norm() / exact.norm())
            # Probabilities and the result are rounded to bf16.
            if not error <= torch.finfo(torch.bfloat16).eps:
                raise SystemExit(f"{where}, softcap {softcap}, window {window}: {error:.1e}")
            for _ in range(2 if small else 20):
                if not same_bits(cache.attend(softcap, window), y):
                    raise SystemExit(f"{where}: bits change from run to run")
            cases += 1
    cache = Cache("fp8", 32, 8, 128, [1000, 77])
    expected = cache.attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cache.attend()
    for _ in range(20):
        captured.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        if not same_bits(captured, expected):
            raise SystemExit("graph replay: other bits")
    print(f"{cases} cases, reruns and a CUDA graph: all right")


def contenders(batch: int, length: int, copies: int) -> Contenders:
    """32 query heads on 8 key-value heads of 128, as in an 8B Llama."""
    found: Contenders = {}
    for kv_dtype in KV_DTYPES:
        caches = [Cache(kv_dtype, 32, 8, 128, [length] * batch) for _ in range(copies)]
        found[kv_dtype] = (caches[0].bytes, [lambda c=c: c.attend() for c in caches])
    q = torch.randn(batch, 32, 1, 128, device="cuda").bfloat16()
    dense = [torch.randn(2, batch, 8, length, 128, device="cuda").bfloat16() for _ in range(copies)]
    found["SDPA bf16"] = (
        dense[0].nbytes,
        [lambda d=d: scaled_dot_product_attention(q, d[0], d[1], enable_gqa=True) for d in dense],
    )
    return found


def bench(path: str | None) -> None:
    table = Table()
    for batch, length in itertools.product((1, 8, 64), (256, 1024, 4096, 16384)):
        size = batch * length * 8 * 2 * 128  # of 8-bit pages
        copies = table.copies(size)
        if 6 * copies * size > 60 * 2**30:
            continue
        table.race({"batch": batch, "length": length}, contenders(batch, length, copies))
    table.write(path, heads=32, kv_heads=8, head_dim=128)


def main() -> None:
    run(__doc__, check, bench)


if __name__ == "__main__":
    main()
