"""`quantkit explain`: whose results it believes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantkit.cli import explain
from quantkit.errors import NotComparableError, UsageError
from quantkit.results import ItemRow, Results, TaskResult, TextResult, TextWindow

FINGERPRINT = {"tokenizer": "t", "chat_template": "c", "lm_eval": "1", "seed": 0, "model": "m"}


def task(*scores: float, hash: str = "h", metric: str = "acc") -> TaskResult:
    rows = (ItemRow(f"i{i}", score, f"h{i}") for i, score in enumerate(scores))
    return TaskResult(metric, tuple(rows), hash)


def case(candidate: Results, baseline: Results | None) -> explain._Case:
    return explain._Case(candidate, baseline, Path("out"), "original")


CANDIDATE = Results({**FINGERPRINT, "model": "q", "original": "m"}, {"a": task(0, 1, 0)})
BASELINE = Results(FINGERPRINT, {"a": task(1, 1, 0)})


def test_suites_that_only_one_of_them_scored_say_nothing() -> None:
    more = {"a": task(1, 1, 0), "b": task(1, 1)}
    assert [f.id for f in case(CANDIDATE, replace(BASELINE, tasks=more)).flips()] == ["i0"]
    ours = replace(CANDIDATE, tasks={"a": task(0, 1, 0), "c": task(0)})
    assert [f.id for f in case(ours, BASELINE).flips()] == ["i0"]
    assert case(CANDIDATE, replace(BASELINE, tasks={"b": task(1)})).flips() == []
    assert case(CANDIDATE, None).flips() == []


def test_held_out_text_need_not_be_the_same() -> None:
    """It is not what items flip on."""
    one, other = (TextResult(h, 8, (TextWindow(7, 1.0),)) for h in "xy")
    found = case(replace(CANDIDATE, text=one), replace(BASELINE, text=other)).flips()
    assert len(found) == 1


@pytest.mark.parametrize(
    ("baseline", "says"),
    [
        (replace(BASELINE, fingerprint={**FINGERPRINT, "tokenizer": "x"}), "tokenizer differs"),
        (replace(BASELINE, fingerprint={**FINGERPRINT, "model": "x"}), "the baseline is stale"),
        (replace(BASELINE, tasks={"a": task(1, 1, 0, metric="acc_norm")}), "has no a.acc"),
        (replace(BASELINE, tasks={"a": task(1, 1, 0, hash="x")}), "its file or data differ"),
    ],
)
def test_what_cannot_be_compared_is_refused(baseline: Results, says: str) -> None:
    with pytest.raises(NotComparableError, match=says):
        case(CANDIDATE, baseline).flips()


@pytest.mark.parametrize("run", [[], {}, 3, {"output": 3, "model": "m"}, {"model": "m"}])
def test_another_programs_run_file_is_none(run: Any, tmp_path: Path) -> None:
    CANDIDATE.save(tmp_path / "results.json")
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(UsageError, match="not in a run folder; give --checkpoint CKPT"):
        explain._read_case(tmp_path, None, None, None)
    assert explain._read_case(tmp_path, Path("ckpt"), "original", None).reference == "original"
