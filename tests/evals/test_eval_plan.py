"""``quantkit eval``: planning, the noise floor, and stopping early."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from eval_builders import CHOICE, GENERATE, choice_rows
from typer.testing import CliRunner, Result

from quantkit.cli import eval as eval_cli
from quantkit.errors import NotComparableError, UsageError
from quantkit.evals import early
from quantkit.gate import fewest_items, judge, parse_policy
from quantkit.models.runtime import Runtime
from quantkit.results import Results

Write = Callable[..., Path]


@pytest.fixture
def invoke(
    runtime: Runtime, other: Runtime, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Run the command with ``base`` and ``quant`` as models, whatever the kernels."""
    models = {"base": runtime, "quant": other}
    monkeypatch.setattr(eval_cli, "_load", lambda source, *how: models[source])
    app = typer.Typer()
    app.command()(eval_cli.command)

    def run(*args: Any) -> Result:
        return CliRunner().invoke(app, [str(a) for a in args])

    return run


def single_rows(n: int) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "cluster"} for r in choice_rows(n)]


def test_a_plan_needs_no_model(
    invoke: Callable[..., Result], suite_path: Write, tmp_path: Path
) -> None:
    suite = suite_path(CHOICE, single_rows(100))
    policy = tmp_path / "gate.yaml"
    policy.write_text("tiny_choice.acc: {margin: 0.02}\nkl.mean: {max: 0.1}\n")
    args = ("--plan", "--suite", suite, "--policy", policy, "--flip-rate", 0.05)
    result = invoke(*args)
    assert result.exit_code == 0, result.exception
    assert f"even zero flips need {fewest_items(0.02)} items" in result.stdout
    (row,) = json.loads(invoke(*args, "--json").stdout)["plan"]
    assert (row["n"], row["fewest"], row["enough"]) == (100, 133, False)
    assert 0 < row["power"] < 0.3  # only a model that gains more than it loses
    assert row["needed"] > 700
    assert json.loads(invoke(*args, "--json").stdout)["seconds"] == {}


def test_a_plan_says_what_clusters_cost(invoke: Callable[..., Result], suite_path: Write) -> None:
    suite = suite_path(CHOICE, choice_rows(12))
    result = invoke("--plan", "--suite", suite)
    assert "12 items share 6 clusters" in result.stdout
    rows = json.loads(invoke("--plan", "--suite", suite, "--json").stdout)["plan"]
    assert [r["flips"] for r in rows] == [0.01, 0.02, 0.05, 0.1, 0.2]
    assert [r["detectable"] for r in rows] == [False, False, True, True, True]


def test_a_plan_times_the_model(invoke: Callable[..., Result], suite_path: Write) -> None:
    suite = suite_path(CHOICE, single_rows(12))
    result = invoke("base", "--plan", "--suite", suite, "--json")
    (seconds,) = json.loads(result.stdout)["seconds"].values()
    assert 0 < seconds < 600


def test_a_timed_plan_is_given_what_a_run_would_be(
    invoke: Callable[..., Result], suite_path: Write
) -> None:
    """Threads, and leave to run code; and it says how many items it timed."""
    score = {"metadata": {"score": {"code": {"timeout": 20}}}}
    suite = suite_path(GENERATE, [{"word": w, "id": w} for w in ("late", "rome", "order")], **score)
    before = torch.get_num_threads()
    try:
        args = ("base", "--plan", "--suite", suite, "--threads", before + 1)
        refused = invoke(*args)
        assert isinstance(refused.exception, UsageError)
        assert "--allow-code" in str(refused.exception)
        result = invoke(*args, "--allow-code")
        assert result.exit_code == 0, result.exception
        assert "s a model, from 3 items" in result.stdout
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_recipes_name_gates_and_suites(invoke: Callable[..., Result]) -> None:
    result = invoke("--plan", "-r", "w4a16-awq", "--json")
    assert result.exit_code == 0, result.exception
    rows = json.loads(result.stdout)["plan"]
    assert {r["gate"] for r in rows} == {"support_intent.acc"}
    assert {r["margin"] for r in rows} == {0.05}


def test_plans_that_name_nothing(
    invoke: Callable[..., Result], suite_path: Write, tmp_path: Path
) -> None:
    policy = tmp_path / "gate.yaml"
    policy.write_text("absent.acc: {margin: 0.05}\n")
    suite = suite_path(CHOICE, single_rows(12))
    for args, message in (
        (("--plan",), "nothing to plan"),
        (("--plan", "--suite", suite, "--policy", policy), "no suite of that name"),
        (("--plan", "--policy", policy, "-r", "w4a16-awq"), "both name gates"),
        (("base", "--suite", suite, "--policy", policy), "serve --plan and --stop-early"),
    ):
        result = invoke(*args)
        assert isinstance(result.exception, UsageError)
        assert message in str(result.exception)


# -- noise -----------------------------------------------------------------------------------


