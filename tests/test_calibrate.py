"""The calibration loop: what it computes, what it leaves on disk, how it resumes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from quantkit import model as models
from quantkit import numerics
from quantkit.algorithms import Stats, gptq
from quantkit.batches import cut_batches
from quantkit.calibrate import CalibrationData, calibrate
from quantkit.collector import Collector
from quantkit.errors import QuantkitError, UsageError
from quantkit.plan import Plan, make_plan
from quantkit.quantize import QuantizedLayer
from quantkit.recipe import Recipe, Step
from quantkit.schemes import SCHEMES
from tests.conftest import save_model, tiny_llama

IDS = torch.randint(0, 256, (6, 64), generator=torch.Generator().manual_seed(2))


def recipe(scheme: str, algorithm: str = "gptq", keep: tuple[str, ...] = ("lm_head",)) -> Recipe:
    return Recipe(SCHEMES[scheme], algorithm=(Step(algorithm),), keep=keep)


def run(
    source: Path, work: Path, how: Recipe, ids: torch.Tensor | None = IDS, **options: object
) -> tuple[models.SourceModel, Plan, dict[str, QuantizedLayer]]:
    loaded = models.load_source(str(source))
    samples, seq_len = ids.shape if ids is not None else (1, 2)
    plan = make_plan(how, loaded.model, samples=samples, seq_len=seq_len)
    data = None if ids is None else CalibrationData(ids, "hash")
    done = calibrate(loaded, plan, data, work, **options)  # type: ignore[arg-type]
    return loaded, plan, done.layers


def same(a: dict[str, QuantizedLayer], b: dict[str, QuantizedLayer]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(t, b[name].qtensor.tensors()[part])
        for name, layer in a.items()
        for part, t in layer.qtensor.tensors().items()
    )


def test_every_layer_sees_its_quantized_predecessors(tiny: Path, tmp_path: Path) -> None:
    """Solve one layer by hand, on the inputs an ordinary forward pass of the result gives it."""
    loaded, plan, layers = run(tiny, tmp_path / "w", recipe("w4a16-g64"))
    name = "model.layers.1.mlp.down_proj"
    seen: list[torch.Tensor] = []
    module = loaded.model.get_submodule(name)
    hook = module.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        loaded.model(IDS)
    hook.remove()
    x = torch.cat(seen).reshape(-1, 768).float()
    original = models.load_source(str(tiny)).model.get_submodule(name).weight
    planned = next(layer for layer in plan.layers if layer.name == name)
    by_hand = gptq.solve(
        original, Stats(x.t() @ x / len(x), len(x)), planned.scheme.weight, planned.options
    )
    differs = (by_hand.codes != layers[name].qtensor.codes).float().mean()
    assert float(differs) < 0.01  # batches are summed in another order
    assert torch.equal(module.weight, numerics.dequantize(layers[name].qtensor, torch.bfloat16))


def test_gptq_lowers_the_output_error(tiny: Path, tmp_path: Path) -> None:
    _, _, nearest = run(tiny, tmp_path / "a", recipe("w4a16-g64", "rtn"))
    _, _, solved = run(tiny, tmp_path / "b", recipe("w4a16-g64"))

    def mean(layers: dict[str, QuantizedLayer]) -> float:
        return sum(layer.output_error or 0 for layer in layers.values()) / len(layers)

    assert mean(solved) < 0.9 * mean(nearest)


@pytest.mark.parametrize("scheme", ["w4a16-asym-g64", "w8a8-static"])
@pytest.mark.parametrize("kept_blocks", [0, 1, 2])
def test_resume_gives_the_same_bytes(
    scheme: str, kept_blocks: int, tiny: Path, tmp_path: Path
) -> None:
    how = recipe(scheme, keep=())
    work = tmp_path / "work"
    _, _, whole = run(tiny, work, how)
    files = sorted((work / "blocks").glob("*.json"))
    assert len(files) == 3  # two blocks and the head
    for path in files:
        # As if killed: later blocks never came, the one in progress has tensors and no JSON.
        index = int(path.stem)
        if index == -1 or index >= kept_blocks:
            path.unlink()
    _, _, resumed = run(tiny, work, how, resume=True)
    assert same(whole, resumed)
    scales = {n: layer.input_scale for n, layer in whole.items()}
    for name, layer in resumed.items():
        if scales[name] is not None:
            assert torch.equal(layer.input_scale, scales[name])


FEEDBACK = Recipe(
    SCHEMES["w4a16-g64"],
    algorithm=(Step("awq", {"grid": 4}), Step("gptq", {"feedback": 1.0})),
    keep=(),
)


def test_feedback_sees_the_unquantized_models_inputs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pair that a layer's solver compares, beside ordinary passes of the two models."""
    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    update = Collector.update

    def record(self: Collector, x: torch.Tensor, unquantized: torch.Tensor | None = None) -> None:
        assert unquantized is not None
        pairs.setdefault(self.members[0].name, []).append((x, unquantized))
        update(self, x, unquantized)

    monkeypatch.setattr(Collector, "update", record)
    how = dataclasses.replace(FEEDBACK, algorithm=FEEDBACK.algorithm[1:])
    loaded, _, _ = run(tiny, tmp_path / "w", how)
    assert len(pairs) == 9
    for which, model in enumerate((loaded.model, models.load_source(str(tiny)).model)):
        for name, seen in pairs.items():
            caught: list[torch.Tensor] = []
            hook = model.get_submodule(name).register_forward_pre_hook(
                lambda _, x, caught=caught: caught.append(x[0])
            )
            with torch.no_grad():
                for ids in cut_batches(IDS):
                    model(ids)
            hook.remove()
            for pair, expected in zip(seen, caught, strict=True):
                torch.testing.assert_close(pair[which], expected)


