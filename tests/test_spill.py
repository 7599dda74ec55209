"""Hidden states on disk between blocks: the same bytes, in less memory."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit.batches
import quantkit.footprint
from quantkit import memory
from quantkit import model as models
from quantkit.calibrate import CalibrationData, calibrate
from quantkit.cli.main import run as command_line
from quantkit.collector import Collector
from quantkit.errors import QuantkitError, UsageError
from quantkit.footprint import spills
from quantkit.input_range import InputRange
from quantkit.kv_cache import _SideCollector
from quantkit.parallel import World
from quantkit.paused import Spine
from quantkit.plan import Plan, make_plan
from quantkit.quantize import QuantizedLayer
from quantkit.recipe import KV_CACHES, Recipe, Step
from quantkit.schemes import SCHEMES
from quantkit.spill import HiddenFiles
from tests.run_helpers import RECIPE, arguments, contents

IDS = torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(2))

RECIPES = {
    "feedback": Recipe(
        SCHEMES["w4a16-g64"],
        algorithm=(Step("awq", {"grid": 2}), Step("gptq", {"feedback": 0.5, "refine": 0})),
        keep=(),
    ),
    "signround": Recipe(
        SCHEMES["w4a16-g64"],
        algorithm=(Step("rtn"), Step("signround", {"steps": 2, "windows": 4})),
        keep=("lm_head",),
    ),
    "blockdistill": Recipe(
        SCHEMES["w4a16-g64"],
        algorithm=(Step("rtn"), Step("blockdistill", {"steps": 2, "windows": 4})),
        keep=("lm_head",),
    ),
    "static": Recipe(
        SCHEMES["w8a8-static"], algorithm=(Step("rtn"),), keep=(), kv_cache=KV_CACHES["fp8"]
    ),
}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of them in little text."""
    for module in (quantkit.batches, quantkit.footprint):
        monkeypatch.setattr(module, "BATCH_TOKENS", 64)


def run(
    source: Path, work: Path, how: Recipe, **options: object
) -> tuple[Plan, dict[str, QuantizedLayer]]:
    loaded = models.load_source(str(source))
    plan = make_plan(how, loaded.model, samples=len(IDS), seq_len=IDS.shape[1])
    done = calibrate(loaded, plan, CalibrationData(IDS, "hash"), work, **options)  # type: ignore[arg-type]
    return plan, done.layers


