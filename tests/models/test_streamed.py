"""Layers that stay on disk compute what loaded ones compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.cli.main import run as command_line
from quantkit.errors import UsageError
from quantkit.layers import QuantLinear
from quantkit.models.load import KERNELS, load_runtime
from quantkit.models.streamed import StreamedLinear
from tests.run_helpers import arguments


@pytest.fixture
def checkpoint(tiny: Path, traffic: Path, recipe: Path, tmp_path: Path) -> Path:
    assert command_line(arguments(tiny, recipe, traffic, tmp_path / "out")) == 0
    return tmp_path / "out"


def test_logits_are_the_same_and_no_layer_is_held(checkpoint: Path) -> None:
    ids = range(5, 40)
    held = load_runtime(checkpoint, kernels="reference")
    streamed = load_runtime(checkpoint, kernels="reference", streamed=True)
    layers = [m for m in streamed.model.modules() if isinstance(m, StreamedLinear)]
    assert len(layers) == len([m for m in held.model.modules() if isinstance(m, QuantLinear)])
    assert not any(list(layer.parameters()) or list(layer.buffers()) for layer in layers)
    assert torch.equal(streamed.logits(ids), held.logits(ids))
    assert streamed.size_bytes == held.size_bytes


@pytest.mark.parametrize("kernels", [name for name in KERNELS if name != "reference"])
def test_other_kernels_than_the_reference_hold_their_layers(kernels: str, checkpoint: Path) -> None:
    with pytest.raises(
        UsageError, match=f"kernels '{kernels}': layers that stay on disk compute in"
    ):
        load_runtime(checkpoint, kernels=kernels, streamed=True)
