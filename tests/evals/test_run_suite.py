"""Suites end to end against plain lm-eval on the same files."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from eval_builders import CHOICE, GENERATE, choice_rows, tiny_runtime
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from quantkit.errors import QuantkitError
from quantkit.evals.canary import SENTENCES, check_canaries
from quantkit.evals.evaluate import evaluate
from quantkit.evals.language_model import QuantkitLM
from quantkit.evals.run_suite import draw, run_suite, run_suites
from quantkit.evals.suites import load_suite
from quantkit.models.runtime import Runtime
from quantkit.results import Results, TaskResult

Write = Callable[..., Path]

WORDS = [{"word": w, "id": f"w{i}"} for i, w in enumerate(("refund", "order", "late", "rome"))]

LOGLIKELIHOOD = {
    **{k: v for k, v in GENERATE.items() if k != "generation_kwargs"},
    "task": "tiny_loglikelihood",
    "output_type": "loglikelihood",
    "doc_to_target": " {{word}}",
    "metric_list": [{"metric": "perplexity"}],
}
ROLLING = {
    **LOGLIKELIHOOD,
    "task": "tiny_rolling",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{word}} and more words",
    "metric_list": [{"metric": "byte_perplexity"}],
}


def run(runtime: Runtime, path: Path, **kw: Any) -> TaskResult:
    suite = load_suite(path)
    return run_suites(runtime, [suite], **kw)[suite.name]


def plain_lm_eval(
    runtime: Runtime, path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What lm-eval itself says of the same file with ``--model hf``."""
    import datasets

    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    manager = TaskManager(include_path=str(path.parent), include_defaults=False)
    name = load_suite(path).name
    lm = HFLM(pretrained=runtime.model, tokenizer=runtime.tokenizer, batch_size=2)
    loaded = manager.load([name])
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    answer = lm_eval.evaluate(lm=lm, task_dict=loaded, bootstrap_iters=0, log_samples=True)
    return answer["results"][name], answer["samples"][name]


@pytest.mark.parametrize("metric", ["acc", "acc_norm", "acc_bytes", "acc_mutual_info"])
def test_multiple_choice_is_that_of_lm_eval(
    runtime: Runtime,
    suite_path: Write,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    metric: str,
) -> None:
    path = suite_path(CHOICE, choice_rows(), metric_list=[{"metric": metric}])
    ours = run(runtime, path)
    totals, samples = plain_lm_eval(runtime, path, monkeypatch, tmp_path)
    assert ours.metric == metric
    assert ours.value == pytest.approx(totals[f"{metric},none"])
    for row, sample in zip(ours.rows, samples, strict=True):
        assert row.hash == sample["doc_hash"]
        assert row.score == sample[metric]
        values = [v for v, _ in sample["filtered_resps"]][: len(row.details["loglikelihoods"])]
        assert row.details["loglikelihoods"] == pytest.approx(values, abs=1e-4)
        assert (row.prediction == row.target) == bool(row.score)


def test_a_second_metric_of_mutual_information_adds_no_choices(
    runtime: Runtime, suite_path: Write
) -> None:
    """It asks for each choice once more, without the context."""
    metrics = [{"metric": "acc"}, {"metric": "acc_mutual_info"}]
    for row in run(runtime, suite_path(CHOICE, choice_rows(), metric_list=metrics)).rows:
        assert len(row.details["loglikelihoods"]) in (3, 4)
        assert (row.prediction == row.target) == bool(row.score)


def test_an_empty_list_of_metrics_is_none(runtime: Runtime, suite_path: Write) -> None:
    """lm-eval would take it as it is, and compute nothing."""
    assert run(runtime, suite_path(CHOICE, choice_rows(2), metric_list=[])).metric == "acc"


