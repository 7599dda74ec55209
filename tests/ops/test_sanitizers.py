"""Every CPU entry point under AddressSanitizer and UBSan, against naive loops (csrc/tests)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a build of every kernel, with sanitizers
def test_kernels_under_sanitizers(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    if cmake is None or shutil.which("ninja", path=path) is None:
        pytest.skip("cmake and ninja are not installed")

    def run(*command: str) -> str:
        environment = os.environ | {"PATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
        return done.stdout

    options = {
        "Python_EXECUTABLE": sys.executable,
        "QUANTKIT_TESTS": "ON",
        "QUANTKIT_CUDA": "OFF",
        "QUANTKIT_SANITIZE": "ON",
    }
    flags = [f"-D{name}={value}" for name, value in options.items()]
    run(cmake, "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", *flags)
    jobs = str(os.cpu_count() or 1)
    run(cmake, "--build", str(tmp_path), "-j", jobs, "--target", "kernels_test")
    output = run(str(tmp_path / "csrc" / "tests" / "kernels_test"))
    assert "generic: 0 failures" in output
