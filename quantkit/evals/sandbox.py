"""Running a model's Python against tests, in a limited process of its own.

An answer, then the item's ``target`` (assertions), are one program; it scores 1 when it ends
with 0. What is limited: CPU seconds and wall time, address space, file sizes, open files,
processes, an empty environment, an empty working folder, no site packages, no core dumps. On
Linux the program also gets an empty network namespace where the kernel lets users make one;
`network_is_cut` says whether it does here.

What is not guaranteed: this is no security boundary. The program runs as the same user and can
read that user's files, and where namespaces are not allowed it can use the network. Run
untrusted models in a container or a virtual machine that you can throw away.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.evals.scorers import Scorer

DEFAULT_TIMEOUT = 5.0
DEFAULT_MEMORY_MB = 512

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PROCESSES = 16
_FILE_BYTES = 16 << 20

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def code_scorer(options: Mapping[str, Any]) -> Scorer:
    """A scorer that runs ``answer`` and then ``target``.

    Args:
        options: ``timeout`` in seconds of wall and of CPU time, ``memory_mb``.
    """
    timeout = float(options.get("timeout", DEFAULT_TIMEOUT))
    memory = int(options.get("memory_mb", DEFAULT_MEMORY_MB)) << 20

    def score(answer: str, target: str, row: Mapping[str, Any]) -> float:
        return float(run_program(f"{answer}\n{target}\n", timeout=timeout, memory=memory) == 0)

    return score


def run_program(program: str, *, timeout: float, memory: int) -> int | None:
    """Run Python source; its exit code, or None when it was killed for time.

    Args:
        program: the source.
        timeout: seconds, of wall time and (rounded up) of CPU time.
        memory: bytes of address space.

    Where this process has a lower hard limit of its own (``ulimit -H``), that one holds.

    Raises:
        QuantkitError: the program cannot be started, which says nothing of the program.
    """
    try:
        return _run(program, timeout, memory)
    except (OSError, subprocess.SubprocessError) as e:
        raise QuantkitError(
            f"a written program cannot be run here ({e})",
            remedy="see free disk space, memory and processes, and `ulimit -Ha`",
        ) from e


def _run(program: str, timeout: float, memory: int) -> int | None:
    def limit() -> None:
        _lower(resource.RLIMIT_CPU, max(1, math.ceil(timeout)))
        _lower(resource.RLIMIT_AS, memory)
        _lower(resource.RLIMIT_FSIZE, _FILE_BYTES)
        _lower(resource.RLIMIT_NOFILE, 64)
        _lower(resource.RLIMIT_CORE, 0)
        _cut_network()
        # Counted for the user as a whole, so only what lies below the user's own limit helps.
        _lower(resource.RLIMIT_NPROC, _PROCESSES)

    # What a program leaves running may still write while the folder is removed.
    temporary = tempfile.TemporaryDirectory(prefix="quantkit-code-", ignore_cleanup_errors=True)
    with temporary as folder:
        source = Path(folder) / "program.py"
        source.write_text(program, encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(source)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
            preexec_fn=limit,
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # The program's children share its session and would outlive it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _lower(what: int, wanted: int) -> None:
    """Set a limit of this process; no process may raise one above its hard limit."""
    hard = resource.getrlimit(what)[1]
    value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(what, (value, value))


def _cut_network() -> bool:
    """Move this process into an empty network namespace; False where that is not allowed."""
    return _libc is not None and _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0


def network_is_cut() -> bool:
    """Whether programs run here have no network, tried in a child process."""
    if _libc is None:
        return False
    child = os.fork()
    if child == 0:
        os._exit(0 if _cut_network() else 1)
    return os.waitpid(child, 0)[1] == 0
