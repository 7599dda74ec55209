"""What calibration refuses before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantkit import model as models
from quantkit.batches import Batch, cut_batches
from quantkit.calibrate import calibrate
from quantkit.cli.main import run
from quantkit.errors import UsageError
from quantkit.job import Job, prepare
from quantkit.limits import check_limits
from quantkit.model.experts import linearize
from quantkit.parallel import Processes, World
from quantkit.plan import Plan, make_plan
from quantkit.recipe import Recipe, Step, load_recipe
from quantkit.schemes import SCHEMES
from tests.architectures import build

BATCHES = cut_batches(torch.zeros(4, 8, dtype=torch.int64), 2)

W4 = Recipe(SCHEMES["w4a16-g32"], algorithm=(Step("rtn"),), keep=("lm_head",))
TRAINED = replace(W4, algorithm=(Step("rtn"), Step("signround")))


class OneOfTwo(World):
    """A process whose peer never answers."""

    size = 2
    share = Processes.share

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank

    def gather(self, value: object) -> list[object]:  # type: ignore[override]
        raise AssertionError("the other process was asked")

    first = gather  # type: ignore[assignment]


def plan_of(model: object, recipe: Recipe) -> Plan:
    return make_plan(recipe, model, samples=4096, seq_len=512)  # type: ignore[arg-type]


def test_routed_experts_want_one_process() -> None:
    model = build("qwen3_moe")
    linearize(model)
    plan = plan_of(model, W4)
    with pytest.raises(UsageError, match="a router sends an expert other tokens in each of 2"):
        check_limits(plan, model, BATCHES, together=OneOfTwo())
    check_limits(plan, model, BATCHES)
    check_limits(plan, model, BATCHES, all_experts=True, together=OneOfTwo())
    kept = plan_of(model, replace(W4, keep=("lm_head", "*.experts.*")))
    check_limits(kept, model, BATCHES, together=OneOfTwo())


def test_hidden_states_go_to_disk_on_a_cpu_and_from_one_list_of_blocks() -> None:
    model = build("phi")
    plan = plan_of(model, W4)
    check_limits(plan, model, BATCHES, activation_memory=plan.spilled_bytes)
    with pytest.raises(UsageError, match="hidden states are on meta"):
        check_limits(plan, model.to("meta"), BATCHES, activation_memory=plan.spilled_bytes)
    check_limits(plan, model, BATCHES, activation_memory=plan.activation_bytes)
    model = build("t5")
    model.config.architectures = [type(model).__name__]  # as a saved one's says
    plan = plan_of(model, W4)
    with pytest.raises(UsageError, match="begins with what its encoder made of all batches"):
        check_limits(plan, model, BATCHES, activation_memory=plan.spilled_bytes)


def test_signround_trains_on_tokens_alone() -> None:
    model = build("phi")
    spoken: list[Batch] = [{"input_features": torch.zeros(1, 80, 100)}]
    with pytest.raises(UsageError, match="signround trains on windows of tokens"):
        check_limits(plan_of(model, TRAINED), model, spoken)


def test_batches_for_all_processes() -> None:
    model = build("phi")
    plan = plan_of(model, W4)
    with pytest.raises(UsageError, match="nothing to share out among 2 processes; start one"):
        check_limits(plan, model, [], together=OneOfTwo())
    with pytest.raises(UsageError, match="1 batches of calibration data for 2 processes"):
        check_limits(plan, model, BATCHES[:1], together=OneOfTwo())
    check_limits(plan, model, [])


def test_a_refused_calibration_leaves_finished_blocks(tiny: Path, tmp_path: Path) -> None:
    loaded = models.load_source(str(tiny))
    finished = tmp_path / "blocks" / "0000.json"
    finished.parent.mkdir()
    finished.write_text("{}")
    with pytest.raises(UsageError, match="nothing to share out"):
        calibrate(loaded, plan_of(loaded.model, W4), None, tmp_path, together=OneOfTwo())
    assert finished.exists()


def test_a_job_is_refused_before_any_work(tiny: Path, traffic: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = "scheme: w4a16-g64\nalgorithm: [rtn, signround]\nkeep: [lm_head]\n"
    recipe.write_text(f"{text}calibrate: {{data: [{{path: {traffic}}}], samples: 4, seq_len: 64}}")
    job = Job(str(tiny), load_recipe(str(recipe)), tmp_path / "out", gated=False)
    with pytest.raises(UsageError, match="signround: goes through all windows"):
        prepare(job, OneOfTwo())


def test_only_the_first_process_needs_a_place_for_the_checkpoint(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    asked = load_recipe(str(recipe))
    job = Job(str(tiny), asked, tmp_path / "out", gated=False)
    with pytest.raises(UsageError, match="exists and is not a quantkit checkpoint"):
        prepare(job, OneOfTwo())
    with pytest.raises(UsageError, match="this recipe calibrates, and there is no data"):
        prepare(job, OneOfTwo(rank=1))


@pytest.mark.parametrize("given", ["0", "-1", "inf", "nan", "1e300"])
def test_activation_memory_is_a_number_above_zero(
    given: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["calibrate", str(tiny), "--dry-run", f"--activation-memory={given}"]) == 2
    assert "not a number of GB above 0; leave it out" in capsys.readouterr().err


def test_distillation_wants_a_window_to_train_on() -> None:
    """One is held back, and there must be another."""
    model = build("phi")
    plan = plan_of(model, replace(W4, algorithm=(Step("rtn"), Step("distill"))))
    [*_, one] = cut_batches(torch.zeros(1, 8, dtype=torch.int64), 2)
    with pytest.raises(UsageError, match=r"distill holds windows back .* there is one in all"):
        check_limits(plan, model, [one])
    check_limits(plan, model, BATCHES)
