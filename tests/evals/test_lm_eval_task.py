"""Tasks of lm-eval in a folder: gates and groups of them, what is refused, and their names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import yaml
from lm_eval.api.metrics import mean
from lm_eval_tasks import said_by_lm_eval
from typer.testing import CliRunner

from quantkit.cli import eval as eval_cli
from quantkit.cli.main import app, run
from quantkit.errors import QuantkitError, UsageError
from quantkit.evals.language_model import QuantkitLM
from quantkit.evals.lm_eval_support import first_measure, measure
from quantkit.evals.run_suite import run_suite, run_suites
from quantkit.evals.suites import load_suites
from quantkit.gate import judge, parse_policy
from quantkit.models.runtime import Runtime
from quantkit.results import Outcome, Results


def test_a_gate_pairs_the_items(
    library: Callable[..., Path], runtime: Runtime, other: Runtime
) -> None:
    library({})
    suites = load_suites(["tiny"])
    facts = {"tokenizer": "t", "chat_template": "", "lm_eval": "0", "seed": 0}
    base, candidate = (
        Results({**facts, "model": m.name}, run_suites(m, suites)) for m in (runtime, other)
    )
    policy = parse_policy({"tiny.acc": {"margin": 0.05}}, source="test")
    assert judge(base, base, policy).outcome is not Outcome.FAIL
    flips = sum(
        a.score != b.score
        for a, b in zip(base.tasks["tiny"].rows, candidate.tasks["tiny"].rows, strict=True)
    )
    details = judge(candidate, base, policy).checks[0].details
    assert details["losses"] + details["gains"] == flips


def test_tags_and_plain_groups_are_their_tasks(
    library: Callable[..., Path], runtime: Runtime
) -> None:
    library({"tag": "both"}, {"task": "second", "tag": "both"}, {"group": "all", "task": ["both"]})
    assert [s.name for s in load_suites(["both"])] == ["second", "tiny"]
    assert [s.name for s in load_suites(["all", "tiny"])] == ["second", "tiny"]


def test_a_group_that_weighs_tasks_alike_reports_their_mean(
    library: Callable[..., Path], runtime: Runtime
) -> None:
    """Also where a task is named by itself too, or stands in two groups."""
    few = {"doc_to_text": "{{question}}", "task": "few", "process_docs": None}
    alike = {
        "task": ["tiny", "few"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}],
    }
    folder = library({}, few, {"group": "alike", **alike}, {"group": "beside", **alike})
    rows = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(rows[:3]))
    text = (folder / "1.yaml").read_text().replace("rows.jsonl", "few.jsonl")
    (folder / "1.yaml").write_text(text)
    suites = load_suites(["tiny", "alike", "beside"])
    results = Results({}, run_suites(runtime, suites))
    answer = said_by_lm_eval(runtime, "alike")
    assert {name: task.n for name, task in results.tasks.items()} == {"tiny": 8, "few": 3}
    assert set(results.groups) == {"alike", "beside"}
    for joint in results.summary()["groups"].values():
        assert joint["tasks"] == 2
        assert joint["value"] == pytest.approx(answer["groups"]["alike"]["acc,none"])
    assert Results.from_json(results.to_json()).groups == results.groups
    assert Results({}, run_suites(runtime, load_suites(["tiny"]))).groups == {}


def test_a_group_is_named_by_its_own_file(library: Callable[..., Path]) -> None:
    joined = {"aggregate_metric_list": [{"metric": "acc"}]}
    folder = library({}, {"group": "all", "task": ["tiny"], **joined})
    (suite,) = load_suites(["all"])
    assert suite.path == folder / "1.yaml"


def test_a_task_inside_a_group_is_named_where_it_fails(
    library: Callable[..., Path], runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = library({})
    inside = {**yaml.safe_load((folder / "0.yaml").read_text()), "task": "inner"}
    library({}, {"group": "all", "task": [inside]})
    lm = QuantkitLM(runtime)
    monkeypatch.setattr(lm, "loglikelihood", lambda requests: [])
    (suite,) = load_suites(["all"])
    with pytest.raises(QuantkitError, match=r"suite all::inner \(inline\): lm-eval failed on it"):
        run_suite(lm, suite)


def test_the_settings_of_a_task_are_those_of_one_suite(library: Callable[..., Path]) -> None:
    library({}, {"group": "shown", "task": [{"task": "tiny", "num_fewshot": 1}]})
    with pytest.raises(UsageError, match=r"'tiny' is given twice, with different .*; score one of"):
        load_suites(["tiny", "shown"])


def test_a_group_of_a_filter_that_its_tasks_lack_is_refused(library: Callable[..., Path]) -> None:
    strict = {"metric": "acc", "filter_list": ["strict"]}
    library({}, {"group": "all", "task": ["tiny"], "aggregate_metric_list": [strict]})
    with pytest.raises(UsageError, match=r"tiny: has no filter 'strict'.* it has none; name the"):
        load_suites(["all"])


def test_a_subset_shows_the_prompts_of_the_whole(
    library: Callable[..., Path], runtime: Runtime
) -> None:
    """lm-eval draws examples from one stream, item by item; a subset must not shift it."""
    library({"num_fewshot": 2, "fewshot_split": "test"})
    suites = load_suites(["tiny"])
    whole = {row.id: row for row in run_suites(runtime, suites)["tiny"].rows}
    part = run_suites(runtime, suites, max_items=3)["tiny"].rows
    assert [row.prompt for row in part] == [whole[row.id].prompt for row in part]
    assert {row.id for row in part} != {"0", "1", "2"}
    assert all(row.prompt.count("Question:") == 3 for row in part)


def test_the_score_of_an_item_grows_with_the_better() -> None:
    """Metrics of lm-eval's own functions, as their tasks declare them."""
    task = SimpleNamespace(
        OUTPUT_TYPE="generate_until",
        config=SimpleNamespace(task="own", process_results=lambda doc, results: {}),
        aggregation=lambda: {"corpus": sum, "errors": mean, "exact_match": mean},
        higher_is_better=lambda: {"corpus": True, "errors": False, "exact_match": True},
    )
    assert measure(task, "corpus") is None
    assert first_measure(task) == "errors"
    named = measure(task, "errors")
    assert named is not None
    assert (named[0], named[1](3)) == ("minus_errors", -3.0)
    assert measure(task, "exact_match") == ("exact_match", float)


