"""The tasks that come with lm-eval, on rows of our own: scored as lm-eval scores them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from eval_builders import tiny_runtime
from lm_eval_tasks import WORDS, hub, said_by_lm_eval

from quantkit.evals.run_suite import run_suites
from quantkit.evals.suites import load_suites
from quantkit.models.runtime import Runtime
from quantkit.results import Results

Know = Callable[..., None]

#: Where lm-eval's own tasks lie.
LIBRARY = Path(lm_eval.tasks.__file__).parent


@pytest.fixture(scope="module")
def roomy() -> Runtime:
    """A tiny model whose context holds examples and an answer."""
    runtime = tiny_runtime()
    runtime.model.config.max_position_embeddings = 1024
    return runtime


ARC = [
    {
        "id": f"Mercury_{i}",
        "question": f"What is {word}?",
        "choices": {"text": [word, "paris", "the late order"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[i % 3],
    }
    for i, word in enumerate(("refund", "order", "rome", "invoice", "late"))
]
MMLU = [
    {"question": f"Where is {w}?", "choices": ["a", "b", "c", "d"], "answer": i % 4}
    for i, w in enumerate(WORDS)
]
GSM = [
    {"question": f"How many {w}?", "answer": f"So many.\n#### {i}"} for i, w in enumerate(WORDS[:6])
]
WINOGRANDE = [
    {
        "sentence": f"The {w} was late, so _ was sent back.",
        "option1": "the parcel",
        "option2": f"the {w}",
        "answer": "12"[i % 2],
    }
    for i, w in enumerate(WORDS)
]
HELLASWAG = [
    {
        "ctx_a": f"Somebody opens a {w}.",
        "ctx_b": "then she",
        "activity_label": "Orders",
        "endings": ["is late [title]", f"sends the {w}", "goes to rome", "pays"],
        "label": str(i % 4),
    }
    for i, w in enumerate(WORDS)
]

OWN = [
    ("arc", "arc_easy", ARC, "acc"),
    ("winogrande", "winogrande", WINOGRANDE, "acc"),
    ("hellaswag", "hellaswag", HELLASWAG, "acc"),
    ("gsm8k", "gsm8k", GSM, "exact_match"),
]


@pytest.mark.parametrize(("folder", "name", "rows", "metric"), OWN, ids=[o[1] for o in OWN])
def test_a_task_scores_what_lm_eval_says(
    folder: str,
    name: str,
    rows: list[dict[str, Any]],
    metric: str,
    know: Know,
    roomy: Runtime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = hub(monkeypatch, rows)
    know(LIBRARY / folder)
    (suite,) = load_suites([name])
    ours = run_suites(roomy, [suite])[name]
    answer = said_by_lm_eval(roomy, name)
    filters = list(dict.fromkeys(s["filter"] for s in answer["samples"][name]))
    samples = [s for s in answer["samples"][name] if s["filter"] == filters[0]]
    assert asked[0][0] == ours.provenance["dataset"]
    assert (ours.metric, ours.n) == (metric, len(rows))
    assert [row.score for row in ours.rows] == [s[metric] for s in samples]
    assert [row.prompt for row in ours.rows] == [s["arguments"][0][0] for s in samples]
    assert ours.value == pytest.approx(answer["results"][name][f"{metric},{filters[0]}"])
    for other in filters[1:]:
        mean = sum(row.details[f"{metric},{other}"] for row in ours.rows) / ours.n
        assert mean == pytest.approx(answer["results"][name][f"{metric},{other}"])


def test_arc_easy_names_its_items_and_itself(
    know: Know, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub(monkeypatch, ARC)
    know(LIBRARY / "arc")
    (suite,) = load_suites(["lm-eval:arc_easy"])
    result = run_suites(runtime, [suite])["arc_easy"]
    assert [row.id for row in result.rows] == [row["id"] for row in ARC]
    assert [row.target for row in result.rows] == [
        row["choices"]["text"]["ABC".index(row["answerKey"])] for row in ARC
    ]
    assert result.provenance == {
        "harness": "lm-eval",
        "task": "arc_easy",
        "version": "1.0",
        "config": result.provenance["config"],
        "dataset": "allenai/ai2_arc",
        "dataset_name": "ARC-Easy",
        "split": "test",
        "num_fewshot": 0,
        "filter": "none",
    }
    Results({}, {"arc_easy": result}).save(tmp_path / "r.json")
    assert Results.load(tmp_path / "r.json").tasks["arc_easy"] == result
    assert str(LIBRARY) not in (tmp_path / "r.json").read_text()


def test_winogrande_names_the_choice(
    know: Know, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its choices stand in the context, and one continuation behind all of them."""
    hub(monkeypatch, WINOGRANDE)
    know(LIBRARY / "winogrande")
    for row in run_suites(runtime, load_suites(["winogrande"]))["winogrande"].rows:
        assert row.target.startswith("The ")
        assert (row.prediction == row.target) == bool(row.score)


def test_a_group_is_one_suite_of_slices(
    know: Know, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch, MMLU[:3])
    know(LIBRARY / "mmlu" / "default")
    (suite,) = load_suites(["mmlu_stem"])
    ours = run_suites(runtime, [suite])["mmlu_stem"]
    answer = said_by_lm_eval(runtime, "mmlu_stem")
    assert ours.value == pytest.approx(answer["groups"]["mmlu_stem"]["acc,none"])
    assert {row.slice for row in ours.rows} == set(answer["samples"])
    assert ours.rows[0].id == "mmlu_abstract_algebra/0"
    for row in ours.rows:
        sample = answer["samples"][row.slice][int(row.id.rpartition("/")[2])]
        assert (row.score, row.hash) == (sample["acc"], sample["doc_hash"])
    by_id = {row.id: row for row in ours.rows}
    part = run_suites(runtime, [suite], max_items=7, seed=1)["mmlu_stem"]
    assert len(part.rows) == 7
    assert [row.id for row in part.rows] == [i for i in by_id if i in {r.id for r in part.rows}]
    for row in part.rows:
        twin = by_id[row.id]
        assert (row.hash, row.prompt, row.slice) == (twin.hash, twin.prompt, twin.slice)
    assert ours.provenance["tasks"]["mmlu_astronomy"]["version"] == "1.0"
    (whole,) = load_suites(["mmlu"])  # a group of groups of tags
    assert (len(whole.parts), whole.n, whole.score_name) == (57, 3 * 57, "acc")
