"""What is sent: drawn from a seed, or replayed from a trace."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest

from quantkit.errors import UsageError
from quantkit.loadtest.draw import Shape, draw_asks
from quantkit.loadtest.tiers import LoadTier, Slo, read_tiers
from quantkit.loadtest.trace import BLOCK_TOKENS, read_trace, replay

TIERS = (LoadTier("paid", 0.2, Slo()), LoadTier("free", 0.8, Slo()))
SHAPE = Shape(prompt_tokens=20, output_tokens=5, vocab_size=100, shared_tokens=8)


def test_a_seed_repeats_and_another_one_shares_nothing() -> None:
    draws = [draw_asks(SHAPE, TIERS, 50, seed, 2.0) for seed in ("a", "a", "b")]
    assert draws[0] == draws[1]
    assert not {ask.prompt_ids for ask in draws[0]} & {ask.prompt_ids for ask in draws[2]}
    assert len({ask.prompt_ids for ask in draws[0]}) == 50
    assert len({ask.prompt_ids[:8] for ask in draws[0]}) == 1, "the shared beginning"
    assert {len(ask.prompt_ids) for ask in draws[0]} == {20}
    assert all(0 <= i < 100 for ask in draws[0] for i in ask.prompt_ids)


def test_arrivals_are_a_poisson_process_over_the_tiers() -> None:
    """Gaps of an exponential distribution: mean and standard deviation 1 / rate."""
    asks = draw_asks(Shape(1, 1, 9), TIERS, 4000, "0", 4.0)
    gaps = [b.at - a.at for a, b in pairwise(asks)]  # type: ignore[operator]
    assert fmean(gaps) == pytest.approx(0.25, rel=0.06)
    assert fmean(g * g for g in gaps) == pytest.approx(2 * 0.25**2, rel=0.15)
    assert fmean(ask.tier == "paid" for ask in asks) == pytest.approx(0.2, abs=0.03)
    assert all(ask.at is None for ask in draw_asks(SHAPE, TIERS, 3, "0", None))


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def row(at: float, prompt: int, ids: list[int], output: int = 100) -> dict[str, object]:
    return {"timestamp": at, "input_length": prompt, "output_length": output, "hash_ids": ids}


def test_a_trace_keeps_its_times_lengths_and_prefixes(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        row(5000, 1100, [0, 1, 2]),
        row(5000, 1536, [0, 1, 7]),
        row(9000, 10, [9], output=1),
    )
    rows = read_trace(path)
    first, second, third = replay(rows, TIERS, vocab_size=1000, seed="0", scale=0.25, speed=2.0)
    assert [ask.at for ask in (first, second, third)] == [0.0, 0.0, 2.0]
    assert [len(a.prompt_ids) for a in (first, second, third)] == [275, 384, 2]
    assert [a.output_tokens for a in (first, second, third)] == [25, 25, 1]
    shared = 2 * BLOCK_TOKENS // 4
    assert first.prompt_ids[:shared] == second.prompt_ids[:shared]
    assert first.prompt_ids[shared:] != second.prompt_ids[shared : len(first.prompt_ids)]
    again = replay(rows, TIERS, vocab_size=1000, seed="0", scale=0.25)
    assert [a.prompt_ids for a in again] == [a.prompt_ids for a in (first, second, third)]
    assert replay(rows, TIERS, vocab_size=1000, seed="1")[0].prompt_ids[:9] != first.prompt_ids[:9]
    assert len(read_trace(path, 2)) == 2


@pytest.mark.parametrize("scale", [0.001, 0.0637, 0.3, 1.7])
def test_scaled_lengths_are_exact_whatever_is_rounded(tmp_path: Path, scale: float) -> None:
    path = write(tmp_path / "t.jsonl", row(0, 2048, [0, 1, 2, 3]), row(0, 513, [0, 5]))
    for ask, length in zip(
        replay(read_trace(path), TIERS, vocab_size=50, seed="0", scale=scale),
        (2048, 513),
        strict=True,
    ):
        assert len(ask.prompt_ids) == max(1, round(length * scale))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no row"),
        ([{"timestamp": 0}], ":1 is no request"),
        ([row(0, 10, [1]), 5], ":2 is no request"),
        ([row(0, 0, [])], "above 0"),
        ([row(0, 600, [1])], "1 hash ids for 600 tokens"),
        ([row(2000, 10, [1]), row(1000, 10, [2])], ":2 timestamp 1 s comes after 2 s"),
        ([row(10**400, 10, [1])], ":1 is no request .OverflowError"),
        ([row(math.nan, 10, [1])], ":1 timestamp nan must be a finite number"),
        ([row(0, 10, [1]), row(math.inf, 10, [1])], ":2 timestamp inf must be a finite number"),
        ([row(0, 10, [1], output=10**400)], f"below {2**31}"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, rows: list[object], message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UsageError, match=message):
        read_trace(path)


def test_tiers_have_shares_keys_and_promises(tmp_path: Path) -> None:
    (tmp_path / "paid.key").write_text("secret\n")
    path = tmp_path / "tiers.yaml"
    path.write_text("paid: {share: 0.2, key_file: paid.key, ttft: 1, tpot: 0.1}\nfree: {share: .8}")
    assert read_tiers(path) == (
        LoadTier("paid", 0.2, Slo(ttft=1.0, tpot=0.1), "secret"),
        LoadTier("free", 0.8, Slo()),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paid: {share: 0.2}", "shares add up to 0.2"),
        ("paid: {share: 1, ttf: 2}", "did you mean 'ttft'"),
        ("paid: {ttft: 2}", "no share"),
        ("paid: {share: 1, key_file: none}", "cannot be read"),
    ],
)
def test_mistakes_in_tiers_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tiers.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_tiers(path)
