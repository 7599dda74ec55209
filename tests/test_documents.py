"""Documents of a window that do not see each other: the same as each of them alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantkit import model as models
from quantkit.calibrate import CalibrationData, calibrate
from quantkit.documents import check_apart, cut_apart, digest, positions
from quantkit.errors import UsageError
from quantkit.paused import head_input
from quantkit.plan import make_plan
from quantkit.recipe import Recipe, Step
from quantkit.schemes import SCHEMES
from tests.conftest import tiny_llama

IDS = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(4))
RECIPE = Recipe(
    SCHEMES["w3a16-g64"],
    algorithm=(Step("rtn"), Step("distill", {"steps": 12, "scale_lr": 0.004, "apart": 0.5})),
    keep=("lm_head",),
)


def begins(*places: int, length: int = 32) -> Tensor:
    starts = torch.zeros(length, dtype=torch.bool)
    starts[list(places)] = True
    return starts


STARTS = torch.stack([begins(0, 7, 20)] * len(IDS))


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_positions_count_from_the_last_border(flags: list[bool]) -> None:
    wanted, place = [], -1
    for flag in flags:
        place = 0 if flag else place + 1
        wanted.append(place)
    assert positions(torch.tensor(flags)).tolist() == wanted


@given(st.integers(1, 60), st.floats(0, 1))
def test_a_share_is_met_and_evenly_spread(count: int, share: float) -> None:
    windows = cut_apart(torch.zeros(count, 4).long(), torch.ones(count, 4).bool(), share)
    apart = [not isinstance(window, Tensor) for window in windows]
    for end in range(1, count + 1):
        assert abs(sum(apart[:end]) - end * share) < 1 + 1e-6


def test_each_document_is_read_as_alone() -> None:
    model = tiny_llama(dtype=torch.float32)
    [window] = cut_apart(IDS[:1], begins(3, 9, 25)[None], 1.0)
    together = head_input(model, window)[0]
    for first, end in ((0, 3), (3, 9), (9, 25), (25, 32)):
        alone = head_input(model, IDS[:1, first:end])[0]
        assert torch.allclose(together[first:end], alone, atol=1e-4)
        if first:
            packed = head_input(model, IDS[:1])[0, first:end]
            assert not torch.allclose(packed, alone, atol=1e-2)
    check_apart(model, [window])


def test_a_model_that_does_not_go_by_positions_is_refused() -> None:
    model = tiny_llama()
    forward = model.forward

    def deaf(*args: object, **kwargs: object) -> object:
        kwargs.pop("position_ids", None)
        return forward(*args, **kwargs)

    model.forward = deaf  # type: ignore[method-assign]
    one, two = cut_apart(IDS[:2], torch.stack([begins(0), begins(0, 9)]), 1.0)
    check_apart(model, [IDS[:1], one])  # nothing to tell apart
    with pytest.raises(UsageError, match="does not read the documents of a window apart"):
        check_apart(model, [IDS[:1], one, two])
    with pytest.raises(UsageError, match="has no documents of tokens"):
        cut_apart(IDS, None, 0.5)
    assert all(isinstance(window, Tensor) for window in cut_apart(IDS, None, 0.0))


def test_distilled_on_both(tiny: Path, tmp_path: Path) -> None:
    """Another result than packed ones give; borders are part of a run's state."""
    data = CalibrationData(IDS, "hash", starts=STARTS)

    def run(share: float, folder: str, data: CalibrationData, **options: bool) -> Tensor:
        step = RECIPE.algorithm[1]
        step = dataclasses.replace(step, options={**step.options, "apart": share})
        recipe = dataclasses.replace(RECIPE, algorithm=(RECIPE.algorithm[0], step))
        loaded = models.load_source(str(tiny))
        plan = make_plan(recipe, loaded.model, samples=len(IDS), seq_len=IDS.shape[1])
        done = calibrate(loaded, plan, data, tmp_path / folder, **options)  # type: ignore[arg-type]
        assert done.distilled is not None
        assert done.distilled.kept
        return torch.cat([layer.qtensor.scale.flatten() for layer in done.layers.values()])

    mixed = run(0.5, "mixed", data)
    assert not torch.equal(mixed, run(0.0, "packed", data))
    assert torch.equal(mixed, run(0.5, "mixed", data, resume=True))
    other = dataclasses.replace(data, starts=STARTS.roll(1, dims=1))
    assert digest(other.starts) != digest(data.starts)
    with pytest.raises(UsageError, match="other borders of documents"):
        run(0.5, "mixed", other, resume=True)
    with pytest.raises(UsageError, match="has no documents of tokens"):
        run(0.5, "none", dataclasses.replace(data, starts=None))
