"""benchmarks/vs_lm_eval.py: the same items for all, and what its figures mean; times nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmark_scripts import load_script

vs = load_script("vs_lm_eval")


def system(name: str, seconds: list[float], scores: list[float]) -> object:
    return vs.System(name, None, seconds, scores)


def test_shares_are_of_the_fastest_batch_size_within_rounds() -> None:
    document = vs.summarize(
        [
            system("quantkit", [2.0, 3.0, 2.0], [1.0, 0.0, 1.0, 1.0]),
            system("batch 1", [10.0, 10.0, 10.0], [1.0, 0.0, 1.0, 0.0]),
            system("batch 8", [4.0, 8.0, 8.0], [1.0, 0.0, 1.0, 1.0]),
        ]
    )
    assert document["best"] == "batch 8"
    assert document["share_of_best"] == pytest.approx(0.375)
    assert [row["same"] for row in document["systems"]] == [4, 3, 4]
    assert [row["accuracy"] for row in document["systems"]] == [0.75, 0.5, 0.75]


def test_items_are_a_seeded_subset(tmp_path: Path) -> None:
    rows = [{"query": f"Q{i}?", "choices": ["a", "b"], "gold": 0} for i in range(30)]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    drawn = vs.draw(path, 10, seed=1)
    assert drawn == vs.draw(path, 10, seed=1) != vs.draw(path, 10, seed=2)
    assert drawn == sorted(drawn, key=rows.index)
    with pytest.raises(SystemExit, match="30 items where --count asks for 31"):
        vs.draw(path, 31, seed=0)
    suite = vs.write_suite(tmp_path / "suite", drawn)
    assert (suite.n, suite.metric) == (10, "acc")
    assert [row["query"] for row in suite.rows] == [row["query"] for row in drawn]


def test_a_system_that_changes_its_mind_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([[1.0, 0.0], [1.0, 1.0]])

    def run_suite(lm: object, suite: object) -> object:
        return SimpleNamespace(rows=[SimpleNamespace(score=s) for s in next(scores)])

    monkeypatch.setattr(vs, "run_suite", run_suite)
    one = system("quantkit", [], [])
    one.score(None)  # type: ignore[attr-defined]
    with pytest.raises(SystemExit, match="scored the same items differently"):
        one.score(None)  # type: ignore[attr-defined]
