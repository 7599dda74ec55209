"""No token is lost, shares are exact, and a source that runs out is never repeated."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.data.packing import Tokens, pack, split, tokens_of

EOS = 0
DOCUMENTS = st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=12)


def feed(documents: list[list[int]]) -> Iterator[Tokens]:
    return map(tokens_of, documents)


def joined(documents: list[list[int]]) -> list[int]:
    """Slow form: each non-empty document and one EOS."""
    out: list[int] = []
    for document in documents:
        if document:
            out += document if document[-1] == EOS else [*document, EOS]
    return out


@given(DOCUMENTS, st.integers(1, 9), st.integers(1, 12))
def test_windows_are_the_documents_joined_by_eos(
    documents: list[list[int]], samples: int, seq_len: int
) -> None:
    packed = pack([feed(documents)], [1.0], samples=samples, seq_len=seq_len, eos=EOS)
    stream = joined(documents)
    windows = min(samples, len(stream) // seq_len)
    assert packed.ids.shape == (windows, seq_len)
    assert packed.ids.ravel().tolist() == stream[: windows * seq_len]
    begins = {sum(len(joined([d])) for d in documents[:i]) for i, d in enumerate(documents) if d}
    assert set(packed.starts.ravel().nonzero()[0]) == {b for b in begins if b < windows * seq_len}
    assert packed.uses[0].used == windows * seq_len
    assert packed.uses[0].exhausted == (len(stream) < samples * seq_len)


@given(st.lists(DOCUMENTS, min_size=2, max_size=4), st.integers(1, 9), st.integers(1, 12))
def test_several_feeds_lose_nothing(
    feeds: list[list[list[int]]], samples: int, seq_len: int
) -> None:
    # Marked by feed, so that each token tells where it came from.
    marked = [[[t and 10 * (i + 1) + t for t in d] for d in docs] for i, docs in enumerate(feeds)]
    weights = [float(i + 1) for i in range(len(feeds))]
    packed = pack(list(map(feed, marked)), weights, samples=samples, seq_len=seq_len, eos=EOS)
    held = sum(len(joined(documents)) for documents in marked)
    assert len(packed.ids) == min(samples, held // seq_len)
    assert sum(use.used for use in packed.uses) == packed.ids.size
    if held <= samples * seq_len:  # everything is wanted: all but the last partial window is there
        for i, documents in enumerate(marked):
            own = [t for t in packed.ids.ravel().tolist() if t // 10 == i + 1]
            expected = [t for t in joined(documents) if t]
            assert own == expected[: len(own)]


def test_shares_are_exact_and_spread_evenly() -> None:
    long = [[1] * 5000 for _ in range(4)]
    short = [[2] * 7 for _ in range(5000)]
    packed = pack([feed(long), feed(short)], [1.0, 3.0], samples=16, seq_len=1024, eos=EOS)
    assert [use.used for use in packed.uses] == [4096, 12288]
    assert packed.uses[0].documents == 1
    assert not any(use.exhausted for use in packed.uses)
    packed = pack(
        [feed([[1] * 7] * 5000), feed([[2] * 9] * 5000)], [1, 3], samples=16, seq_len=1024, eos=EOS
    )
    for window in packed.ids:
        assert np.mean(window == 1) / np.mean(window > 0) == pytest.approx(0.25, abs=0.02)


def test_a_cut_document_is_closed_before_the_next_one() -> None:
    packed = pack([feed([[1] * 50]), feed([[2] * 50])], [1.0, 1.0], samples=1, seq_len=20, eos=EOS)
    assert packed.ids[0].tolist() == [1] * 9 + [EOS] + [2] * 10


def test_a_dry_feed_is_filled_by_the_others_in_proportion() -> None:
    feeds = [feed([[1] * 9] * 10), feed([[2] * 9] * 1000), feed([[3] * 9] * 1000)]
    packed = pack(feeds, [2.0, 1.0, 1.0], samples=10, seq_len=100, eos=EOS)
    assert [use.used for use in packed.uses] == [100, 450, 450]
    assert [use.exhausted for use in packed.uses] == [True, False, False]
    assert [use.wanted for use in packed.uses] == [500, 250, 250]
    assert np.sum(packed.ids == 1) == 90


def test_a_cut_document_goes_on_where_it_stopped_when_more_is_needed() -> None:
    packed = pack(
        [feed([list(range(1, 10))]), feed([[99]])], [1.0, 1.0], samples=1, seq_len=10, eos=EOS
    )
    own = [token for token in packed.ids[0].tolist() if 0 < token < 99]
    assert own == list(range(1, len(own) + 1))
    assert packed.uses[0].documents == 1


@given(
    st.integers(0, 10_000),
    st.lists(st.floats(1e-300, 1e300, allow_subnormal=False), min_size=1, max_size=6),
)
def test_split_sums_to_the_total(total: int, weights: list[float]) -> None:
    parts = split(total, weights)
    assert sum(parts) == total
    assert min(parts) >= 0
    scale = max(weights)
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - total * (weight / scale) / sum(w / scale for w in weights)) <= 1 + 1e-6


@given(DOCUMENTS, st.integers(1, 9), st.integers(1, 12))
def test_marks_of_answers_stay_with_their_tokens(
    documents: list[list[int]], samples: int, seq_len: int
) -> None:
    """Here every token above 5 is of an answer; a closing token never is, unless it was there."""
    feeds = [iter([tokens_of(d, np.array(d, dtype=int) > 5) for d in documents]) for _ in range(2)]
    packed = pack(feeds, [1.0, 2.0], samples=samples, seq_len=seq_len, eos=EOS)
    assert packed.answers.shape == packed.ids.shape
    assert ((packed.ids > 5) == packed.answers).all()
