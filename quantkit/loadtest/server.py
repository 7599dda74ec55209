"""quantkit's own server as a child process, for a load test that starts what it measures."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

from quantkit.engines.process import EngineProcess, free_port, start
from quantkit.errors import QuantkitError


@contextlib.contextmanager
def serving(
    checkpoint: str, arguments: Sequence[str] = (), *, timeout: float = 900.0
) -> Iterator[EngineProcess]:
    """``quantkit serve``, ready; it has ended when the block is left.

    Args:
        checkpoint: what to serve.
        arguments: more of its options.
        timeout: seconds until it must be ready.

    Raises:
        QuantkitError: it was not ready in time; or it ended, ahead of that or so that the block
            failed with a `QuantkitError`. With the end of its log.
    """
    port = free_port()
    command = [sys.executable, "-m", "quantkit.cli.main", "serve", checkpoint]
    command += ["--port", str(port), *arguments]
    with start(command, f"http://127.0.0.1:{port}") as process:
        process.wait_ready(timeout)
        try:
            yield process
        except QuantkitError as error:
            if process.popen.poll() is None:
                raise
            raise process.failed("ended while it was measured") from error
