"""The table of several result files, and KL over seeds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality_table as tables

SCORE = {"kl": 0.1, "kl_error": 0.002, "ppl": 20.0, "top1": 0.8}
ROW = {"seconds": 12.4, "peak_rss_bytes": 1.5e9, "bits": 4.25, "texts": {"wiki": SCORE}}


def result(seed: int, rows: dict[str, float], **facts: Any) -> dict[str, Any]:
    """A file of rows with these KLs."""
    return {
        "scheme": "w4a16-g64",
        "seed": seed,
        "calibration": {"file": "c4.jsonl", "samples": 128, "tokens_sha256": f"tokens {seed}"},
        "rows": {
            name: {**copy.deepcopy(ROW), "texts": {"wiki": {**SCORE, "kl": kl}}}
            for name, kl in rows.items()
        },
        **facts,
    }


def test_the_table_has_a_line_a_text() -> None:
    two = {**ROW, "texts": {"wiki": SCORE, "books": SCORE}}
    lines = tables.table({"one": ROW, "two": two}).splitlines()
    assert len(lines) == 4
    assert lines[1].split() == [
        "one", "12", "1.50", "4.25", "wiki", "0.1000", "±", "0.0020", "20.00", "80.0%",
    ]  # fmt: skip


def test_a_row_that_was_made_elsewhere_has_no_time() -> None:
    elsewhere = {**ROW, "seconds": None, "peak_rss_bytes": None}
    lines = tables.table({"one": ROW, "two": elsewhere}).splitlines()
    assert lines[2].split()[:4] == ["two", "-", "-", "4.25"]
    assert lines[2].index("wiki") == lines[1].index("wiki")


def test_files_that_differ_in_more_than_the_seed_stay_apart() -> None:
    files = {
        "a": result(0, {}),
        "b": result(1, {}, sensitivity_run={"seconds": 3.0}),
        "c": result(2, {}, scheme="fp8"),
        "d": result(0, {}, scheme="fp8", versions={"torch": "2"}),
    }
    assert tables.groups(files) == [["a", "b"]]
    del files["a"]["seed"]  # as files of before have it
    assert tables.groups(files) == [["a", "b"]]
    assert tables.groups({"a": files["a"], "again": files["a"]}) == []


def test_mean_and_spread_are_of_rows_that_all_seeds_have() -> None:
    documents = [
        result(0, {"quantkit GPTQ": 0.10, "quantkit RTN": 0.3, "AutoRound": 0.2}, peer_versions=1),
        result(1, {"quantkit GPTQ": 0.16, "AutoRound": 0.3}, peer_versions=2),
        result(2, {"quantkit GPTQ": 0.13}),
        result(2, {"AutoRound": 0.1}, peer_versions=1),  # the rest of seed 2
    ]
    (found,) = tables.spreads(documents)
    assert (found.name, found.text, found.seeds) == ("quantkit GPTQ", "wiki", 3)
    assert found.mean == pytest.approx(0.13)
    assert found.spread == pytest.approx(0.06)
    documents[1]["peer_versions"] = 1
    ours, peer = tables.spreads(documents)
    assert (ours.name, peer.name) == ("quantkit GPTQ", "AutoRound")
    assert peer.mean == pytest.approx(0.2)
    assert "0.2000   0.2000" in tables.spread_table([ours, peer]).splitlines()[2]


def test_files_become_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / f"q{seed}.json" for seed in range(2)]
    for seed, path in enumerate(paths):
        path.write_text(json.dumps(result(seed, {"quantkit RTN": 0.2 + seed / 10})))
    monkeypatch.setattr("sys.argv", ["quality_table", *map(str, paths)])
    tables.main()
    out = capsys.readouterr().out
    assert "q0: quantkit RTN" in out
    assert "q1: quantkit RTN" in out
    assert "over seeds: q0, q1" in out
    assert "0.2500   0.1000" in out


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": {}}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match="no result file"):
        tables.read(path)
