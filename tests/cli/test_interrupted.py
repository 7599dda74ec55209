"""Runs that are interrupted, killed, or met by a second one."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from quantkit.cli.main import run
from quantkit.work import LOCK
from tests.run_helpers import arguments, contents, leftovers

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


@contextmanager
def waiting_in_block_1(argv: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A real process with this command line that has finished block 0."""
    command = [sys.executable, "-c", WAITS_IN_BLOCK_1, *argv]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        reached = process.stdout.readline()
        try:
            assert reached == "in block 1\n", process.communicate()[1]
            yield process
        finally:
            process.kill()


def test_a_second_run_is_refused_and_ctrl_c_leaves_resumable_work_only(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real signal while a block is being solved; then --resume ends it."""
    out = tmp_path / "out"
    argv = arguments(tiny, recipe, traffic, out)
    with waiting_in_block_1(argv) as first:
        refuse_beside(first, argv, capfd)
        first.send_signal(signal.SIGINT)
        # Ends stdin, too: a signal that came just before the wait began is then seen after it.
        _, err = first.communicate()
    assert first.returncode == 130, err
    assert "interrupted" in err
    assert leftovers(out) == []
    blocks = {p.name for p in (tmp_path / "out.partial" / "blocks").glob("*.json")}
    assert blocks == {"0000.json"}
    assert run([*argv, "--resume"]) == 0
    whole = tmp_path / "whole"
    assert run(arguments(tiny, recipe, traffic, whole)) == 0
    assert contents(whole) == contents(out)


def test_the_kernel_lets_go_of_the_lock_of_a_killed_run(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run beside it is refused before; a checkpoint that is there already stays until the end."""
    out = tmp_path / "out"
    argv = arguments(tiny, recipe, traffic, out)
    assert run(argv) == 0
    promoted = contents(out)
    with waiting_in_block_1(argv) as first:
        refuse_beside(first, argv, capfd)
        first.kill()
        first.communicate()
    assert first.returncode == -signal.SIGKILL
    assert contents(out) == promoted
    assert (tmp_path / "out.partial" / LOCK).read_text() == str(first.pid)
    assert run([*argv, "--resume"]) == 0
    assert contents(out) == promoted
    assert sorted(leftovers(out)) == ["out", "out.run"]
    assert not (tmp_path / "out.partial").exists()


def refuse_beside(
    first: subprocess.Popen[str], argv: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """No second run begins where the first is at work, and each says whose place it is."""
    for more in ((), ("--resume",)):
        assert run([*argv, *more]) == 2
        err = capfd.readouterr().err
        assert f"out.partial: process {first.pid} is at work there; wait for it" in err


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
