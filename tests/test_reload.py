"""How a reloaded checkpoint is held against the model in memory."""

from __future__ import annotations

import math

import pytest
import torch

from quantkit.paused import head_input
from quantkit.reload import decoder_agrees, tells_apart, unsteadiness
from tests.conftest import tiny_llama


@torch.no_grad()
def test_unsteadiness_is_what_the_last_digit_of_the_embedding_does() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    expected = head_input(model, ids).float()
    found = unsteadiness(model, ids, expected)
    # The same by hand: transformers takes embedded tokens in place of ids.
    embedded = model.get_input_embeddings()(ids)
    signs = torch.randint(0, 2, embedded.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moved = (embedded.float() * (1 + signs / 256)).to(embedded.dtype)
    apart = (moved.view(torch.int16).int() - embedded.view(torch.int16).int()).abs()
    assert float((apart == 1).float().mean()) > 0.98, "one step of bf16 each"
    assert int(apart.max()) == 1
    got = model.model(inputs_embeds=moved).last_hidden_state.float()
    assert found == float((got - expected).norm() / expected.norm())
    assert 0 < found < 0.1
    assert torch.equal(head_input(model, ids).float(), expected), "the hook is gone"


@pytest.mark.parametrize(
    ("error", "moved", "agrees"),
    [
        (0.25, 0.0, True),  # what is always let pass
        (0.25, math.nan, True),
        (0.26, 0.0, False),
        (0.26, 0.12, False),  # below twice that
        (0.26, 0.13, True),
        (0.7, 0.4, True),  # never more
        (0.71, 0.4, False),
        (0.71, math.inf, False),
        (0.26, math.nan, False),
        (math.nan, 0.0, False),
        (math.nan, 0.4, False),
        (math.nan, math.nan, False),
        (math.inf, math.inf, False),
    ],
)
def test_a_decoder_agrees_as_far_as_can_be_told(error: float, moved: float, agrees: bool) -> None:
    assert decoder_agrees(error, moved) is agrees


@pytest.mark.parametrize(
    ("moved", "tells"),
    [(0.0, True), (0.35, True), (0.36, False), (math.inf, False), (math.nan, True)],
)
def test_a_model_that_one_rounding_moves_far_says_nothing_of_a_decoder(
    moved: float, tells: bool
) -> None:
    assert tells_apart(moved) is tells
