"""Finding and reading a run's folder, the command, and the page's small arithmetic."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_builders import write_run

from quantkit.cli.main import run as cli
from quantkit.errors import UsageError
from quantkit.report import read_run, words
from quantkit.report.intervals import score_interval, wilson
from quantkit.report.plots import tick_labels, ticks
from quantkit.report.run_folder import find_run, split_name
from quantkit.results import GateCheck, ItemRow, Outcome


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "out")


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(source, tmp_path / "out.run"))


@pytest.mark.parametrize("name", ["out.run", "out", "out.rejected", "out/", "out.run/../out"])
def test_found_by_every_name(folder: Path, name: str) -> None:
    assert find_run(f"{folder.parent}/{name}").resolve() == folder


def test_found_from_within(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.parent / "out").mkdir()
    monkeypatch.chdir(folder.parent / "out")
    assert find_run(".").resolve() == folder
    monkeypatch.chdir(folder)
    assert find_run(".").resolve() == folder


def test_no_run_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    assert cli(["report", str(tmp_path / "nothing"), "-o", str(page)]) == 2
    said = capsys.readouterr().err
    assert "nothing: holds no run.json" in said
    assert "give the OUT.run folder" in said
    assert not page.exists()


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    document = json.loads(path.read_text())
    changed = change(document)
    path.write_text(json.dumps(document if changed is None else changed))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("run.json", lambda d: []),
        ("run.json", lambda d: d.update(manifest=None)),
        ("run.json", lambda d: d["manifest"].update(layers=[1])),
        ("run.json", lambda d: d["manifest"].update(size_bytes="big")),
        ("run.json", lambda d: d["manifest"].update(bits_per_weight=float("nan"))),
        ("run.json", lambda d: d.update(results=None)),
        ("run.json", lambda d: d.update(seconds={"load": float("inf")})),
        ("results.json", lambda d: d["fingerprint"].update(model="another")),
        ("results.json", lambda d: d["tasks"]["support_intent"].update(rows=3)),
        ("results.json", lambda d: d["text"].update(kl_by_position=["x"])),
        ("gate.json", lambda d: d.update(outcome="MAYBE")),
        ("gate.json", lambda d: d["checks"][0].update(value=float("nan"))),
        ("gate.json", lambda d: {}),
        ("flips.jsonl", None),
    ],
)
def test_malformed_names_the_file(
    folder: Path, file: str, change: Callable[[Any], Any] | None
) -> None:
    if change is None:
        (folder / file).write_text('{"task": 1}\n')
    else:
        edit(folder / file, change)
    with pytest.raises(UsageError, match=str(folder / file)):
        read_run(folder)


@pytest.mark.parametrize("file", ["run.json", "results.json", "gate.json", "flips.jsonl"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]\n", b"3"])
def test_damaged_file(folder: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)
    if (file, content) == ("flips.jsonl", b""):
        assert read_run(folder).flips == ()  # a run without a single flip
        return
    with pytest.raises(UsageError, match=str(folder / file)):
        read_run(folder)


@pytest.mark.parametrize("file", ["results.json", "baseline.json", "gate.json", "flips.jsonl"])
def test_gated_run_needs_its_files(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(UsageError, match=str(folder / file)):
        read_run(folder)


def test_scores_of_an_earlier_run_are_left_alone(folder: Path) -> None:
    edit(folder / "run.json", lambda d: d.update(verdict=None, results=None, baseline=None))
    run = read_run(folder)
    assert (run.verdict, run.candidate, run.baseline, run.flips) == (None, None, None, ())


def test_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli(["report", str(folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"report": "report.html", "bytes": Path("report.html").stat().st_size}
    first = Path("report.html").read_bytes()
    assert cli(["report", "out", "-o", "again.html"]) == 0
    assert "again.html" in capsys.readouterr().out
    assert Path("again.html").read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.html", "out.run", "report.html"]


def test_output_must_be_a_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["report", str(folder), "-o", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert cli(["report", str(folder), "-o", str(tmp_path / "no" / "r.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


# -- words and numbers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.3.self_attn.q_proj", 3, "q_proj"),
        ("transformer.h.11.mlp.c_fc", 11, "c_fc"),
        ("model.layers.0.mlp.experts.7.up_proj", 0, "mlp.experts.*.up_proj"),
        ("lm_head", None, "lm_head"),
        ("head.0", None, "head.0"),
    ],
)
def test_split_name(name: str, block: int | None, kind: str) -> None:
    assert split_name(name) == (block, kind)


def check(name: str, outcome: str, value: float, limit: float, *bounds: float) -> GateCheck:
    lower, upper = bounds or (None, None)
    return GateCheck(name, Outcome(outcome), value, lower, upper, limit, "reason", {})


def test_rounding_does_not_hide_the_decision() -> None:
    """A bound of −4.98 against a margin of −5.0 would read −5.0 against −5.0."""
    said = words.explain(check("t.acc", "PASS", -0.01, -0.05, -0.0498, 0.02))
    assert "−4.98" in said
    assert "5.00 is allowed" in said
    assert "70.04" in words.explain(check("size.ratio", "FAIL", 0.7004, 0.7))


def test_fail_and_pass_quote_the_bound_that_decided() -> None:
    assert "better bound, 0.0600, is outside" in words.explain(
        check("kl.mean", "FAIL", 0.07, 0.05, 0.06, 0.08)
    )
    assert "worse bound, 91.0, is inside" in words.explain(
        check("top1", "PASS", 0.92, 0.9, 0.91, 0.93)
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.44, "9.4 s"), (59.96, "1 min 00 s"), (3599.7, "1 h 00 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


def test_numbers() -> None:
    assert words.fixed(-0.0001, 2, signed=True) == "0.00"
    assert words.fixed(-3.26, 1) == "−3.3"
    assert words.size(999) == "999 bytes"
    assert words.size(269_060_552) == "269.1\u00a0MB"


def test_wilson_against_a_published_case() -> None:
    """81 of 263 (Newcombe 1998, Stat. Med. 17:857, table I): 0.2553 to 0.3662."""
    low, high = wilson(81 / 263, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def rows(scores: list[float], size: int = 1) -> list[ItemRow]:
    return [
        ItemRow(str(i), s, str(i), cluster=None if size == 1 else str(i // size))
        for i, s in enumerate(scores)
    ]


def test_shared_clusters_widen_the_interval() -> None:
    scores = [1.0] * 60 + [0.0] * 40
    alone, shared = score_interval(rows(scores)), score_interval(rows(scores, 4))
    assert alone is not None
    assert shared is not None
    assert shared.lower < alone.lower < alone.upper < shared.upper
    # Identical items in fours are 25 items.
    assert shared.upper - shared.lower == pytest.approx(
        (lambda w: w[1] - w[0])(wilson(0.6, 24.0)), rel=0.01
    )
    certain = score_interval(rows([1.0] * 40, 4))
    assert certain is not None
    assert certain.lower < 0.8
    assert score_interval(rows([1.5])) is None
    assert score_interval([]) is None


@pytest.mark.parametrize("high", [0.0, 1e-9, 0.013, 0.1, 0.1751, 1.0, 37.0, 1e6])
def test_ticks_reach_the_largest_value(high: float) -> None:
    values = ticks(high)
    labels = tick_labels(values)
    assert values[0] == 0
    assert values[-1] >= high * (1 - 1e-6)
    assert len(values) <= 6
    assert len(set(labels)) == len(labels)
