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
from quantkit.batches import Batch, CalibrationData, calibration_batches, single_windows
from quantkit.calibrate import calibrate
from quantkit.distill import Distilled
from quantkit.documents import check_apart, positions, positions_apart, prediction_weights
from quantkit.errors import QuantkitError, UsageError
from quantkit.parallel import ALONE, World
from quantkit.paused import head_input
from quantkit.plan import make_plan
from quantkit.recipe import Recipe, Step
from quantkit.schemes import SCHEMES
from tests.conftest import tiny_llama
from tests.test_parallel import LOADING, together

IDS = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(4))
RECIPE = Recipe(
    SCHEMES["w3a16-g64"],
    algorithm=(Step("rtn"), Step("distill", {"steps": 12, "scale_lr": 0.004})),
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
    places = positions_apart(torch.ones(count, 4).bool(), share)
    if places is None:
        assert share == 0
        return
    apart = (places == 0).all(1).tolist()
    assert not apart[0]
    for end in range(1, count + 1):
        assert -2 - 1e-6 < sum(apart[:end]) - end * share < 1 + 1e-6


def data_of(ids: Tensor, starts: Tensor | None, share: float) -> CalibrationData:
    return CalibrationData(ids, "hash", positions=positions_apart(starts, share))


def windows_of(ids: Tensor, starts: Tensor | None, share: float = 1.0) -> list[Batch]:
    """As calibration reads them; the first is never read apart."""
    return single_windows(calibration_batches(data_of(ids, starts, share), needed=True))


def test_each_document_is_read_as_alone() -> None:
    model = tiny_llama(dtype=torch.float32)
    whole, window = windows_of(IDS[:1].repeat(2, 1), begins(3, 9, 25).repeat(2, 1))
    assert torch.equal(head_input(model, whole), head_input(model, IDS[:1]))
    together = head_input(model, window)[0]
    for first, end in ((0, 3), (3, 9), (9, 25), (25, 32)):
        alone = head_input(model, IDS[:1, first:end])[0]
        assert torch.allclose(together[first:end], alone, atol=1e-4)
        if first:
            packed = head_input(model, IDS[:1])[0, first:end]
            assert not torch.allclose(packed, alone, atol=1e-2)
    check_apart(model, [window])


def test_a_model_that_does_not_go_by_positions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    forward = model.forward

    def deaf(*args: object, **kwargs: object) -> object:
        kwargs.pop("position_ids", None)
        return forward(*args, **kwargs)

    model.forward = deaf  # type: ignore[method-assign]
    _, one, two = windows_of(IDS[:3], torch.stack([begins(0), begins(0), begins(0, 9)]))
    check_apart(model, [IDS[:1], one])  # nothing to tell apart
    with pytest.raises(UsageError, match="does not read the documents of a window apart"):
        check_apart(model, [IDS[:1], one, two])
    with pytest.raises(UsageError, match="has no documents of tokens"):
        positions_apart(None, 0.5)
    assert all(isinstance(window, Tensor) for window in windows_of(IDS, None, 0.0))
    model.lm_head.to("meta")
    check_apart(model, [one, two])  # cannot be tried, and Llamas are known
    monkeypatch.setattr(model.config, "model_type", "odd")
    with pytest.raises(UsageError, match="as part of it is on disk"):
        check_apart(model, [one, two])


def test_a_broken_model_is_named_as_such() -> None:
    model = tiny_llama()
    model.model.norm.weight.data.fill_(float("nan"))
    _, window = windows_of(IDS[:2], torch.stack([begins(0, 9)] * 2))
    with pytest.raises(QuantkitError, match="states are not finite"):
        check_apart(model, [window])


@pytest.mark.parametrize(
    "algorithm",
    [
        (Step("gptq"),),
        (Step("gptq", {"fisher": 0.5, "feedback": 0.5}),),
        (Step("awq"), Step("rtn")),
        RECIPE.algorithm,
    ],
    ids=lambda steps: "+".join(step.name for step in steps),
)
def test_what_is_calibrated_on_documents_apart(
    tiny: Path, tmp_path: Path, algorithm: tuple[Step, ...]
) -> None:
    """Another result than one text gives; borders are part of a run's state."""
    recipe = dataclasses.replace(RECIPE, algorithm=algorithm)

    def run(share: float, folder: str, starts: Tensor = STARTS, **options: bool) -> Tensor:
        loaded = models.load_source(str(tiny))
        plan = make_plan(recipe, loaded.model, samples=len(IDS), seq_len=IDS.shape[1])
        data = data_of(IDS, starts, share)
        done = calibrate(loaded, plan, data, tmp_path / folder, **options)  # type: ignore[arg-type]
        parts = [
            part.float().flatten()
            for layer in done.layers.values()
            for part in (layer.qtensor.codes, layer.qtensor.scale)
        ]
        return torch.cat(parts)

    mixed = run(0.5, "mixed")
    assert not torch.equal(mixed, run(0.0, "packed"))
    assert torch.equal(mixed, run(0.5, "mixed", resume=True))
    with pytest.raises(UsageError, match="other borders of documents"):
        run(0.5, "mixed", STARTS.roll(1, dims=1), resume=True)


def test_hessians_are_those_of_documents_read_alone(tiny: Path, tmp_path: Path) -> None:
    """Of equal documents, one of them a window: what GPTQ made of these."""
    document = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(1))
    recipe = dataclasses.replace(RECIPE, algorithm=(Step("gptq"),))

    def run(ids: Tensor, starts: Tensor | None, share: float, folder: str) -> list[Tensor]:
        loaded = models.load_source(str(tiny))
        plan = make_plan(recipe, loaded.model, samples=len(ids), seq_len=ids.shape[1])
        done = calibrate(loaded, plan, data_of(ids, starts, share), tmp_path / folder)
        return [layer.qtensor.codes for layer in done.layers.values()]

    alone = run(document.repeat(8, 1), None, 0.0, "alone")
    # The first window is never read apart: here it is the only one with a single document.
    first = torch.cat([document, document], 1)
    starts = torch.stack([begins(0, 16)] * 9)
    apart = run(first.repeat(9, 1), starts, 1.0, "apart")
    packed = run(first.repeat(9, 1), starts, 0.0, "packed")
    same = [float((a == b).float().mean()) for a, b in zip(alone, apart, strict=True)]
    other = [float((a == b).float().mean()) for a, b in zip(alone, packed, strict=True)]
    assert sum(same) > sum(other)


