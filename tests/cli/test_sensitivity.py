"""`quantkit inspect --sensitivity` from a model to a checkpoint of the chosen mixture."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from quantkit.cli.main import run
from quantkit.results import read_json

SCHEMES = "w3a16-g64,w4a16-g64,w6a16-g64"


def arguments(model: Path | str, file: Path, traffic: Path, *more: str) -> list[str]:
    return [
        "inspect", str(model), "--sensitivity", str(file), "--data", str(traffic),
        "--schemes", SCHEMES, "--samples", "4", "--seq-len", "32", *more,
    ]  # fmt: skip


def test_from_a_model_to_a_mixed_checkpoint(
    tiny: Path, traffic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, recipe, page = tmp_path / "s.json", tmp_path / "mixed.yaml", tmp_path / "s.html"
    more = ["--checks", "6", "--bits", "4.3", "--recipe", str(recipe), "--plot", str(page)]
    assert run(arguments(tiny, file, traffic, *more)) == 0
    shown = capsys.readouterr()
    assert "rank correlation" in shown.out
    assert "MB of hidden states" in shown.err

    html = page.read_text()
    assert "<svg" in html
    assert not re.search(r"(?:src|href)=|<script|@import|url\(", html)

    out = tmp_path / "out"
    calibrate = ["calibrate", str(tiny), "-r", str(recipe), "--samples", "4", "--seq-len", "32"]
    assert run([*calibrate, "--no-gate", "-o", str(out)]) == 0
    capsys.readouterr()
    assert run(["inspect", "--sensitivity", str(file), "--bits", "4.3", "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)["mixture"]
    manifest = read_json(out / "quantkit.json")
    assert set(manifest["layers"]) == set(chosen["chosen"])
    assert manifest["bits_per_weight"] == pytest.approx(chosen["bits_per_weight"], rel=1e-4)
    assert manifest["bits_per_weight"] <= 4.3


def test_a_file_is_reused_or_refused(
    tiny: Path,
    tiny_untied: Path,
    traffic: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What was measured is kept, even where the budget cannot be met."""
    file = tmp_path / "s.json"
    assert run(arguments(tiny, file, traffic, "--bits", "2.5")) == 2
    assert "the smallest schemes measured take 3.25" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]
    before = file.read_bytes()
    assert run(arguments(tiny, file, traffic)) == 0
    assert "measured before" in capsys.readouterr().err
    assert run(["inspect", str(tiny), "--sensitivity", str(file)]) == 0
    capsys.readouterr()
    for other, what in (
        (arguments(tiny_untied, file, traffic), "another model"),
        (["inspect", str(tiny_untied), "--sensitivity", str(file)], "another model"),
        (arguments(tiny, file, traffic, "--seq-len", "16"), "another data"),
        (arguments(tiny, file, traffic, "--schemes", "w4a16-g64"), "another schemes"),
        (arguments(tiny, file, traffic, "--algorithm", "rtn"), "another algorithm"),
    ):
        assert run(other) == 5
        assert what in capsys.readouterr().err
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sensitivity", "no.json"], "no such file, and nothing to measure it on"),
        (["--bits", "4"], "--bits: belong to a sensitivity file"),
        (["--bits", "4", "--schemes", "w8a16"], "--schemes and --bits: belong to a sensitivity"),
        (["--sensitivity", "/dev/zero"], "is a device"),
        ([], "no CKPT"),
    ],
)
def test_arguments_that_do_not_go_together(
    more: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["model"] if "--bits" in more else []
    assert run(["inspect", *model, *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--schemes", "w4a16-g64,w9a16"], "unknown scheme 'w9a16'"),
        (["--schemes", "w8a8"], "quantizes activations"),
        (["--algorithm", "awq"], "no such solver"),
        (["--recipe", "r.yaml"], "nothing is chosen"),
        (["--bits", "4", "--recipe", "/nowhere/r.yaml"], "no folder to write r.yaml in"),
        (["--plot", "/"], "is a folder"),
    ],
)
def test_mistakes_are_refused(
    tiny: Path,
    traffic: Path,
    more: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(arguments(tiny, tmp_path / "s.json", traffic, *more)) == 2
    assert message in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []
