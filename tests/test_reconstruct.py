"""What holds of every algorithm that trains a block on its output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit import model as models
from quantkit.algorithms import RECONSTRUCTORS
from quantkit.calibrate import Calibrated
from quantkit.errors import UsageError
from quantkit.plan import make_plan
from quantkit.recipe import Recipe, Rule, Step
from quantkit.schemes import SCHEMES, DType
from tests.conftest import tiny_llama
from tests.reconstruct_helpers import run, same_model

#: A few steps of each that change something.
STEPS = {
    "signround": {"steps": 12, "windows": 4},
    "blockdistill": {"steps": 12, "windows": 2, "scale_lr": 0.01, "norm_lr": 0.01},
}


def test_each_is_here() -> None:
    assert STEPS.keys() == RECONSTRUCTORS.keys()


@pytest.fixture(scope="module", params=STEPS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def recipe(name: str) -> Recipe:
    steps = (Step("rtn"), Step(name, STEPS[name]))
    return Recipe(SCHEMES["w3a16-g64"], algorithm=steps, keep=("lm_head",))


@pytest.fixture(scope="module")
def trained(
    recipe: Recipe, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[models.SourceModel, Calibrated]:
    return run(tiny, tmp_path_factory.mktemp("trained") / "work", recipe)


@pytest.mark.parametrize("block", [1, 2])
def test_resumes_to_the_same_bytes(
    block: int,
    name: str,
    recipe: Recipe,
    tiny: Path,
    tmp_path: Path,
    trained: tuple[models.SourceModel, Calibrated],
) -> None:
    """As if killed while a block was being trained, norms of the finished ones included."""

    class Killed(Exception):
        pass

    def progress(done: int, total: int, label: str) -> None:
        if label.startswith(f"block {block}/2: {name}"):
            raise Killed

    seen: list[tuple[int, int]] = []
    with pytest.raises(Killed):
        run(tiny, tmp_path / "w", recipe, progress=progress)
    loaded, resumed = run(
        tiny, tmp_path / "w", recipe, resume=True, progress=lambda *x: seen.append(x[:2])
    )
    for layer_name, layer in trained[1].layers.items():
        for part, tensor in layer.qtensor.tensors().items():
            assert torch.equal(resumed.layers[layer_name].qtensor.tensors()[part], tensor)
        assert resumed.layers[layer_name].reconstruction == layer.reconstruction
    assert same_model(loaded, trained[0])
    done = [d for d, _ in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1]


def test_layers_under_a_rule_are_left_alone(recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    rule = Rule("*.down_proj", SCHEMES["w8a8"], (Step("rtn"),))
    ruled = Recipe(recipe.scheme, algorithm=recipe.algorithm, keep=recipe.keep, rules=(rule,))
    _, calibrated = run(tiny, tmp_path / "a", ruled)
    for layer_name, layer in calibrated.layers.items():
        assert (layer.reconstruction is None) == layer_name.endswith("down_proj")


@pytest.mark.parametrize(
    "scheme", [s.name for s in SCHEMES.values() if s.weight.dtype is not DType.INT]
)
def test_codes_that_are_no_integers_are_refused(name: str, scheme: str) -> None:
    steps = (Step("rtn"), Step(name, STEPS[name]))
    recipe = Recipe(SCHEMES[scheme], algorithm=steps, keep=("lm_head",))
    with pytest.raises(UsageError, match=f"{name} trains integers and their scales"):
        make_plan(recipe, tiny_llama(), samples=4, seq_len=16)