def test_reconstruction_on_documents_apart_is_refused(tiny: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, algorithm=(Step("rtn"), Step("signround")))
    loaded = models.load_source(str(tiny))
    plan = make_plan(recipe, loaded.model, samples=len(IDS), seq_len=IDS.shape[1])
    with pytest.raises(UsageError, match=r"signround .* calibrate\.apart 0"):
        calibrate(loaded, plan, data_of(IDS, STARTS, 1.0), tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_token_is_weighed_where_it_is_predicted() -> None:
    answers = torch.tensor([[False, True, True, False], [True, False, False, True]])
    wanted = torch.tensor([[5.0, 5.0, 1.0, 1.0], [1.0, 1.0, 5.0, 1.0]])
    assert torch.equal(prediction_weights(answers, 5.0), wanted)
    assert prediction_weights(None, 1.0) is None
    for none in (None, torch.zeros(2, 4, dtype=torch.bool)):
        with pytest.raises(UsageError, match=r"answers 5: nothing .* is known as an answer"):
            prediction_weights(none, 5.0)


def test_distilled_on_answers(tiny: Path, tmp_path: Path) -> None:
    """They are predicted better than where all tokens weigh the same; others worse."""
    answers = torch.zeros(IDS.shape, dtype=torch.bool)
    answers[:, 20:] = True
    data = CalibrationData(IDS, "hash", answers=answers)

    def run(
        factor: float, folder: str, data: CalibrationData, *, resume: bool = False
    ) -> tuple[Tensor, Distilled]:
        step = Step("distill", {"steps": 30, "scale_lr": 0.01, "answers": factor})
        recipe = dataclasses.replace(RECIPE, algorithm=(RECIPE.algorithm[0], step))
        loaded = models.load_source(str(tiny))
        with torch.no_grad():
            wanted = loaded.model(IDS).logits.log_softmax(-1)
        plan = make_plan(recipe, loaded.model, samples=len(IDS), seq_len=IDS.shape[1])
        done = calibrate(loaded, plan, data, tmp_path / folder, resume=resume)
        assert done.distilled is not None
        with torch.no_grad():
            found = loaded.model(IDS).logits.log_softmax(-1)
        return (wanted.exp() * (wanted - found)).sum(-1), done.distilled

    alike, plain = run(1.0, "alike", data)
    weighed, made = run(50.0, "weighed", data)
    predicted = answers.roll(-1, 1)
    predicted[:, -1] = False
    assert float(weighed[predicted].mean()) < float(alike[predicted].mean())
    assert float(weighed[~predicted].mean()) > float(alike[~predicted].mean())
    assert "weight_of_answers" not in plain.to_json()
    share = 50 * 12 / (50 * 12 + 20)
    assert made.to_json()["weight_of_answers"] == pytest.approx(share, abs=1e-3)
    other = CalibrationData(IDS, "hash", answers=answers.roll(1, 1))
    with pytest.raises(UsageError, match="other answers"):
        run(50.0, "weighed", other, resume=True)
    with pytest.raises(UsageError, match="known as an answer"):
        run(50.0, "none", CalibrationData(IDS, "hash"))
    assert not (tmp_path / "none").exists()


def test_on_disk_and_in_two_processes_as_in_one(tiny: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, algorithm=(Step("gptq"),))

    def run(
        folder: str, share: float = 1.0, world: World = ALONE, *, spill: bool = False
    ) -> Tensor:
        with LOADING:
            loaded = models.load_source(str(tiny))
        plan = make_plan(recipe, loaded.model, samples=len(IDS), seq_len=IDS.shape[1])
        done = calibrate(
            loaded,
            plan,
            data_of(IDS, STARTS, share),
            tmp_path / folder,
            together=world,
            activation_memory=plan.spilled_bytes if spill else None,
        )
        return torch.cat([layer.qtensor.codes.flatten() for layer in done.layers.values()] or [IDS])

    one = run("one")
    assert torch.equal(run("spilled", spill=True), one)
    two = together(2, lambda world: run(f"two{world.rank}", world=world))[0]
    packed = float((run("packed", 0.0) == one).float().mean())
    assert packed < float((two == one).float().mean()) > 0.98
