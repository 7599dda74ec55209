"""Work on a thread of its own that never keeps the process alive.

`concurrent.futures.ThreadPoolExecutor` joins its threads when the process ends, so work that hangs
in native code, where nothing can stop it, would hang the end as well.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class DaemonExecutor:
    """Runs one thing after the other, in order. Callable from any thread.

    Args:
        name: of the thread, which is there only while there is work.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._work: deque[Callable[[], None]] = deque()
        self._running = False

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run ``work`` behind all that was submitted before."""
        future: Future[T] = Future()
        with self._lock:
            if not self._running:
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
                self._running = True
            self._work.append(lambda: _settle(future, work))
        return future

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._work:
                    self._running = False
                    return
                work = self._work.popleft()
            work()


def _settle(future: Future[T], work: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
