"""The ``quantkit`` command: every subcommand, and the one place where errors become exit codes.

0 pass · 1 measured regression · 2 usage or configuration · 3 inconclusive · 4 runtime ·
5 not comparable · 130 interrupted
"""

from __future__ import annotations

import sys

import typer

from quantkit import __version__, errors
from quantkit.cli import (
    baseline,
    bench,
    calibrate,
    doctor,
    eval,
    gate,
    inspect,
    report,
    serve,
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
app.add_typer(baseline.app, name="baseline")
app.command("serve")(serve.command)
app.add_typer(bench.app, name="bench")
app.command("inspect")(inspect.command)
app.command("verify")(verify.command)
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
    try:
        code = app(arguments, standalone_mode=False)
        return _ended(code) if isinstance(code, int) else errors.EXIT_PASS
    except errors.QuantkitError as e:
        typer.echo(f"error: {e}", err=True)
        return e.exit_code
    except typer.Exit as e:
        return _ended(e.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _ended(errors.EXIT_INTERRUPTED)
    except MemoryError:
        typer.echo("error: out of memory; use a smaller model, batch or context", err=True)
        return errors.EXIT_RUNTIME
    except BrokenPipeError:
        return errors.EXIT_RUNTIME
    except Exception as e:
        # The parser's own errors: their classes are typer's or click's, by version.
        if hasattr(e, "show") and hasattr(e, "exit_code"):
            e.show()
            return errors.EXIT_USAGE
        return _unexpected(e)


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
