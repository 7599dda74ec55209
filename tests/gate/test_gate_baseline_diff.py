"""What two baselines differ in, stale ones, and ``quantkit baseline diff``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from gate_builders import pair_of_results, results, task, text
from typer.testing import CliRunner

from quantkit.cli import baseline as baseline_cli
from quantkit.errors import NotComparableError, UsageError
from quantkit.gate import judge
from quantkit.gate.baseline_diff import diff
from quantkit.results import Results

QUANT, BASE = pair_of_results(245, 14, 20, 141)


def changed(**fingerprint: Any) -> Results:
    return replace(BASE, fingerprint={**BASE.fingerprint, **fingerprint})


def test_equal_results_have_no_changes() -> None:
    made = diff(BASE, BASE)
    assert made.changes == ()
    assert made.flips == {"intent": (0, 0)}


def test_scores_may_differ() -> None:
    made = diff(BASE, QUANT)
    assert [(c.key, c.breaks) for c in made.changes] == [("tasks.intent.value", False)]
    assert made.flips == {"intent": (14, 20)}


@pytest.mark.parametrize(
    ("after", "key"),
    [
        (changed(tokenizer="other"), "fingerprint.tokenizer"),
        (changed(chat_template="other"), "fingerprint.chat_template"),
        (changed(lm_eval="0.5"), "fingerprint.lm_eval"),
        (changed(seed=1), "fingerprint.seed"),
        (changed(judge="gpt"), "fingerprint.judge"),
        (
            replace(BASE, tasks={"intent": replace(BASE.tasks["intent"], hash="new")}),
            "tasks.intent.hash",
        ),
        (
            replace(
                BASE,
                tasks={"intent": replace(BASE.tasks["intent"], rows=BASE.tasks["intent"].rows[1:])},
            ),
            "tasks.intent.items",
        ),
    ],
)
def test_another_experiment_breaks(after: Results, key: str) -> None:
    made = diff(BASE, after)
    assert key in [c.key for c in made.breaking]
    assert made.changes[0].breaks
    assert not key.startswith("tasks") or made.flips == {}
    json.dumps(made.to_json(), allow_nan=False)


def test_text_on_one_side_leaves_the_tasks_comparable() -> None:
    one, two = (replace(BASE, text=text([3.0], hash=name)) for name in ("one", "two"))
    made = diff(BASE, one)
    assert {c.key for c in made.changes} >= {"text.hash", "text.windows"}
    assert not made.breaking
    assert [c.key for c in diff(one, two).breaking] == ["text.hash"]


def test_other_kernels_do_not_break() -> None:
    made = diff(changed(kernels="a", host={"cpu": "x"}), changed(kernels="b", host={"cpu": "y"}))
    assert [c.key for c in made.changes] == ["fingerprint.host.cpu", "fingerprint.kernels"]
    assert not made.breaking


# -- stale -----------------------------------------------------------------------------------


def of(counts_side: Results, **fingerprint: Any) -> Results:
    return replace(counts_side, fingerprint={**counts_side.fingerprint, **fingerprint})


def test_a_baseline_of_other_weights_is_stale() -> None:
    candidate = of(QUANT, model="quantized", original="a" * 64)
    judge(candidate, of(BASE, model="a" * 64))
    judge(candidate, of(BASE, model="another quantization", original="a" * 64))
    for stale in (of(BASE, model="b" * 64), of(BASE, model="a" * 64, original="b" * 64), BASE):
        with pytest.raises(NotComparableError, match="the baseline is stale: the candidate was"):
            judge(candidate, stale)


# -- the command -----------------------------------------------------------------------------

app = typer.Typer()
app.add_typer(baseline_cli.app, name="baseline")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    BASE.save("bf16.json")
    QUANT.save("int4.json")
    changed(tokenizer="another tokenizer").save("other.json")
    run("record", "bf16.json", "--name", "main")
    run("accept", "main")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["baseline", *arguments])


def test_diff_against_what_is_pending() -> None:
    assert isinstance(run("diff", "main").exception, UsageError)
    run("record", "int4.json", "--name", "main")
    result = run("diff", "main")
    assert result.exit_code == 0
    assert "tasks.intent.value: 0.6310 → 0.6167" in result.stdout
    assert "intent: 20 lost, 14 gained" in result.stdout
    # Comparing accepts nothing.
    states = [b["state"] for b in json.loads(run("show", "--json").stdout)]
    assert states == ["accepted", "pending"]


def test_diff_says_which_hash_breaks() -> None:
    result = run("diff", "main", "other.json")
    assert result.exit_code == 5
    assert "fingerprint.tokenizer: tok → another tokenizer  not comparable" in result.stdout
    doc = json.loads(run("diff", "main", "other.json", "--json").stdout)
    assert doc["comparable"] is False
    assert doc["changes"][0]["key"] == "fingerprint.tokenizer"


def test_diff_of_two_names() -> None:
    run("record", "bf16.json", "--name", "again")
    assert isinstance(run("diff", "main", "again").exception, UsageError)
    run("accept", "again")
    result = run("diff", "main", "again")
    assert result.exit_code == 0
    assert "nothing differs" in result.stdout


def test_diff_of_what_is_absent() -> None:
    assert isinstance(run("diff", "absent").exception, UsageError)
    assert isinstance(run("diff", "main", "absent.json").exception, UsageError)


def test_early_runs_are_other_experiments() -> None:
    early = results({"intent": replace(task([1.0]), early=0)})
    assert "tasks.intent.early" in [c.key for c in diff(BASE, early).breaking]
