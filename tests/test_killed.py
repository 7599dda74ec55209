"""`kill -9` at any point of a run; `--resume` then ends with the bytes of an undisturbed one."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.cli.main import run
from tests.run_helpers import arguments, contents, leftovers

#: The command line, but the process kills itself at a point: ``solve N`` before block N is
#: solved, ``write N`` with half of block N's file written, ``export`` with half of the weights
#: written, ``rename N`` in front of the N-th rename, ``renamed N`` behind it.
DIES = """
import os, signal, sys
from pathlib import Path
from quantkit import collector, work
from quantkit.checkpoint import shards
from quantkit.cli.main import main

what, _, number = sys.argv.pop(1).partition(" ")

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def half(save, wanted):
    def save_half(tensors, path, **options):
        save(tensors, path, **options)
        if wanted(Path(path).name):
            os.truncate(path, os.path.getsize(path) // 2)
            die()
    return save_half

if what == "solve":
    solve = collector.quantize_group
    collector.quantize_group = (
        lambda layers, *rest: die() if layers[0].block == int(number) else solve(layers, *rest)
    )
elif what == "write":
    work.save_file = half(work.save_file, lambda name: name.startswith(f"{int(number):04d}."))
elif what == "export":
    shards.save_file = half(shards.save_file, lambda name: True)
else:
    rename, left = os.replace, [int(number)]

    def counted(*paths):
        left[0] -= 1
        if what == "rename" and left[0] == 0:
            die()
        rename(*paths)
        if what == "renamed" and left[0] == 0:
            die()

    os.replace = counted
main()
"""


def killed(point: str, argv: list[str]) -> bool:
    """Whether a run with these arguments came to the point and was killed there."""
    command = [sys.executable, "-c", DIES, point, *argv]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scalings, caches and feedback: everything that a block leaves in the work folder."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(
        "scheme: w4a16-g64\n"
        "algorithm: [{awq: {grid: 2}}, {gptq: {feedback: 1.0}}]\n"
        "kv_cache: fp8\n"
        "keep: [lm_head]\n"
        "calibrate: {samples: 4, seq_len: 64}\n"
    )
    return path


@pytest.fixture(scope="module")
def undisturbed(
    tiny: Path, traffic: Path, recipe_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The files of a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run(arguments(tiny, recipe_file, traffic, out)) == 0
    return contents(out)


def test_killed_again_and_again(
    tiny: Path, traffic: Path, recipe_file: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """While it solves, while it writes a block's file, and while it exports."""
    out = tmp_path / "out"
    argv = arguments(tiny, recipe_file, traffic, out)
    blocks = tmp_path / "out.partial" / "blocks"
    assert killed("solve 1", argv)
    assert (blocks / "0000.json").exists()
    assert killed("write 1", [*argv, "--resume"])
    assert (blocks / "0001.safetensors.tmp").exists()
    assert not (blocks / "0001.safetensors").exists()
    assert killed("export", [*argv, "--resume"])
    assert (tmp_path / "out.staging" / "model-00001.safetensors").exists()
    assert not out.exists()
    assert run([*argv, "--resume"]) == 0
    assert contents(out) == undisturbed
    assert sorted(leftovers(out)) == ["out", "out.run"]
    assert not (tmp_path / "out.partial").exists()


def test_a_block_that_a_power_cut_damaged_is_solved_again(
    tiny: Path,
    traffic: Path,
    recipe_file: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its JSON says that it is finished, and its tensors are not the ones that were written."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    argv = arguments(tiny, recipe_file, traffic, out)
    with monkeypatch.context() as patch:
        patch.setattr("quantkit.checkpoint.shards.save_file", interrupted)
        assert run(argv) == 130
    file = tmp_path / "out.partial" / "blocks" / "0000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert run([*argv, "--resume"]) == 0
    assert contents(out) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("side", ["rename", "renamed"])
def test_killed_beside_every_rename(
    side: str,
    tiny: Path,
    traffic: Path,
    recipe_file: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
) -> None:
    """Every file of a run gets its name by a rename: these are all of its states on disk."""
    points = 0
    while killed(f"{side} {points + 1}", argv := _fresh(tiny, recipe_file, traffic, tmp_path)):
        points += 1
        out = Path(argv[argv.index("-o") + 1])
        assert not out.exists() or contents(out) == undisturbed
        assert run([*argv, "--resume"]) == 0
        assert contents(out) == undisturbed
        assert sorted(leftovers(out)) == ["out", "out.run"]
        assert contents(out.with_name("out.run")).keys() == {"run.json"}
    # State, scalings, caches, tensors and JSON of two blocks, manifest, promotion, run.json.
    assert points >= 12


@pytest.mark.slow
@pytest.mark.parametrize("point", ["solve 0", "solve 1", "write 0", "write 1", "export"])
def test_killed_once(
    point: str,
    tiny: Path,
    traffic: Path,
    recipe_file: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
) -> None:
    argv = _fresh(tiny, recipe_file, traffic, tmp_path)
    assert killed(point, argv)
    assert run([*argv, "--resume"]) == 0
    assert contents(Path(argv[argv.index("-o") + 1])) == undisturbed


def _fresh(model: Path, recipe: Path, data: Path, folder: Path) -> list[str]:
    """Arguments of a run into a folder of its own."""
    place = folder / str(len(list(folder.iterdir())))
    place.mkdir()
    return arguments(model, recipe, data, place / "out")
