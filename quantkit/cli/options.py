"""Options that would be ignored, and numbers that are none: refused."""

from __future__ import annotations

import math
from collections.abc import Collection

import typer

from quantkit.errors import UsageError


def refuse(context: typer.Context, names: Collection[str], reason: str, remedy: str) -> None:
    """Refuse parameters that stand on the command line, so that nobody believes they held.

    Args:
        context: of the running command.
        names: its parameters, as Python spells them.
        reason: why they would do nothing here.
        remedy: what to do instead.

    Raises:
        UsageError: naming the first of them.
    """
    for parameter in context.command.params:
        name = parameter.name
        if name is None or name not in names:
            continue
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = parameter.param_type_name == "option"
            shown = parameter.opts[0] if option else (parameter.metavar or name).strip("[]")
            raise UsageError(f"{shown}: {reason}", remedy=remedy)


def check_finite(context: typer.Context) -> None:
    """Refuse ``inf`` and ``nan``, which pass for numbers and for most bounds.

    Args:
        context: of the running command.

    Raises:
        UsageError: naming the first option with such a value.
    """
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{parameter.opts[0]} {value}: must be a finite number")
