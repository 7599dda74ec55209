"""A baseline that a run is given: may it stand in for scoring the original once more?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from quantkit.errors import NotComparableError
from quantkit.evals.divergence import hash_windows
from quantkit.evals.suite import Suite
from quantkit.gate.policy import LimitGate, Policy
from quantkit.results import COMPARABLE_KEYS, Results, TextResult

_AGAIN = "score the original on the same files with `quantkit eval`, or leave --baseline out"


def check_baseline(
    baseline: Results,
    path: Path,
    policy: Policy,
    *,
    fingerprint: Mapping[str, object],
    suites: Sequence[Suite],
    windows: Tensor | None,
) -> None:
    """Hold a baseline against what the run is about to score.

    The gate compares both results once more when there are two; this only needs one, and so
    comes before the work.

    Args:
        baseline: as read from ``path``.
        path: for messages.
        policy: only what it gates must agree.
        fingerprint: ``model`` of the original, and `COMPARABLE_KEYS`.
        suites: that the run scores; every gated one is among them.
        windows: token ids int64 ``[windows, seq_len]`` of the held-out text, if there is any.

    Raises:
        NotComparableError: naming the first value that differs.
    """
    for key in ("model", *COMPARABLE_KEYS):
        _compare(path, key, fingerprint.get(key), baseline.fingerprint.get(key))
    by_name = {suite.name: suite for suite in suites}
    for gate in policy.tasks:
        suite, scored = by_name[gate.task], baseline.tasks.get(gate.task)
        if scored is None:
            raise NotComparableError(f"{path}: has no suite {gate.task}", remedy=_AGAIN)
        _compare(path, f"suite {suite.name}", suite.hash, scored.hash)
        _compare(path, f"metric of {suite.name}", suite.score_name, scored.metric)
        wanted = {suite.item_id(i) for i in range(suite.n)}
        differing = sorted(wanted ^ {row.id for row in scored.rows})
        if differing:
            raise NotComparableError(
                f"{path}: items of {suite.name} differ: {scored.n} of {suite.n} were scored "
                f"({differing[0]!r} is on one side only)",
                remedy=_AGAIN,
            )
    text_gates = {g.name for g in policy.gates if isinstance(g, LimitGate) and g.needs_text}
    if text_gates and windows is not None:
        _compare_text(path, windows, baseline.text, needed="perplexity.ratio" in text_gates)


def _compare_text(path: Path, windows: Tensor, scored: TextResult | None, *, needed: bool) -> None:
    if scored is None:
        # Divergence is measured against the original itself, not against its results.
        if needed:
            raise NotComparableError(
                f"{path}: has no held-out text for perplexity.ratio", remedy=_AGAIN
            )
        return
    count, seq_len = windows.shape
    _compare(path, "seq_len of the held-out text", seq_len, scored.seq_len)
    _compare(path, "number of windows of held-out text", count, len(scored.windows))
    _compare(path, "held-out text", hash_windows(windows), scored.hash)


def _compare(path: Path, what: str, ours: object, theirs: object) -> None:
    if ours != theirs:
        run, given = ("absent" if value is None else f"{value!s:.12}" for value in (ours, theirs))
        raise NotComparableError(
            f"{path}: {what} differs: this run has {run}, the baseline {given}", remedy=_AGAIN
        )
