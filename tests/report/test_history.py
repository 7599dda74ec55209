"""Earlier runs beside a run: what is compared, and what is not."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_builders import make_results, write_run

from quantkit.cli.main import run as cli
from quantkit.errors import NotComparableError, UsageError
from quantkit.report import read_history, read_run, render
from quantkit.report.history import history
from quantkit.report.plots import ticks_between


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one model, one that failed and one that did not, and results without a run."""
    folder = tmp_path_factory.mktemp("history")
    write_run(folder / "first")
    write_run(folder / "second", loses=0.005)
    candidate, _ = make_results(loses=0.1)
    candidate.save(folder / "between.json")
    return folder


def test_a_row_a_run_and_this_one_last(folder: Path) -> None:
    this = read_run(folder / "second.run")
    past = read_history(this, [folder / "first", folder / "between.json"])
    shown = history(past)
    assert shown is not None
    assert [row["name"] for row in shown["rows"]] == ["first", "between.json", "second"]
    assert [row["word"] for row in shown["rows"]] == ["FAIL", "not judged", "INCONCLUSIVE"]
    assert shown["rows"][0]["note"] == "support-w4, 2025-03-14"
    assert shown["rows"][-1]["note"] == "this run"
    assert "support_intent · acc" in shown["columns"]
    assert "–" not in [cell for row in shown["rows"] for cell in row["cells"]]
    assert len(shown["facets"]) == len(shown["columns"])
    html = render(this, past)
    assert html.count('class="whisker') == 3 * 3  # each task's interval in each run
    assert html == render(this, past)


def test_other_items_and_text_are_left_out(folder: Path) -> None:
    this = read_run(folder / "second.run")
    other = read_history(this, [folder / "first"])[0]
    assert other.results.text is not None
    changed = replace(
        other.results,
        tasks={k: replace(t, hash="other") for k, t in other.results.tasks.items()},
        text=replace(other.results.text, hash="other"),
    )
    shown = history([replace(other, results=changed), *read_history(this, [folder / "first"])[1:]])
    assert shown is not None
    row = dict(zip(shown["columns"], shown["rows"][0]["cells"], strict=True))
    assert row["support_intent · acc"] == row["perplexity"] == row["KL to the original"] == "–"
    assert row["bits a weight"] == "5.19"
    assert len(shown["facets"]) == 2  # MB and bits: one run's number alone is no history


def test_without_earlier_runs_there_is_no_section(folder: Path) -> None:
    this = read_run(folder / "first")
    assert read_history(this, []) == ()
    assert 'id="history"' not in render(this)


def test_another_original_is_refused(folder: Path, tmp_path: Path) -> None:
    candidate, _ = make_results()
    fingerprint = {**candidate.fingerprint, "original": "f" * 64}
    replace(candidate, fingerprint=fingerprint).save(tmp_path / "other.json")
    with pytest.raises(NotComparableError, match="made from weights ffffffffffff"):
        read_history(read_run(folder / "first"), [tmp_path / "other.json"])


def test_a_run_without_scores_has_no_history(folder: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "plain", gated=False)
    plain, scored = read_run(tmp_path / "plain"), read_run(folder / "first")
    for this, other in ((plain, folder / "first"), (scored, tmp_path / "plain")):
        with pytest.raises(UsageError, match="--no-gate and holds no scores"):
            read_history(this, [other])


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    options = ["--history", str(folder / "first.run"), "--history", str(folder / "between.json")]
    assert cli(["report", str(folder / "second"), *options, "-o", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(page)
    assert 'id="history"' in page.read_text(encoding="utf-8")
    assert cli(["report", str(folder / "second"), "--history", str(folder / "none")]) == 2


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_enclose_their_values(low: float, span: float) -> None:
    found = ticks_between(low, low + span)
    slack = 1e-6 * max(abs(low), abs(low + span), 1e-300)
    assert found[0] <= low + slack
    assert found[-1] >= low + span - slack
    assert 2 <= len(found) <= 9
    assert all(b > a for a, b in pairwise(found))
