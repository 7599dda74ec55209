"""``quantkit eval``: which options mean something beside which others."""

from __future__ import annotations

import typer

from quantkit.cli import engine as engines
from quantkit.cli.options import refuse
from quantkit.errors import UsageError

#: What scores, and ``--plan`` does not.
SCORING = (
    *("text", "reference", "output", "seq_len", "max_tokens", "canary", "noise_floor"),
    *("stop_early", "endpoint", "engine"),
)

#: What says how CKPT is loaded and asked here.
LOADING = (
    *("kernels", "kv_cache_dtype", "device", "threads", "key"),
    *("allow_code", "judge", "judge_model", "judge_key"),
)

#: What names a server that is there.
SERVER = ("endpoint_model", "endpoint_key_file")

#: How a server is asked, one that is there or one that is started.
ASKING = ("endpoint_timeout", "concurrency")


def check_options(
    context: typer.Context, *, plan: bool, checkpoint: str | None, endpoint: str | None
) -> None:
    """Refuse options that would be ignored beside the others.

    Args:
        context: of the running command.
        plan: ``--plan``.
        checkpoint: CKPT.
        endpoint: ``--endpoint``.

    Raises:
        UsageError: naming the option.
    """
    started = context.params["engine"] is not engines.Engine.quantkit
    if plan:
        unused = (*SCORING, *SERVER, *ASKING, *engines.OPTIONS)
        refuse(context, unused, "--plan scores nothing", "leave it out, or drop --plan")
        if checkpoint is None:
            reason = "--plan without a CKPT runs no model"
            refuse(context, LOADING, reason, "give a CKPT to be timed, or leave it out")
        return
    refuse(context, ("flip_rate",), "is what --plan plans for", "add --plan, or leave it out")
    if not started:
        engines.check_unused(context)
    if endpoint is None:
        reason = "there is no --endpoint that it is about"
        refuse(context, SERVER, reason, "add --endpoint URL, or leave it out")
        if not started:
            reason = "CKPT is loaded here, and no server asked"
            refuse(context, ASKING, reason, "add --endpoint or --engine, or leave it out")
        return
    if started:
        raise UsageError(f"--endpoint and --engine {context.params['engine']}",
                         remedy="give one of them")  # fmt: skip
    reason = "checks files that are loaded here, and a server has loaded its own"
    refuse(context, ("key",), reason, "serve them with `quantkit serve --key`")


def check_listing(context: typer.Context) -> None:
    """Refuse what ``--list`` or ``--validate`` would ignore.

    Raises:
        UsageError: naming the option.
    """
    flag = "list_names" if context.params["list_names"] else "validate"
    read = (flag, "suite", "as_json")
    unread = [p.name for p in context.command.params if p.name is not None and p.name not in read]
    what = "--list prints names" if flag == "list_names" else "--validate checks suites"
    refuse(context, unread, f"{what} and nothing else", "leave one or the other out")
