"""``quantkit eval --allow-code`` and ``--judge``: scorers that a suite may not turn on itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from quantkit.evals.scorers import Factory
    from quantkit.evals.suite import Suite


def allowed_scorers(
    suites: Sequence[Suite],
    allow_code: bool,
    judge: str | None,
    judge_model: str | None,
    judge_key: Path | None,
) -> dict[str, Factory]:
    """The scorers that were allowed, checked against what the suites need.

    Raises:
        UsageError: a suite needs one that was not allowed, or the judge is half named.
    """
    from quantkit.errors import UsageError
    from quantkit.evals.scorers import make_scorer

    allowed: dict[str, Factory] = {}
    if allow_code:
        from quantkit.evals.sandbox import code_scorer, network_is_cut

        allowed["code"] = code_scorer
        if not network_is_cut():
            typer.echo("--allow-code: programs here can use the network", err=True)
    if (judge is None) != (judge_model is None) or (judge_key is not None and judge is None):
        raise UsageError("a judge has an address and a name", remedy="give --judge, --judge-model")
    if judge is not None and judge_model is not None:
        from quantkit.evals.endpoint import read_key
        from quantkit.evals.judge import Judge

        key = None if judge_key is None else read_key(judge_key)
        allowed["judge"] = Judge(judge, judge_model, key=key).scorer
    for suite in suites:
        if suite.scoring is not None:
            make_scorer(suite.scoring, allowed)  # refuses what was not allowed, before a model
    return allowed
