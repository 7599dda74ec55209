"""Progress on stderr: a bar with ETA on a terminal, plain lines when it is not one."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from quantkit.progress import Progress

#: Seconds between two plain lines.
PLAIN_INTERVAL = 10.0

#: Seconds of the past that tell how fast the rest will go: steps of one phase cost what those of
#: another do not.
SPEED_PERIOD = 60.0


@contextmanager
def reporter(title: str) -> Iterator[Progress]:
    """While active, the returned callable draws ``progress(done, total, label)``."""
    if sys.stderr.isatty():
        with _bar(title) as progress:
            yield progress
    else:
        yield _lines(title)


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        Remaining(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)

        def progress(done: int, total: int, label: str) -> None:
            text = f"{title} · {label}" if label else title
            bar.update(task, completed=done, total=total, description=text)

        yield progress


def _lines(title: str) -> Progress:
    began = last = time.monotonic()
    told: deque[tuple[float, int]] = deque([(began, 0)])

    def progress(done: int, total: int, label: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < PLAIN_INTERVAL:
            return
        last = now
        while len(told) > 1 and now - told[1][0] >= SPEED_PERIOD:
            told.popleft()
        then, before = told[0]
        told.append((now, done))
        speed = (done - before) / (now - then) if now > then else 0.0
        left = (
            f"about {(total - done) / speed:.0f} s left" if speed else "nobody knows how long yet"
        )
        if done >= total:
            left = "done"
        sys.stderr.write(f"{title}: {done}/{total} {label} · {now - began:.0f} s, {left}\n")
        sys.stderr.flush()

    return progress