def test_the_noise_floor_is_kept_with_the_results(
    invoke: Callable[..., Result], suite_path: Write, tmp_path: Path
) -> None:
    suite, out, text = suite_path(CHOICE, choice_rows()), tmp_path / "a.json", tmp_path / "t.txt"
    text.write_text("The order is late and the invoice never came. " * 20)
    args = ("base", "--suite", suite, "--text", text, "--seq-len", 32, "--noise-floor", "modules")
    result = invoke(*args, "-o", out)
    assert result.exit_code == 0, result.exception
    assert "tiny_choice flips" in result.stdout
    noise = Results.load(out).noise
    assert noise is not None
    assert noise.tasks["tiny_choice"].n == 12
    # The same runtime in other batches: fp32 rounding may not flip a thing here.
    assert noise.tasks["tiny_choice"].differences == {}
    assert noise.kl_mean == pytest.approx(0, abs=1e-6)
    verdict = judge(Results.load(out), Results.load(out))
    assert verdict.checks[0].details["noise"]["flips"] == 0


# -- early -----------------------------------------------------------------------------------


def test_stopping_early(
    invoke: Callable[..., Result],
    suite_path: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(early, "STEP", 8)
    suite = suite_path(CHOICE, single_rows(60))
    base, quant = tmp_path / "base.json", tmp_path / "quant.json"
    assert invoke("base", "--suite", suite, "-o", base).exit_code == 0
    # A baseline that is always right makes any other model a clear regression.
    scored = Results.load(base)
    task = scored.tasks["tiny_choice"]
    perfect = replace(task, rows=tuple(replace(r, score=1.0) for r in task.rows))
    replace(scored, tasks={"tiny_choice": perfect}).save(base)

    result = invoke("quant", "--suite", suite, "--stop-early", base, "-o", quant)
    assert result.exit_code == 0, result.exception
    early_task = Results.load(quant).tasks["tiny_choice"]
    assert early_task.early == 0
    assert early_task.n < 60
    assert early_task.n % 8 == 0
    policy = parse_policy({"tiny_choice.acc": {"margin": 0.05}})
    check = judge(Results.load(quant), Results.load(base), policy).checks[0]
    assert check.outcome == "FAIL"
    assert check.details["n"] == early_task.n
    # The rows are those of a full run.
    full = tmp_path / "full.json"
    assert invoke("quant", "--suite", suite, "-o", full).exit_code == 0
    rows = {r.id: r.score for r in Results.load(full).tasks["tiny_choice"].rows}
    assert all(rows[r.id] == r.score for r in early_task.rows)


def test_a_task_may_have_a_gate_for_each_metric(
    invoke: Callable[..., Result], suite_path: Write, tmp_path: Path
) -> None:
    suite, base, out = suite_path(CHOICE, single_rows(12)), tmp_path / "b.json", tmp_path / "q.json"
    assert invoke("base", "--suite", suite, "-o", base).exit_code == 0
    policy = tmp_path / "gate.yaml"
    policy.write_text("tiny_choice.acc: {margin: 0.05}\ntiny_choice.acc_norm: {margin: 0.1}\n")
    args = ("--suite", suite, "--stop-early", base, "--policy", policy, "-o", out)
    result = invoke("quant", *args)
    assert result.exit_code == 0, result.exception
    assert Results.load(out).tasks["tiny_choice"].early == 0


def test_early_stops_that_cannot_be(
    invoke: Callable[..., Result], suite_path: Write, tmp_path: Path
) -> None:
    suite, base = suite_path(CHOICE, single_rows(12)), tmp_path / "base.json"
    assert invoke("base", "--suite", suite, "-o", base).exit_code == 0
    changed = suite_path(CHOICE, single_rows(13))
    policy = tmp_path / "gate.yaml"
    policy.write_text("tiny_choice.acc: {margin: 0.05, floor: 0.4}\n")
    stopped = tmp_path / "stopped.json"
    scored = Results.load(base)
    tasks = {name: replace(task, early=0) for name, task in scored.tasks.items()}
    replace(scored, tasks=tasks).save(stopped)
    kl = tmp_path / "kl.yaml"
    kl.write_text("kl.mean: {max: 0.4}\n")
    for args, error, message in (
        (("--suite", suite, "--max-items", 5), UsageError, "drop --max-items"),
        (("--suite", changed), NotComparableError, "has other files"),
        (("--suite", suite, "--policy", policy), UsageError, "floor"),
        (("--suite", suite, "--policy", kl), UsageError, "no suite to stop"),
        (("--suite", suite, "--noise-floor", "modules"), UsageError, "drop one"),
        (("--suite", suite, "--seed", 1), NotComparableError, "seed 0 is not 1"),
        (("--suite", suite, "--stop-early", stopped), NotComparableError, "items are a choice"),
    ):
        result = invoke("quant", "--stop-early", base, *args)
        assert isinstance(result.exception, error), result.exception
        assert message in str(result.exception)
