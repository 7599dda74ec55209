"""How a reloaded checkpoint is held against the model in memory."""

from __future__ import annotations

import torch

from quantkit.paused import head_input
from quantkit.reload import unsteadiness
from tests.conftest import tiny_llama


@torch.no_grad()
def test_unsteadiness_is_what_one_rounding_of_the_embedding_does() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    expected = head_input(model, ids).float()
    found = unsteadiness(model, ids, expected)
    # The same by hand: transformers takes embedded tokens in place of ids.
    embedded = model.get_input_embeddings()(ids)
    signs = torch.randint(0, 2, embedded.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moved = (embedded.float() * (1 + signs / 256)).to(embedded.dtype)
    got = model.model(inputs_embeds=moved).last_hidden_state.float()
    assert found == float((got - expected).norm() / expected.norm())
    assert 0 < found < 0.1
    assert torch.equal(head_input(model, ids).float(), expected), "the hook is gone"
