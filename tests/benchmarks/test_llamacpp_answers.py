"""How llama.cpp is asked, without it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.llamacpp_answers import ask, refusal
from benchmarks.llamacpp_build import version_of
from quantkit.errors import QuantkitError


def test_a_refusal_is_told_in_one_line() -> None:
    assert refusal("exporting x\nerror: no such\nscheme; try another\n") == (
        "no such scheme; try another"
    )
    assert refusal("llamacpp_answers: cannot load the model\n").endswith("cannot load the model")
    assert refusal("") == "no message"


def test_a_failure_is_an_error() -> None:
    assert ask([sys.executable, "-c", "print(7)"]) == "7\n"
    with pytest.raises(QuantkitError, match=r"^no room$"):
        ask([sys.executable, "-c", "raise SystemExit('error: no room')"])


def test_a_build_without_its_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"build llama\.cpp there"):
        version_of(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/libllama.so.0.5.0").touch()
    (tmp_path / "bin/libllama.so").symlink_to("libllama.so.0.5.0")
    assert version_of(tmp_path) == "0.5.0"