def test_the_hash_knows_settings_and_documents(library: Callable[..., Path]) -> None:
    def loaded(**changes: Any) -> Any:
        library(changes)
        return load_suites(["tiny"])[0]

    first = loaded()
    assert loaded().hash == first.hash
    other = loaded(doc_to_text="{{question}}")
    assert other.hash != first.hash
    assert other.provenance["config"] != first.provenance["config"]
    folder = library({})
    rows = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(rows.replace("rome", "oslo"))
    edited = load_suites(["tiny"])[0]
    assert edited.hash != first.hash
    assert edited.provenance["config"] == first.provenance["config"]


REFUSED = [
    (
        {"output_type": "loglikelihood_rolling"},
        r"loglikelihood_rolling\); give such text by --text",
    ),
    ({"repeats": 4}, r"asks 4 times an item \(repeats\)"),
    ({"unsafe_code": True}, r"runs the model's code"),
    ({"doc_to_image": "image"}, r"shows images"),
    ({"output_type": "generate_until", "generation_kwargs": {"temperature": 0.7}}, "samples its"),
    ({"metric_list": [{"metric": "accuracy", "hf_evaluate": True}]}, "fetch as code from the hub"),
    ({"metric_list": [{"metric": "rouge"}]}, "'rouge', which lm-eval would fetch as code"),
    ({"metric_list": [{"metric": "f1"}]}, r"none of its metrics \(f1\) is a mean over items"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda v: str(v)[:30])
def test_what_cannot_be_paired_is_refused(
    library: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    library(changes)
    with pytest.raises(UsageError, match=f"lm-eval task tiny: .*{message}"):
        load_suites(["tiny"])


def test_a_dataset_that_cannot_be_had_is_named(
    library: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(path: str, name: str | None = None, **_: Any) -> None:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub (OfflineModeIsEnabled)")

    library({"dataset_path": "someone/things", "dataset_name": "easy", "dataset_kwargs": None})
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert run(["eval", "nowhere", "--suite", "tiny"]) == 4
    said = capsys.readouterr().err
    assert "lm-eval task tiny: its dataset someone/things (easy) cannot be loaded" in said
    assert "OfflineModeIsEnabled" in said
    assert "where the hub can be reached" in said


def test_an_error_inside_lm_eval_is_told(
    library: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    library({"doc_to_target": "nothing_like_it", "doc_to_choice": "{{not_there}}"})
    with pytest.raises(QuantkitError, match=r"lm-eval task tiny: lm-eval .* cannot build it"):
        load_suites(["tiny"])


# --- names -------------------------------------------------------------------------------------


def test_an_installed_suite_has_the_name(library: Callable[..., Path]) -> None:
    library({"task": "support_intent"})
    (ours,) = load_suites(["support_intent"])
    (theirs,) = load_suites(["lm-eval:support_intent"])
    assert ours.origin is None
    assert theirs.origin is not None
    with pytest.raises(UsageError, match=r"is also the name of .*support_intent\.yaml; score one"):
        load_suites(["support_intent", "lm-eval:support_intent"])


def test_an_unknown_name_is_near_another(library: Callable[..., Path]) -> None:
    library({"task": "arc_easy"})
    for near, name in (("arc_esy", "arc_easy"), ("suport_intent", "support_intent")):
        with pytest.raises(UsageError, match=f"no such .*lm-eval; did you mean '{name}'"):
            load_suites([near])
    with pytest.raises(UsageError, match="no such suite, file or folder"):
        load_suites(["not/there.yaml"])


def test_names_are_listed(library: Callable[..., Path]) -> None:
    library({"task": "arc_easy", "tag": "arc"}, {"task": "support_intent"})
    listed = CliRunner().invoke(app, ["eval", "--list", "--json"])
    names = {row["suite"]: row for row in json.loads(listed.stdout)["names"]}
    assert names["support_intent"]["of"] == "quantkit"
    assert names["lm-eval:support_intent"]["kind"] == "task"
    assert names["arc"]["kind"] == "tag"
    listed = CliRunner().invoke(app, ["eval", "--list", "--suite", "arc*"])
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["suite", "arc", "arc_easy"]
    assert run(["eval", "--list", "--suite", "zzz*"]) == 2
    assert run(["eval", "--list", "--text", "a.txt"]) == 2


def test_the_commands_take_a_task(
    library: Callable[..., Path], runtime: Runtime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Validated, planned for, scored and gated like a suite in a file."""
    library({})
    result = CliRunner().invoke(app, ["eval", "--validate", "--suite", "tiny", "--json"])
    (row,) = json.loads(result.stdout)["suites"]
    assert (row["suite"], row["items"], row["metric"]) == ("tiny", 8, "acc")
    assert "tiny.acc" in CliRunner().invoke(app, ["eval", "--plan", "--suite", "tiny"]).stdout
    monkeypatch.setattr(eval_cli, "_load", lambda source, *how: runtime)
    out = str(tmp_path / "results.json")
    assert run(["eval", "a-model", "--suite", "tiny", "-o", out]) == 0
    scored = Results.load(out).tasks["tiny"]
    assert (scored.n, scored.provenance["version"]) == (8, "3.0")
    assert run(["gate", out, "--baseline", out]) == 3  # eight items decide nothing
