"""Packing: every sequence is a path of its row and sees nothing but itself."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.evals.token_tree import MAX_PACKED, MAX_PATHS, common_prefix, pack

#: Three tokens, so that prefixes collide.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(SEQUENCES, st.integers(1, 40))
def test_paths_spell_their_sequences_and_see_only_themselves(
    sequences: list[list[int]], budget: int
) -> None:
    rows = pack(sequences, budget)
    assert sorted(i for row in rows for i, _ in row.paths) == list(range(len(sequences)))
    for row in rows:
        mask = row.mask()
        assert row.branches == (row.parents != list(range(-1, len(row.tokens) - 1)))
        for index, path in row.paths:
            assert [row.tokens[node] for node in path] == sequences[index]
            assert [row.positions[node] for node in path] == list(range(len(path)))
            for depth, node in enumerate(path):
                assert set(mask[node].nonzero()[0]) == set(path[: depth + 1])


@settings(max_examples=50, deadline=None)
@given(SEQUENCES, st.integers(1, 40), st.randoms())
def test_rows_depend_on_the_sequences_alone(sequences: list[list[int]], budget: int, rng) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(sequences)
    rng.shuffle(shuffled)
    assert [r.tokens for r in pack(sequences, budget)] == [r.tokens for r in pack(shuffled, budget)]


def test_a_prefix_is_one_chain_of_nodes() -> None:
    (row,) = pack([[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 7]], 100)
    assert row.tokens == [1, 2, 3, 4, 5, 6, 7]
    assert row.positions == [0, 1, 2, 3, 3, 4, 2]
    assert row.parents == [-1, 0, 1, 2, 2, 4, 1]


def test_rows_end_where_little_is_shared() -> None:
    apart = [[i] * 20 for i in range(10)]
    assert max(len(r.tokens) for r in pack(apart, 40)) == 40
    passage = list(range(500))
    together = [[*passage, k, k] for k in range(20)]
    assert len(pack(together, 40)) == 1


def test_no_row_grows_past_the_cap() -> None:
    passage = [0] * (MAX_PACKED - 1)
    rows = pack([[*passage, 1, 1], [*passage, 2, 2]], 256)
    assert [len(r.tokens) for r in rows] == [MAX_PACKED + 1] * 2
    assert not any(r.branches for r in rows)


def test_no_row_holds_more_sequences_than_the_cap() -> None:
    context = [0] * 50
    choices = [[*context, k, 1] for k in range(1, 2 * MAX_PATHS)]
    # The last one stands there twice, which costs nothing.
    rows = pack([*choices, choices[-1]], 4000)
    assert [len(r.paths) for r in rows] == [MAX_PATHS, MAX_PATHS]
    assert all(r.tokens[:50] == context for r in rows)


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([], [1]) == 0
    assert common_prefix([1], [1, 2]) == 1
