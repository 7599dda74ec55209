"""What a run leaves, and what it refuses to write over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantkit.cli.main import run
from tests.run_helpers import arguments, contents, leftovers


def test_output_that_is_something_else(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert run(arguments(tiny, recipe, traffic, out)) == 2
    assert "not a quantkit checkpoint" in capfd.readouterr().err
    assert (out / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("suffix", ["rejected", "run", "partial", "staging"])
def test_a_folder_beside_the_output_that_is_something_else(
    suffix: str,
    tiny: Path,
    traffic: Path,
    recipe: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A run would replace it, or write between its files."""
    precious = tmp_path / f"out.{suffix}"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    assert run(arguments(tiny, recipe, traffic, tmp_path / "out")) == 2
    assert f"out.{suffix}: exists and is not" in capfd.readouterr().err
    assert contents(precious) == {"thesis.txt": b"years of work"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", ["", ".rejected", ".run", ".partial", ".staging"])
@pytest.mark.parametrize("dangles", [False, True])
def test_an_output_that_is_a_symbolic_link(
    suffix: str,
    dangles: bool,
    tiny: Path,
    traffic: Path,
    recipe: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A rename would replace the link, and what it points to would stay behind unseen."""
    target = tmp_path / "disk2"
    if not dangles:
        target.mkdir()
    link = tmp_path / f"out{suffix}"
    link.symlink_to(target)
    assert run(arguments(tiny, recipe, traffic, tmp_path / "out")) == 2
    err = capfd.readouterr().err
    assert f"out{suffix}: is a symbolic link" in err
    assert suffix or f"-o {target}" in err
    assert link.readlink() == target
    assert target.exists() is not dangles
    assert leftovers(tmp_path / "out") in ([], [link.name])


@pytest.mark.parametrize("out", [".", "/", "x/.."])
def test_an_output_without_a_name(
    out: str,
    tiny: Path,
    traffic: Path,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments(tiny, recipe, traffic, Path(out))) == 2
    assert "has no name" in capfd.readouterr().err


def test_unwritable_output(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert run(arguments(tiny, recipe, traffic, blocker / "out")) == 2
    assert "cannot be written" in capfd.readouterr().err


def test_a_name_that_no_file_system_takes(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(tiny, recipe, traffic, tmp_path / ("x" * 300))) == 2
    assert "cannot be used (File name too long)" in capfd.readouterr().err


def test_success_leaves_one_folder_and_its_run(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(arguments(tiny, recipe, traffic, out, "--json")) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["output"] == str(out)
    assert document["verdict"] is None
    assert set(document["seconds"]) == {"load", "calibrate", "quantize", "export", "eval"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.run", "recipe.yaml"]
    assert run(["verify", str(out)]) == 0
    assert run(["inspect", str(out)]) == 0
    (out / "config.json").write_text((out / "config.json").read_text() + " ")
    assert run(["verify", str(out), "--json"]) == 4


def test_dry_run_writes_nothing(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(tiny, recipe, traffic, tmp_path / "deep" / "er" / "out", "--dry-run")
    assert run(argv) == 0
    assert "4 × 64 tokens" in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]
    assert run([*argv, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["bits_per_weight"] == pytest.approx(4.25)


def test_a_dry_run_without_an_output_looks_at_no_folder(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of any name in the current one is the user's."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "dry-run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    before = tmp_path.stat().st_mtime_ns
    argv = ["calibrate", str(tiny), "--recipe", str(recipe), "--data", str(traffic)]
    assert run([*argv, "--no-gate", "--dry-run"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dry-run", "recipe.yaml"]
    assert tmp_path.stat().st_mtime_ns == before
