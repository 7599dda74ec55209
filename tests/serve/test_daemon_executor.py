"""One thing after the other, and none of them outlives the process."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from quantkit.serve.daemon_executor import DaemonExecutor

HANGS = """
import threading
from quantkit.serve.daemon_executor import DaemonExecutor

begun = threading.Event()
DaemonExecutor("hung").submit(lambda: (begun.set(), threading.Event().wait()))
assert begun.wait(60)
"""


def test_work_that_hangs_does_not_keep_the_process_alive() -> None:
    subprocess.run([sys.executable, "-c", HANGS], check=True, timeout=120)


def test_work_is_done_in_order_by_one_thread_at_a_time() -> None:
    executor, done, go_on = DaemonExecutor("quantkit-test"), [], threading.Event()

    def work(i: int) -> int:
        assert go_on.wait(20)
        done.append((i, threading.current_thread().name))
        return i * i

    futures = [executor.submit(lambda i=i: work(i)) for i in range(9)]
    assert futures[5].cancel()
    go_on.set()
    assert [future.result(20) for future in futures[:5]] == [0, 1, 4, 9, 16]
    assert futures[8].result(20) == 64
    assert done == [(i, "quantkit-test") for i in range(9) if i != 5]
    # Its thread has perhaps ended by now: another one takes over.
    assert executor.submit(lambda: work(9)).result(20) == 81


def test_what_fails_says_so_and_the_next_goes_on() -> None:
    def broken() -> None:
        raise RuntimeError("it cannot be done")

    executor = DaemonExecutor("quantkit-test")
    first, second = executor.submit(broken), executor.submit(lambda: 2)
    with pytest.raises(RuntimeError, match="it cannot be done"):
        first.result(20)
    assert second.result(20) == 2