def test_few_shot_contexts_are_those_of_lm_eval(
    runtime: Runtime, suite_path: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {"data_files": {"test": "rows.jsonl", "dev": "dev.jsonl"}}
    path = suite_path(
        CHOICE, choice_rows(4), dataset_kwargs=files, num_fewshot=1, fewshot_split="dev"
    )
    (path.parent / "dev.jsonl").write_text((path.parent / "rows.jsonl").read_text())
    ours = run(runtime, path)
    _, samples = plain_lm_eval(runtime, path, monkeypatch, tmp_path)
    assert [r.prompt for r in ours.rows] == [s["arguments"][0][0] for s in samples]


def test_generation_is_that_of_lm_eval(
    runtime: Runtime, suite_path: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = suite_path(GENERATE, WORDS)
    ours = run(runtime, path)
    totals, samples = plain_lm_eval(runtime, path, monkeypatch, tmp_path)
    assert ours.value == totals["exact_match,none"]
    assert [r.prediction for r in ours.rows] == [s["filtered_resps"][0] for s in samples]
    assert [r.target for r in ours.rows] == [w["word"] for w in WORDS]


def test_filters_are_those_of_lm_eval(
    runtime: Runtime, suite_path: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps = [{"function": "remove_whitespace"}, {"function": "take_first"}]
    path = suite_path(GENERATE, WORDS, filter_list=[{"name": "stripped", "filter": steps}])
    ours = run(runtime, path)
    totals, samples = plain_lm_eval(runtime, path, monkeypatch, tmp_path)
    assert ours.value == totals["exact_match,stripped"]
    assert [r.prediction for r in ours.rows] == [s["filtered_resps"][0] for s in samples]


def test_loglikelihood_is_scored_larger_is_better(
    runtime: Runtime, suite_path: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = suite_path(LOGLIKELIHOOD, WORDS)
    ours = run(runtime, path)
    _, samples = plain_lm_eval(runtime, path, monkeypatch, tmp_path)
    assert ours.metric == "loglikelihood"
    assert [r.score for r in ours.rows] == pytest.approx([s["perplexity"] for s in samples])


def test_rolling_is_scored_a_byte(
    runtime: Runtime, suite_path: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = suite_path(ROLLING, WORDS)
    ours = run(runtime, path)
    _, samples = plain_lm_eval(runtime, path, monkeypatch, tmp_path)
    assert ours.metric == "loglikelihood_per_byte"
    for row, sample in zip(ours.rows, samples, strict=True):
        value, units = sample["byte_perplexity"]
        assert row.score == pytest.approx(value / units, rel=1e-5)


def test_rows_carry_what_a_gate_needs(runtime: Runtime, suite_path: Write, tmp_path: Path) -> None:
    result = run(runtime, suite_path(CHOICE, choice_rows()))
    row = result.rows[3]
    assert (row.id, row.slice, row.cluster, row.must_not_flip) == ("c-03", "odd", "p1", True)
    assert row.prompt.startswith("Message: where is")
    assert row.prompt.endswith("It is about")
    assert row.target == choice_rows()[3]["choices"][0]
    assert sum(r.must_not_flip for r in result.rows) == 1
    Results(fingerprint={}, tasks={"t": result}).save(tmp_path / "r.json")
    assert Results.load(tmp_path / "r.json").tasks["t"] == result


def test_a_subset_is_seeded_and_joins_the_whole(runtime: Runtime, suite_path: Write) -> None:
    path = suite_path(CHOICE, choice_rows())
    whole = {r.id: r for r in run(runtime, path).rows}
    part = run(runtime, path, max_items=5, seed=3)
    assert part.n == 5
    assert [r.id for r in part.rows] == sorted(r.id for r in part.rows)
    for row in part.rows:
        assert (row.hash, row.prompt, row.target) == (
            whole[row.id].hash,
            whole[row.id].prompt,
            whole[row.id].target,
        )
    assert part == run(runtime, path, max_items=5, seed=3)
    assert {r.id for r in part.rows} != {r.id for r in run(runtime, path, max_items=5).rows}


def test_a_draw_is_sorted() -> None:
    assert draw(10, None, 0) is None
    assert draw(10, 10, 0) is None
    drawn = draw(100, 10, 0)
    assert drawn is not None
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 10


def test_nothing_touches_the_network(
    runtime: Runtime, suite_path: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert run(runtime, suite_path(CHOICE, choice_rows())).n == 12


def test_nothing_is_printed(
    runtime: Runtime, suite_path: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    run(runtime, suite_path(CHOICE, choice_rows()))
    assert capfd.readouterr() == ("", "")


def test_an_error_inside_lm_eval_names_the_suite(
    runtime: Runtime, suite_path: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = QuantkitLM(runtime)
    monkeypatch.setattr(lm, "loglikelihood", lambda requests: [])
    suite = load_suite(suite_path(CHOICE, choice_rows()))
    with pytest.raises(QuantkitError, match=r"tiny_choice \(.*suite\.yaml\): lm-eval failed on"):
        run_suite(lm, suite)


def test_only_the_items_of_the_scored_filter_count(
    runtime: Runtime, suite_path: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = load_suite(suite_path(CHOICE, choice_rows(3)))
    logged = [{"doc_id": i, "filter": name} for name in ("none", "strict") for i in range(2)]
    answer = {"samples": {suite.name: logged}}
    monkeypatch.setattr("quantkit.evals.run_suite.lm_evaluate", lambda **_: answer)
    with pytest.raises(QuantkitError, match="lm-eval scored 2 items where 3 were asked"):
        run_suite(QuantkitLM(runtime), suite)


def test_canaries_refuse_a_uniform_model(suite_path: Write) -> None:
    """Before anything is scored, with suites or without."""
    flat = tiny_runtime()
    with torch.no_grad():
        flat.model.lm_head.weight.zero_()

    def progress(done: int, total: int, label: str) -> None:
        pytest.fail(f"{label} was scored")

    text = "the order is late " * 40
    suites = [load_suite(suite_path(CHOICE, choice_rows()))]
    for what in ({"suites": suites}, {"text": text, "seq_len": 32}):
        with pytest.raises(QuantkitError, match="canary 'uniform'"):
            evaluate(flat, **what, canary=True, progress=progress)  # type: ignore[arg-type]


def test_canaries_refuse_a_model_that_prefers_disorder(runtime: Runtime) -> None:
    lm = QuantkitLM(runtime)
    lm.score = lambda pairs: [(-10.0, False), (-9.0, False)]  # type: ignore[method-assign]
    with pytest.raises(QuantkitError, match="canary 'shuffled words'"):
        check_canaries(lm)
    lm.score = lambda pairs: [(-9.0, False), (-10.0, False)]  # type: ignore[method-assign]
    check_canaries(lm)


def test_canary_sentences_hold_the_same_words() -> None:
    for natural, shuffled in SENTENCES:
        assert sorted(natural.strip(".").split()) == sorted(shuffled.strip(".").split())
