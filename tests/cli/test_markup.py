"""Names and texts of the user are printed as they are: rich reads no markup into them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from quantkit.blame import Blame, Restored
from quantkit.cli import explain, inspect, progress
from quantkit.cli.main import run
from quantkit.results import Flip
from tests.run_helpers import arguments

#: The end of a style that never began, a style, and an emoji.
ODD = "x[/INST][red]:bug:"


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no cell is folded


class Sized:
    size_bytes = 100


def test_flips(capsys: pytest.CaptureFixture[str]) -> None:
    flip = Flip("a", ODD, "loss", None, ODD, ODD, ODD, ODD, 1.0, 0.0, False)
    explain._show_flips([flip])
    shown = "".join(capsys.readouterr().out.split())
    assert shown.count(ODD) == 5


def test_blame(capsys: pytest.CaptureFixture[str]) -> None:
    row = Restored(ODD, (ODD,), 0.1, 10)
    blame = Blame(0.2, 10, (row,), (row,), (row,), None)
    explain._show(blame, Sized(), "text", ["keep: []"])  # type: ignore[arg-type]
    assert capsys.readouterr().out.count(ODD) == 2


def test_layers_of_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    layer = {
        "shape": [2, 3],
        "scheme": ODD,
        "solver": "rtn",
        "bits": 4.0,
        "weight_error": 0.1,
        "output_error": None,
    }
    size = {"size_bytes": 1, "source_bytes": 2, "bits_per_weight": 4.0}
    inspect._show({"layers": {ODD: layer}, "kept": [], "format": "gptq", **size})
    assert capsys.readouterr().out.count(ODD) == 2


def test_a_plan_of_a_folder(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "[red]"))
    data = Path(shutil.copy(traffic, tmp_path / "[bold].jsonl"))
    assert run(arguments(model, recipe, data, tmp_path / "out", "--dry-run")) == 0
    shown = "".join(capfd.readouterr().err.split())
    assert f"Planfor{model}" in shown
    assert "[bold].jsonl:" in shown


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to rich
    with progress._bar("eval") as report:
        report(1, 2, "x[/INST]")
    assert "x[/INST]" in capsys.readouterr().err
