"""The one shape of progress that long work reports, so that it needs no terminal."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

#: Called as ``progress(done, total, label)``; ``done`` never decreases within one piece of work.
Progress = Callable[[int, int, str], None]

#: A phase's title → where its progress goes for as long as it lasts.
Reporter = Callable[[str], AbstractContextManager[Progress]]


def silent(done: int, total: int, label: str) -> None:
    """A `Progress` that says nothing."""


def silent_reporter(title: str) -> AbstractContextManager[Progress]:
    """A `Reporter` that says nothing."""
    return nullcontext(silent)


@dataclass
class Steps:
    """How far a piece of work is that reports one step at a time.

    Attributes:
        total: steps that are expected; more are not reported as more.
        report: told of each.
        done: steps so far.
    """

    total: int
    report: Progress = silent
    done: int = 0

    def advance(self, label: str) -> None:
        """Report that one more is done."""
        self.done += 1
        self.report(min(self.done, self.total), self.total, label)
