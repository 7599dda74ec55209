"""An engine as a child process: started, waited for with a bound, always stopped.

The child is the head of its own process group, so that a signal reaches the workers that it
starts and Ctrl-C in a terminal reaches it only through us. The last lines that it printed are part
of every error: the reason why an engine did not start stands nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import IO

import httpx

from quantkit.errors import (
    EXIT_INTERRUPTED,
    EXIT_PASS,
    EXIT_RUNTIME,
    QuantkitError,
    UsageError,
)

#: Lines of the log that an error shows.
TAIL_LINES = 25

#: How long a stopped engine may finish what it does before it is killed.
STOP_SECONDS = 30.0

#: Bytes of a line that are kept.
LINE_BYTES = 4096

POLL_SECONDS = 0.2

#: Takes each line that an engine prints.
Echo = Callable[[str], None]


class EngineProcess:
    """A running engine; made by `start`.

    Attributes:
        url: where it listens.
    """

    def __init__(self, popen: subprocess.Popen[bytes], url: str, echo: Echo | None) -> None:
        self.popen = popen
        self.url = url
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)
        self._reader = threading.Thread(target=self._read, args=(popen.stdout, echo), daemon=True)
        self._reader.start()

    def wait_ready(self, seconds: float, *, headers: Mapping[str, str] | None = None) -> None:
        """Return when ``/health`` answers.

        Raises:
            QuantkitError: the process ended, or was not ready in time; with its log's tail.
        """
        deadline = time.monotonic() + seconds
        with httpx.Client(trust_env=False, timeout=5, headers=headers) as client:
            while True:
                code = self.popen.poll()
                if code is not None:
                    raise self.failed(f"ended with {_ending(code)} before it was ready")
                with contextlib.suppress(httpx.HTTPError):
                    if client.get(self.url + "/health").status_code == 200:
                        return
                if time.monotonic() > deadline:
                    raise self.failed(
                        f"was not ready after {seconds:g} s", remedy="raise --engine-timeout"
                    )
                time.sleep(POLL_SECONDS)

    def failed(self, what: str, remedy: str | None = None) -> QuantkitError:
        """An error that shows the end of the log."""
        return QuantkitError(f"the engine {what}; its log ends:\n{self.tail()}", remedy=remedy)

    def tail(self) -> str:
        """The last lines that it printed, indented."""
        if self.popen.poll() is not None:
            self._reader.join(2)  # a worker may hold the pipe open for longer
        return "\n".join(f"  {line}" for line in list(self._lines)) or "  (nothing)"

    def signal(self, number: int) -> None:
        """Send a signal to the engine and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """End the engine: asked first, killed after ``seconds``. Workers never outlive it."""
        try:
            if self.popen.poll() is None:
                self.signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.popen.wait(seconds)
        finally:  # a second Ctrl-C ends the waiting, not the killing
            self.signal(signal.SIGKILL)
            self.popen.wait()
            self._reader.join(2)
            if self.popen.stdout is not None and not self._reader.is_alive():
                self.popen.stdout.close()

    def supervise(self, drain_seconds: float, on_ready: Callable[[], None] = lambda: None) -> int:
        """Pass signals on until the engine ends; returns the exit code of `quantkit serve`.

        0 after a signal that it obeyed, 4 if it outlasted the drain, 130 after a second signal.

        Args:
            drain_seconds: how long it may go on after a signal.
            on_ready: called as soon as signals are passed on.

        Raises:
            QuantkitError: it ended by itself; with the end of its log.
        """
        asked: list[float] = []

        def forward(number: int, frame: FrameType | None) -> None:
            asked.append(time.monotonic())
            self.signal(signal.SIGKILL if len(asked) > 1 else number)

        with _handling(forward, signal.SIGINT, signal.SIGTERM):
            on_ready()
            while self.popen.poll() is None:
                if asked and time.monotonic() > asked[0] + drain_seconds:
                    self.stop(0)
                    return EXIT_INTERRUPTED if len(asked) > 1 else EXIT_RUNTIME
                time.sleep(POLL_SECONDS)
        if not asked:
            raise self.failed(f"ended with {_ending(self.popen.returncode)}")
        return EXIT_INTERRUPTED if len(asked) > 1 else EXIT_PASS

    def _read(self, pipe: IO[bytes], echo: Echo | None) -> None:
        while raw := pipe.readline(LINE_BYTES):
            if line := raw.decode("utf-8", "replace").rstrip():
                self._lines.append(line)
                if echo is None:
                    continue
                try:
                    echo(line)
                except (OSError, ValueError):
                    echo = None  # nobody hears it any more; a pipe left unread stops the engine


@contextlib.contextmanager
def start(
    command: Sequence[str],
    url: str,
    *,
    environment: Mapping[str, str] | None = None,
    echo: Echo | None = None,
) -> Iterator[EngineProcess]:
    """Start an engine; it has ended when the block is left, by SIGTERM too.

    Args:
        command: program and arguments.
        url: where it will listen.
        environment: of the child; this process's own when None.
        echo: told each line that it prints.

    Raises:
        UsageError: there is no such program.
    """
    with _handling(_interrupt, signal.SIGTERM):
        try:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=None if environment is None else dict(environment),
                start_new_session=True,
            )
        except OSError as e:
            raise UsageError(f"{command[0]}: cannot be started ({e.strerror or e})") from e
        process = EngineProcess(popen, url, echo)
        try:
            yield process
        finally:
            process.stop()


def free_port(host: str = "127.0.0.1", port: int = 0) -> int:
    """A port that nobody listens on. The engine that gets it binds it a moment later.

    Args:
        host: to listen on.
        port: the one that is wanted; 0 takes any.

    Raises:
        UsageError: the port is taken, or the host is none of this machine's.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        # As servers do: connections of an earlier one that linger are no reason to refuse.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except (OSError, UnicodeError) as e:  # a name of no host may not even be encoded
            reason = getattr(e, "strerror", None) or e
            raise UsageError(
                f"cannot listen on {host}:{port}: {reason}",
                remedy="choose another --port, or 0 for a free one",
            ) from e
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def _handling(
    handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals
) -> Iterator[None]:
    """Handle signals; outside the main thread Python allows none, and nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
