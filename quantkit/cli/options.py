"""Options that would be ignored: refused, so that nobody believes they held."""

from __future__ import annotations

from collections.abc import Collection

import typer

from quantkit.errors import UsageError


def refuse(context: typer.Context, names: Collection[str], reason: str, remedy: str) -> None:
    """Refuse parameters that stand on the command line, whatever their value is.

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
