"""The ``quantkit`` command: every subcommand, and the one place where errors become exit codes.

0 pass · 1 measured regression · 2 usage or configuration · 3 inconclusive · 4 runtime ·
5 not comparable · 130 interrupted
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from quantkit import __version__, errors
from quantkit.cli import (
    baseline,
    bench,
    calibrate,
    deploy,
    doctor,
    eval,
    explain,
    export,
    gate,
    inspect,
    report,
    serve,
    sign,
    verify,
)

app = typer.Typer(
    name="quantkit",
    help="Make a language model cheaper, and prove that it still does its job.",
    epilog="Exit codes: 0 pass, 1 regression, 2 usage, 3 inconclusive, 4 runtime, "
    "5 not comparable, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("calibrate")(calibrate.command)
app.command("eval")(eval.command)
app.command("gate")(gate.command)
app.command("explain")(explain.command)
app.add_typer(baseline.app, name="baseline")
app.command("serve")(serve.command)
app.command("deploy")(deploy.command)
app.add_typer(bench.app, name="bench")
app.command("inspect")(inspect.command)
app.command("verify")(verify.command)
app.command("export")(export.command)
app.command("sign")(sign.command)
app.command("report")(report.command)
app.command("doctor")(doctor.command)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"quantkit {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Make a language model cheaper, and prove that it still does its job."""


def main() -> None:
    """Run the command line; ends the process with a documented exit code."""
    for stream in (sys.stdout, sys.stderr):
        # Reasons hold signs such as ≥, which an ASCII terminal must not die of.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sys.exit(run())


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    with _interrupts() as seen:
        try:
            code = app(arguments, standalone_mode=False)
            return _ended(code) if isinstance(code, int) else errors.EXIT_PASS
        except typer.Exit as e:
            return _ended(e.exit_code)
        except (KeyboardInterrupt, typer.Abort):
            return _ended(errors.EXIT_INTERRUPTED)
        except Exception as e:
            # C++ code on the stack turns a KeyboardInterrupt into an error of its own.
            return _ended(errors.EXIT_INTERRUPTED) if seen else _failed(e)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """While active, lists every Ctrl-C, which raises KeyboardInterrupt as always.

    A process that ignores the signal, or handles it in its own way, goes on doing so.
    """
    seen: list[int] = []

    def notice(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    alone = threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield seen
        return
    signal.signal(signal.SIGINT, notice)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _failed(error: Exception) -> int:
    """Print an error; returns its exit code."""
    if isinstance(error, errors.QuantkitError):
        typer.echo(f"error: {error}", err=True)
        return error.exit_code
    if isinstance(error, MemoryError):
        typer.echo("error: out of memory; use a smaller model, batch or context", err=True)
        return errors.EXIT_RUNTIME
    if isinstance(error, BrokenPipeError):
        return errors.EXIT_RUNTIME
    # The parser's own errors: their classes are typer's or click's, by version.
    if hasattr(error, "show") and hasattr(error, "exit_code"):
        error.show()
        return errors.EXIT_USAGE
    return _unexpected(error)


def _ended(code: int) -> int:
    # Typer turns Ctrl-C into this code without a word.
    if code == errors.EXIT_INTERRUPTED:
        typer.echo("interrupted", err=True)
    return code


def _unexpected(error: Exception) -> int:
    import traceback

    if type(error).__name__ == "OutOfMemoryError":
        typer.echo(f"error: out of memory ({error})", err=True)
        return errors.EXIT_RUNTIME
    traceback.print_exception(error)
    typer.echo(
        f"error: {type(error).__name__}: {error}; this is a defect in quantkit, please report it",
        err=True,
    )
    return errors.EXIT_RUNTIME


if __name__ == "__main__":
    main()
