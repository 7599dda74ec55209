"""Bad input: a clear message, the documented exit code, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from quantkit.cli.main import run
from quantkit.ops import get_isa
from quantkit.work import LOCK
from tests.run_helpers import arguments, contents, leftovers


def edited(source: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    """A copy of a model folder with one thing broken."""
    shutil.copytree(source, folder)
    change(folder)
    return folder


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def poison(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def rename_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "perceptron9000"
    (folder / "config.json").write_text(json.dumps(config))


def quantize_already(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (truncate, 4, "truncated or not a safetensors file"),
        (poison, 4, "model.layers.1.mlp.down_proj: the weight holds 1 NaN"),
        (rename_architecture, 2, "unknown architecture"),
        (quantize_already, 2, "is quantized already"),
        (drop_config, 2, "no config.json"),
    ],
)
def test_broken_models(
    change: Callable[[Path], None],
    code: int,
    message: str,
    tiny: Path,
    traffic: Path,
    recipe: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = edited(tiny, tmp_path / "model", change)
    out = tmp_path / "out"
    assert run(arguments(model, recipe, traffic, out)) == code
    assert message in capfd.readouterr().err
    assert leftovers(out) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scheme: w4a16-g64\nalgoritm: gptq\n", "recipe.yaml:2 unknown key 'algoritm'; did you"),
        ("scheme: w4a16-g60\n", "unknown scheme 'w4a16-g60'; did you mean"),
        ("scheme: {weight: {bits: 4, group_size: 100}}\nkeep: [lm_head]\n",
         "in_features 384 is not divisible by group 100; try"),
        ("scheme: w4a16-g64\nalgorithm: {gptq: {dampp: 0.1}}\n", "'dampp'"),
        ("scheme: [w8a16\n", "recipe.yaml:"),
        ("", "recipe.yaml:1 is empty"),
        ("keep: [lm_head]\n", "no scheme"),
    ],
)  # fmt: skip
def test_broken_recipes(
    text: str,
    message: str,
    tiny: Path,
    traffic: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    out = tmp_path / "out"
    assert run(arguments(tiny, path, traffic, out)) == 2
    assert message in capfd.readouterr().err
    assert leftovers(out) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such"),
        ("", "hold"),
        ('{"text": "hi"}\n', "do not fill one window"),
        ('{"text": "hi"}\n{"text": \n', "data.jsonl:2"),
        ('{"banana": 1}\n', "data.jsonl:1"),
    ],
)
def test_broken_data(
    content: str | None,
    message: str,
    tiny: Path,
    recipe: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_text(content)
    out = tmp_path / "out"
    assert run(arguments(tiny, recipe, data, out)) == 2
    assert message in capfd.readouterr().err.replace("does not exist", "no such")
    assert leftovers(out) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["calibrate", "no/such/model", "-r", "w8a16", "-o", "x"], "no such folder"),
        (["calibrate", "my models/tiny", "-r", "w8a16", "-o", "x"], "nor a hub id"),
        (["calibrate", "missing.gguf", "-r", "w8a16", "-o", "x"], "no such file"),
        (["calibrate", "m", "-r", "w8a61", "-o", "x"], "did you mean 'w8a16'"),
        (["calibrate", "m", "-r", "w8a16"], "no output folder; give -o OUT"),
        (["calibrate", "m", "--no-such-option"], "No such option"),
        (["calibrate", "m", "--seed", "-1"], "--seed"),
        (["calibrate", "m", "--samples", "0"], "--samples"),
        (["calibrate", "m", "--eval-seq-len", "1"], "--eval-seq-len"),
        (
            ["calibrate", "m", "--kernels", "nativ"],
            "'nativ' is not one of 'native', 'native-float'",
        ),
        (["eval"], "no CKPT"),
        (["eval", "m", "--suite", "nothing_here"], "no such suite"),
        (["gate", "missing.json", "--baseline", "missing.json"], "missing.json"),
        (["verify", "nowhere"], "no such folder"),
        (["inspect", "nowhere"], "no such folder"),
        (["serve", "nowhere/at/all"], "no such folder"),
        (["frobnicate"], "No such command"),
    ],
)
def test_wrong_arguments(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(argv) == 2
    assert message in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


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


def test_full_disk(
    tiny: Path,
    traffic: Path,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The write of the weights fails as a full disk makes it fail."""

    def full(tensors: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("quantkit.checkpoint.shards.save_file", full)
    out = tmp_path / "out"
    assert run(arguments(tiny, recipe, traffic, out)) == 4
    assert "the disk is full; free some space" in capfd.readouterr().err
    assert leftovers(out) == []


def test_full_disk_under_the_work_folder(
    tiny: Path,
    traffic: Path,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """safetensors raises an error of its own there, and no OSError."""

    def full(tensors: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("quantkit.work.save_file", full)
    out = tmp_path / "out"
    assert run(arguments(tiny, recipe, traffic, out)) == 4
    err = capfd.readouterr().err
    assert "0000.safetensors: cannot be written (Error while serializing" in err
    assert "free some space, then --resume" in err
    assert leftovers(out) == []
    assert not [*(tmp_path / "out.partial").rglob("*.tmp")]
    monkeypatch.undo()
    assert run(arguments(tiny, recipe, traffic, out, "--resume")) == 0


def test_a_name_that_no_file_system_takes(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(tiny, recipe, traffic, tmp_path / ("x" * 300))) == 2
    assert "cannot be used (File name too long)" in capfd.readouterr().err


def test_nan_from_overflow_stops_the_run(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def inflate(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        for name in ("gate_proj", "up_proj", "down_proj"):
            tensors[f"model.layers.0.mlp.{name}.weight"] *= 1e18
        save_file(tensors, path, metadata={"format": "pt"})

    model = edited(tiny, tmp_path / "model", inflate)
    out = tmp_path / "out"
    assert run(arguments(model, recipe, traffic, out)) == 4
    err = capfd.readouterr().err
    assert "NaN" in err or "not positive definite" in err
    assert leftovers(out) == []


def test_missing_library_names_the_build_command(
    tiny: Path,
    traffic: Path,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from quantkit.errors import KernelMissingError

    def missing(*_: object) -> None:
        raise KernelMissingError("native kernels are not built", remedy="run `make native`")

    monkeypatch.setattr("quantkit.ops.pack_w4", missing)
    out = tmp_path / "out"
    assert run(arguments(tiny, recipe, traffic, out)) == 4
    assert "make native" in capfd.readouterr().err
    assert not out.exists()


#: The command line, but block 1 waits to be solved until a line or the end of stdin comes.
WAITS_IN_BLOCK_1 = """
import sys
from quantkit import collector
from quantkit.cli.main import main

solve = collector.quantize_group

def solve_when_told(layers, *inputs):
    if layers[0].block == 1:
        print("in block 1", flush=True)
        sys.stdin.readline()
    return solve(layers, *inputs)

collector.quantize_group = solve_when_told
main()
"""


def test_ctrl_c_leaves_resumable_work_only(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path
) -> None:
    """A real process, a real signal while a block is being solved; then --resume ends it."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", WAITS_IN_BLOCK_1, *arguments(tiny, recipe, traffic, out)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        reached = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        # Ends stdin, too: a signal that came just before the wait began is then seen after it.
        _, err = process.communicate()
    assert reached == "in block 1\n", err
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert leftovers(out) == []
    blocks = {p.name for p in (tmp_path / "out.partial" / "blocks").glob("*.json")}
    assert blocks == {"0000.json"}
    assert run(arguments(tiny, recipe, traffic, out, "--resume")) == 0
    whole = tmp_path / "whole"
    assert run(arguments(tiny, recipe, traffic, whole)) == 0
    assert contents(whole) == contents(out)


def test_a_second_run_on_the_same_output_is_refused(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """While the first is at work; when it is killed the kernel lets go of its lock."""
    out = tmp_path / "out"
    argv = arguments(tiny, recipe, traffic, out)
    command = [sys.executable, "-c", WAITS_IN_BLOCK_1, *argv]
    pipe = subprocess.PIPE
    for killed in (False, True):
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as first:
            assert first.stdout is not None
            reached = first.stdout.readline()
            for more in ((), ("--resume",)):
                assert run([*argv, *more]) == 2
                err = capfd.readouterr().err
                assert f"out.partial: process {first.pid} is at work there; wait for it" in err
            if killed:
                first.kill()
            _, err = first.communicate()
        assert reached == "in block 1\n", err
        assert first.returncode == (-signal.SIGKILL if killed else 0), err
        assert (tmp_path / "out.partial").exists() is killed
    promoted = contents(out)
    assert (tmp_path / "out.partial" / LOCK).read_text() == str(first.pid)
    assert run([*argv, "--resume"]) == 0
    assert contents(out) == promoted
    assert sorted(leftovers(out)) == ["out", "out.run"]
    assert not (tmp_path / "out.partial").exists()


def test_a_run_that_was_killed_before_its_first_block(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path
) -> None:
    """Its lock is no one's work, and does not count as a folder of the user's."""
    work = tmp_path / "out.partial"
    work.mkdir()
    (work / LOCK).write_text("12345")
    assert run(arguments(tiny, recipe, traffic, tmp_path / "out")) == 0
    assert not work.exists()


def test_ctrl_c_that_a_library_turns_into_its_own_error(
    tiny: Path,
    traffic: Path,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As torch does when the signal arrives while it reads a Python object from C++."""

    def load(path: Path) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object") from None

    monkeypatch.setattr("quantkit.work.load_file", load)
    out = tmp_path / "out"
    assert run(arguments(tiny, recipe, traffic, out)) == 130
    err = capfd.readouterr().err
    assert err.endswith("interrupted\n")
    assert "defect" not in err
    assert leftovers(out) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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


def test_threads_are_as_many_as_were_asked_for(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    try:
        argv = arguments(tiny, recipe, traffic, tmp_path / "out", "--threads", str(before + 1))
        assert run(argv) == 0
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    document = json.loads((tmp_path / "out.run" / "run.json").read_text())
    machine = document["machine"]
    assert machine["threads"] == before + 1
    # The other facts that a checkpoint's bytes depend on.
    assert machine["kernels' instruction set"] == get_isa()
    assert machine["torch's instruction set"] == torch.backends.cpu.get_cpu_capability()
    recorded = json.loads((tmp_path / "out" / "quantkit.json").read_text())["machine"]
    assert recorded["threads"] == before + 1
    assert recorded["isa"] == get_isa()


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


@pytest.mark.parametrize("option", ["--baseline", "--text", "--suite"])
def test_what_a_run_without_a_gate_would_not_read_is_refused(
    tiny: Path, traffic: Path, recipe: Path, option: str, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["calibrate", str(tiny), "--recipe", str(recipe), "--data", str(traffic)]
    assert run([*argv, "--no-gate", "--dry-run", option, str(recipe)]) == 2
    assert f"{option}: nothing is scored with --no-gate" in capfd.readouterr().err
