"""`promote`, stopped between its two renames: by Ctrl-C, by the disk, by a kill."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from quantkit.checkpoint.write import promote, recover
from quantkit.errors import UsageError


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """(staging, out), each with a file that tells which it was."""
    pair = tmp_path / "out.staging", tmp_path / "out"
    for folder, word in zip(pair, ("new", "old"), strict=True):
        folder.mkdir()
        (folder / "word").write_text(word)
    return pair


def words(folder: Path) -> dict[str, str]:
    return {path.name: (path / "word").read_text() for path in folder.iterdir()}


def test_it_replaces_and_leaves_nothing_behind(folders: tuple[Path, Path], tmp_path: Path) -> None:
    promote(*folders)
    assert words(tmp_path) == {"out": "new"}


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.EACCES, os.strerror(errno.EACCES)), UsageError),
    ],
)
def test_the_old_folder_comes_back(
    error: BaseException,
    raised: type[BaseException],
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    staging, out = folders
    rename = os.replace

    def stop(source: Path, target: Path) -> None:
        if source == staging:
            assert not out.exists()
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(raised):
        promote(staging, out)
    assert words(tmp_path) == {"out": "old", "out.staging": "new"}


def promote_and_die(staging: Path, out: Path) -> None:
    """The process ends in place of the second rename, as if it had been killed."""
    rename = os.replace
    os.replace = lambda a, b: os._exit(9) if a == staging else rename(a, b)  # type: ignore[assignment]
    promote(staging, out)


@pytest.mark.parametrize("recovers", [True, False])
def test_a_kill_is_mended_by_the_next_call(
    recovers: bool, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    staging, out = folders
    # Forked, as it only renames folders: a fresh interpreter takes seconds to import torch.
    process = multiprocessing.get_context("fork").Process(target=promote_and_die, args=folders)
    process.start()
    process.join()
    assert process.exitcode == 9
    assert words(tmp_path) == {".out.old": "old", "out.staging": "new"}
    if recovers:
        recover(out)
        assert words(tmp_path) == {"out": "old", "out.staging": "new"}
    promote(staging, out)
    assert words(tmp_path) == {"out": "new"}


def test_a_kill_after_the_second_rename_leaves_the_new_folder(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    staging, out = folders
    out.rename(tmp_path / ".out.old")
    staging.rename(out)
    recover(out)
    assert words(tmp_path) == {"out": "new"}
