"""States of packed sequences, on the native decoder and in transformers' modules."""

from __future__ import annotations

import copy

import torch
from eval_builders import tiny_runtime
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.evals.forward import DecoderForward, ModuleForward
from quantkit.evals.greedy import DecoderGreedy, ModuleGreedy
from quantkit.evals.token_tree import pack
from quantkit.models.llama_family import build_decoder

_RUNTIME = tiny_runtime()
MODEL = _RUNTIME.model.float()
DECODER = build_decoder(copy.deepcopy(MODEL))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=90), min_size=1, max_size=6))
def test_a_tree_holds_what_each_sequence_has_alone(sequences: list[list[int]]) -> None:
    """Shared pages, forks in the middle of a page, one level after the other: the same bits."""
    forward = DecoderForward(DECODER)
    for row in pack(sequences, 256):
        states = forward.tree_states(row)
        for index, path in row.paths:
            alone = forward.states(torch.tensor([sequences[index]]))[0]
            assert torch.equal(states[path], alone)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), min_size=1, max_size=6))
def test_chains_cover_a_row(sequences: list[list[int]]) -> None:
    for row in pack(sequences, 256):
        chains = row.chains()
        assert [n for c in chains for n in range(c.start, c.end)] == list(range(len(row.tokens)))
        for chain in chains:
            above = -1 if chain.parent is None else chains[chain.parent].end - 1
            assert row.parents[chain.start] == above
            assert row.parents[chain.start + 1 : chain.end] == list(
                range(chain.start, chain.end - 1)
            )


def test_trees_agree_with_transformers() -> None:
    prefix = [5, 9, 2] * 30
    sequences = [[*prefix, 1, 2], [*prefix, 1, 3, 4], [*prefix[:40], 7], [8, 8]]
    ours, theirs = DecoderForward(DECODER), ModuleForward(MODEL)
    for row in pack(sequences, 256):
        a = ours.logits(ours.tree_states(row))
        b = theirs.logits(theirs.tree_states(row))
        assert float((a - b).norm() / b.norm()) < 1e-5


def test_padding_changes_nothing() -> None:
    forward = DecoderForward(DECODER)
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    states = forward.states(tokens, mask=mask)
    assert torch.equal(states[1, :2], forward.states(torch.tensor([[5, 6]]))[0])


def test_greedy_writes_what_transformers_writes() -> None:
    prompts = [[5, 6, 7], [9] * 70, [3, 1]]
    limits = [12, 5, 70]

    def never(index: int, written: list[int]) -> bool:
        return False

    ours = DecoderGreedy(DECODER, frozenset())(prompts, limits, never)
    theirs = [
        ModuleGreedy(MODEL, frozenset(), pads=False)([p], [n], never)[0]
        for p, n in zip(prompts, limits, strict=True)
    ]
    assert [len(w) for w in ours] == limits
    assert ours == theirs