def test_feedback_lowers_the_distance_of_the_whole_model(tiny: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        wanted = models.load_source(str(tiny)).model(IDS).logits.float()
        distances = []
        for share in (0.0, 1.0):
            step = Step("gptq", {"feedback": share})
            how = dataclasses.replace(FEEDBACK, scheme=SCHEMES["w3a16-g96"], algorithm=(step,))
            loaded, _, _ = run(tiny, tmp_path / str(share), how)
            distances.append(float((loaded.model(IDS).logits.float() - wanted).norm()))
    assert distances[1] < 0.97 * distances[0]


@pytest.mark.parametrize("kept_blocks", [0, 1, 2])
def test_feedback_resumes_to_the_same_bytes(kept_blocks: int, tiny: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    _, _, whole = run(tiny, work, FEEDBACK)
    for path in (work / "blocks").glob("*.json"):
        if int(path.stem) == -1 or int(path.stem) >= kept_blocks:
            path.unlink()
    _, _, resumed = run(tiny, work, FEEDBACK, resume=True)
    assert same(whole, resumed)


def test_resume_of_another_run_is_refused(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "w", recipe("w4a16-g64"))
    with pytest.raises(UsageError, match="begun with another"):
        run(tiny, tmp_path / "w", recipe("w4a16-g32"), resume=True)


def test_resume_on_other_weights_is_refused(tiny: Path, tmp_path: Path) -> None:
    """A fine-tune has its original's shapes, plan and tokens, and other weights."""
    run(tiny, tmp_path / "w", recipe("w4a16-g64"))
    other = tiny_llama()
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1.0
    tuned = save_model(other, tmp_path / "tuned")
    with pytest.raises(UsageError, match="begun with another"):
        run(tuned, tmp_path / "w", recipe("w4a16-g64"), resume=True)


def test_without_resume_old_work_is_not_trusted(tiny: Path, tmp_path: Path) -> None:
    work = tmp_path / "w"
    run(tiny, work, recipe("w4a16-g64"))
    block = work / "blocks" / "0000.safetensors"
    block.write_bytes(b"rubbish")
    _, _, layers = run(tiny, work, recipe("w4a16-g64"))
    assert len(layers) == 14


def test_data_free_recipe_runs_without_data(tiny: Path, tmp_path: Path) -> None:
    _, _, layers = run(tiny, tmp_path / "w", recipe("w8a16", "rtn", keep=()), ids=None)
    assert len(layers) == 15
    assert all(layer.output_error is None for layer in layers.values())


def test_without_data_a_block_is_released_too(tiny_untied: Path, tmp_path: Path) -> None:
    """Otherwise a model that is rounded to nearest would lie dequantized in memory as a whole."""
    how = recipe("w8a8", "rtn", keep=())
    held, _, layers = run(tiny_untied, tmp_path / "a", how, ids=None)
    reports: list[tuple[int, int]] = []
    released, plan, again = run(
        tiny_untied, tmp_path / "b", how, ids=None, release=True,
        progress=lambda done, total, _: reports.append((done, total)),
    )  # fmt: skip
    assert same(layers, again)
    assert reports[-1] == (plan.blocks + 1, plan.blocks + 1)
    for name in plan.in_block(1):
        assert released.model.get_submodule(name).weight.numel() == 0
        assert held.model.get_submodule(name).weight.numel() > 0


def test_calibrating_recipe_needs_data(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no data; give --data FILE"):
        run(tiny, tmp_path / "w", recipe("w4a16-g64"), ids=None)


def test_static_scales_cover_what_was_seen(tiny: Path, tmp_path: Path) -> None:
    loaded, _, layers = run(tiny, tmp_path / "w", recipe("w8a8-static", "rtn"))
    name = "model.layers.0.self_attn.q_proj"
    seen: list[torch.Tensor] = []
    hook = loaded.model.get_submodule(name).register_forward_pre_hook(
        lambda _, x: seen.append(x[0])
    )
    with torch.no_grad():
        loaded.model(IDS)
    hook.remove()
    scale = layers[name].input_scale
    assert scale is not None
    assert float(scale) == pytest.approx(float(torch.cat(seen).abs().max()) / 127.5, rel=0.01)
    # One input, one scale: q, k and v share it.
    for other in ("k_proj", "v_proj"):
        assert torch.equal(layers[name.replace("q_proj", other)].input_scale, scale)


def test_nan_weights_name_the_layer(tiny: Path, tmp_path: Path) -> None:
    loaded = models.load_source(str(tiny))
    loaded.model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    plan = make_plan(recipe("w4a16-g64"), loaded.model, samples=6, seq_len=64)
    with pytest.raises(QuantkitError, match=r"layers\.1\.mlp\.up_proj.*1 NaN"):
        calibrate(loaded, plan, CalibrationData(IDS, "h"), tmp_path / "w")


def test_progress_reaches_its_total(tiny: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    run(
        tiny, tmp_path / "w", recipe("w4a16-g64", keep=()),
        progress=lambda done, total, _: seen.append((done, total)),
    )  # fmt: skip
    assert seen[-1][0] == seen[-1][1]
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
