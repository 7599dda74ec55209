"""User-facing errors and the exit codes they end with.

Hierarchy::

    QuantkitError                  4  runtime: load, out of memory, NaN, missing row
    ├── UsageError                 2  a wrong argument, recipe, data file or policy
    ├── RegressionError            1  a gate measured a regression
    ├── InconclusiveError          3  the evidence decides neither way
    ├── NotComparableError         5  two results describe different experiments
    └── KernelMissingError         4  a native kernel is not built

Each message gives the value, the rule it broke and, where there is one, the remedy:
``down_proj: in_features 11008 is not divisible by group 96; try 32, 64 or 128``.
"""

from __future__ import annotations

EXIT_PASS = 0
EXIT_REGRESSION = 1
EXIT_USAGE = 2
EXIT_INCONCLUSIVE = 3
EXIT_RUNTIME = 4
EXIT_NOT_COMPARABLE = 5
EXIT_INTERRUPTED = 130


class QuantkitError(Exception):
    """A failure that a user can read and act on.

    Args:
        message: the value and the rule it broke.
        remedy: what to do about it, printed after a semicolon.
    """

    exit_code = EXIT_RUNTIME

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(f"{message}; {remedy}" if remedy else message)


class UsageError(QuantkitError):
    """A wrong argument, recipe, data file or policy."""

    exit_code = EXIT_USAGE


class RegressionError(QuantkitError):
    """A gate measured a regression."""

    exit_code = EXIT_REGRESSION


class InconclusiveError(QuantkitError):
    """The evidence decides neither way."""

    exit_code = EXIT_INCONCLUSIVE


class NotComparableError(QuantkitError):
    """Two results describe different experiments."""

    exit_code = EXIT_NOT_COMPARABLE


class KernelMissingError(QuantkitError):
    """A native kernel is not built, or this machine cannot run it."""