@pytest.mark.parametrize("name", RECIPES)
def test_the_result_is_the_same_to_the_bit(
    name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = run(tiny, tmp_path / "a", RECIPES[name])[1]
    mapped: list[bool] = []
    calls = Spine.calls

    def look(self: Spine, block: int, hidden: list[torch.Tensor]) -> object:
        mapped.extend(memory.is_mapped(x) for x in hidden)
        return calls(self, block, hidden)

    monkeypatch.setattr(Spine, "calls", look)
    plan, spilled = run(
        tiny, tmp_path / "b", RECIPES[name], activation_memory=_between(tiny, RECIPES[name])
    )
    # A training step's minibatch is put together in memory.
    assert sum(mapped) >= 2 * plan.blocks
    assert all(mapped) or name in ("signround", "blockdistill")
    for layer, found in held.items():
        assert found.output_error == spilled[layer].output_error
        for part, tensor in found.qtensor.tensors().items():
            assert torch.equal(spilled[layer].qtensor.tensors()[part], tensor)


def _between(source: Path, how: Recipe) -> int:
    """A limit that holding all windows breaks and spilling them keeps."""
    model = models.load_source(str(source)).model
    plan = make_plan(how, model, samples=len(IDS), seq_len=IDS.shape[1])
    assert plan.spilled_bytes < plan.activation_bytes
    return plan.spilled_bytes


@pytest.mark.parametrize(
    "how",
    [
        Recipe(SCHEMES["w4a16-g64"], algorithm=(Step("rtn"),), kv_cache=KV_CACHES["fp8"]),
        Recipe(SCHEMES["w8a8-static"], algorithm=(Step("gptq", {"feedback": 1.0, "refine": 0}),)),
    ],
    ids=["cache", "static, feedback"],
)
def test_what_is_held_for_a_static_scale_is_counted(
    how: Recipe, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors themselves, over every token, are no more than the plan says."""
    held = [0]

    def weigh(kept: list[Any]) -> None:
        tensors = [x for each in kept for x in (each if isinstance(each, tuple) else [each])]
        held.append(sum(x.nbytes for x in tensors if x is not None))

    def range_of_side(self: _SideCollector, together: World) -> InputRange:
        weigh(self.held)
        return side(self, together)

    def solve(self: Collector, linears: Any) -> dict[str, QuantizedLayer]:
        weigh(self.held)
        return group(self, linears)

    side, group = _SideCollector.range, Collector.solve
    monkeypatch.setattr(_SideCollector, "range", range_of_side)
    monkeypatch.setattr(Collector, "solve", solve)
    ids = IDS.repeat(2, 1)
    loaded = models.load_source(str(tiny))
    plan = make_plan(how, loaded.model, samples=len(ids), seq_len=ids.shape[1])
    limit = plan.spilled_bytes
    assert limit < plan.activation_bytes
    calibrate(loaded, plan, CalibrationData(ids, "hash"), tmp_path, activation_memory=limit)
    one_batch = make_plan(how, loaded.model, samples=2, seq_len=ids.shape[1]).activation_bytes
    assert one_batch < max(held)
    assert max(held) + one_batch <= limit


def test_a_limit_says_where_they_lie(tiny: Path) -> None:
    model = models.load_source(str(tiny)).model
    plan = make_plan(RECIPES["feedback"], model, samples=4096, seq_len=512)
    assert plan.spilled_bytes < plan.activation_bytes / 1000
    assert not spills(plan, None)
    assert not spills(plan, plan.activation_bytes)
    assert spills(plan, plan.activation_bytes - 1)
    assert spills(plan, plan.spilled_bytes)
    with pytest.raises(UsageError, match="one batch of hidden states takes"):
        spills(plan, plan.spilled_bytes - 1)
    short = make_plan(RECIPES["feedback"], model, samples=2, seq_len=32)
    assert short.spilled_bytes == short.activation_bytes


def test_a_kept_tensor_is_mapped_and_its_forerunner_stays_whole(tmp_path: Path) -> None:
    files = HiddenFiles(tmp_path / "hidden")
    first, second = torch.randn(2, 3, 16).bfloat16().unbind()
    kept = files.keep("x", first)
    again = files.keep("x", second)
    assert torch.equal(kept, first)
    assert torch.equal(again, second)
    assert [p.name for p in (tmp_path / "hidden").iterdir()] == ["x.safetensors"]


def test_a_full_disk_is_no_fault_of_the_arguments(tmp_path: Path) -> None:
    files = HiddenFiles(tmp_path / "hidden")
    kept = files.keep("x", torch.ones(2))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(
            QuantkitError, match=r"cannot be written or mapped .*; free disk space"
        ) as caught:
            files.keep("x", torch.zeros(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.exit_code == 4
    assert torch.equal(kept, torch.ones(2))
    assert [p.name for p in (tmp_path / "hidden").iterdir()] == ["x.safetensors"]


def test_a_file_that_cannot_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    monkeypatch.setattr("quantkit.spill.load_file", refuse)
    files = HiddenFiles(tmp_path / "hidden")
    with pytest.raises(QuantkitError, match=r"cannot be written or mapped \(Too many open files\)"):
        files.keep("x", torch.ones(2))


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, 4), (errno.EDQUOT, 4), (errno.EROFS, 2)]
)
def test_a_folder_that_cannot_be_made(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, **_: object) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(QuantkitError, match="hidden: cannot be created") as caught:
        HiddenFiles(tmp_path / "hidden")
    assert caught.value.exit_code == code


def test_the_command_line_states_both_and_keeps_the_bytes(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = arguments(tiny, recipe, traffic, tmp_path / "a")
    assert command_line([*first, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert 0 < plan["spilled_bytes"] < plan["activation_bytes"]
    limit = str((plan["spilled_bytes"] + 1) / 1e9)
    assert command_line([*first, "--dry-run", "--activation-memory", limit]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert f"{plan['activation_bytes'] / 1e6:.0f} MB of activations" in told
    assert f"({plan['spilled_bytes'] / 1e6:.0f} MB with hidden states on disk)" in told
    assert "hidden states go to disk" in told
    assert command_line(first) == 0
    spilled = arguments(tiny, recipe, traffic, tmp_path / "b", "--activation-memory", limit)
    assert command_line(spilled) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert command_line([*first, "--activation-memory", "0.0000001"]) == 2
    recipe.write_text(RECIPE.replace("gptq", "{gptq: {fisher: 0.5}}"))
    capsys.readouterr()
    assert command_line([*spilled, "--dry-run"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "MB a block hidden states go to disk, passes are repeated Fisher pass" in told
