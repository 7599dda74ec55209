"""Whether two results describe the same experiment, and their rows side by side.

A difference between two scores means something only when everything but the model was the
same. Anything else is refused with exit code 5, and no missing item counts as wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from quantkit.errors import NotComparableError, QuantkitError, UsageError
from quantkit.gate.policy import LimitGate, Policy, TaskGate
from quantkit.results import COMPARABLE_KEYS, Flip, ItemRow, Results, TaskResult, TextResult

#: A row counts as right from this score on, so that graded metrics can flip too.
RIGHT = 0.5

_AGAIN = "score both with the same files and settings, with `quantkit eval`"


@dataclass(frozen=True)
class Pair:
    """One item as both models scored it."""

    baseline: ItemRow
    candidate: ItemRow

    @property
    def difference(self) -> float:
        return self.candidate.score - self.baseline.score

    @property
    def gain(self) -> bool:
        return self.baseline.score < RIGHT <= self.candidate.score

    @property
    def loss(self) -> bool:
        return self.candidate.score < RIGHT <= self.baseline.score

    @property
    def must_not_flip(self) -> bool:
        return self.baseline.must_not_flip or self.candidate.must_not_flip

    @property
    def cluster(self) -> str:
        """The shared passage, or the item itself. The prefix keeps the two kinds apart."""
        row = self.baseline
        return f"c:{row.cluster}" if row.cluster is not None else f"i:{row.id}"


def check_comparable(candidate: Results, baseline: Results, policy: Policy) -> None:
    """Refuse results that the policy cannot be applied to.

    Raises:
        NotComparableError: a fingerprint differs, or one side lacks what the policy names.
        UsageError: neither side has what the policy names.
    """
    for key in (*COMPARABLE_KEYS, "judge"):
        ours, theirs = candidate.fingerprint.get(key), baseline.fingerprint.get(key)
        if ours != theirs:
            raise NotComparableError(
                f"{key} differs: candidate {_short(ours)}, baseline {_short(theirs)}",
                remedy=_AGAIN,
            )
    _check_original(candidate, baseline)
    for gate in policy.gates:
        if isinstance(gate, TaskGate):
            _check_task_present(gate, candidate, baseline, policy.source)
        elif gate.needs_text:
            _check_text_present(gate, candidate, baseline, policy.source)


def _check_original(candidate: Results, baseline: Results) -> None:
    """A checkpoint knows the weights that it was made from: a baseline must be of those, or of
    another checkpoint made from them."""
    made_from = candidate.fingerprint.get("original")
    theirs = baseline.fingerprint.get("original", baseline.fingerprint.get("model"))
    if made_from is not None and made_from != theirs:
        raise NotComparableError(
            f"the baseline is stale: the candidate was made from weights {_short(made_from)}, "
            f"the baseline is of {_short(theirs)}",
            remedy="score the candidate's original with `quantkit eval`, and record that",
        )


def _short(value: object) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 20 else text[:12] + "…"


def _check_task_present(gate: TaskGate, candidate: Results, baseline: Results, source: str) -> None:
    ours, theirs = candidate.tasks.get(gate.task), baseline.tasks.get(gate.task)
    metrics = sorted({t.metric for t in (ours, theirs) if t is not None})
    if gate.metric not in metrics:
        known = sorted(
            f"{name}.{t.metric}" for name, t in {**baseline.tasks, **candidate.tasks}.items()
        )
        raise UsageError(
            f"{source}: {gate.name} is in neither of the results",
            remedy=f"they hold {', '.join(known)}" if known else "they hold no tasks",
        )
    for side, task in (("candidate", ours), ("baseline", theirs)):
        if task is None or task.metric != gate.metric:
            raise NotComparableError(f"the {side} has no {gate.name}", remedy=_AGAIN)


def _check_text_present(
    gate: LimitGate, candidate: Results, baseline: Results, source: str
) -> None:
    ours, theirs = candidate.text, baseline.text
    if ours is None and theirs is None:
        raise UsageError(
            f"{source}: {gate.name} needs held-out text and neither of the results has any",
            remedy="run `quantkit eval --text FILE`",
        )
    # KL and agreement were measured against the reference when the candidate was scored, so
    # only the perplexity ratio needs the baseline's own text.
    if ours is None or (theirs is None and gate.name == "perplexity.ratio"):
        side = "candidate" if ours is None else "baseline"
        raise NotComparableError(f"the {side} has no held-out text for {gate.name}", remedy=_AGAIN)
    if theirs is not None:
        paired_windows(ours, theirs)


def paired_rows(name: str, candidate: TaskResult, baseline: TaskResult) -> tuple[Pair, ...]:
    """The items of a task as both scored them, ordered by id.

    The order is the gate's own: floating-point sums and resamples may not depend on the
    order of a file. Of a candidate that could stop early only its items count.

    Raises:
        NotComparableError: task file, items or clusters differ.
        QuantkitError: there are no rows, or a score is not finite.
        UsageError: a score lies outside 0..1, where a margin in points means nothing.
    """
    if candidate.hash != baseline.hash:
        raise NotComparableError(
            f"task {name}: its file or data differ (candidate {_short(candidate.hash)}, "
            f"baseline {_short(baseline.hash)})",
            remedy=_AGAIN,
        )
    if baseline.early is not None:
        raise NotComparableError(
            f"task {name}: the baseline was scored with --stop-early, so its items are a choice",
            remedy="score the baseline without --stop-early",
        )
    ours, theirs = _by_id(name, candidate.rows), _by_id(name, baseline.rows)
    if candidate.early is not None:
        theirs = {key: row for key, row in theirs.items() if key in ours}
    if ours.keys() != theirs.keys():
        raise NotComparableError(
            f"task {name}: the items differ: {_listed(theirs.keys() - ours.keys())} only in the "
            f"baseline, {_listed(ours.keys() - theirs.keys())} only in the candidate",
            remedy="a missing item is not a wrong one; " + _AGAIN,
        )
    pairs = tuple(Pair(theirs[key], ours[key]) for key in sorted(ours))
    if not pairs:
        raise QuantkitError(f"task {name} has no rows", remedy="run `quantkit eval` again")
    for pair in pairs:
        if pair.baseline.hash != pair.candidate.hash:
            raise NotComparableError(
                f"task {name}: item {pair.baseline.id!r} has another content", remedy=_AGAIN
            )
        if pair.baseline.cluster != pair.candidate.cluster:
            raise NotComparableError(
                f"task {name}: item {pair.baseline.id!r} is in another cluster", remedy=_AGAIN
            )
    return pairs


def _by_id(name: str, rows: Iterable[ItemRow]) -> dict[str, ItemRow]:
    table: dict[str, ItemRow] = {}
    for row in rows:
        if row.id in table:
            raise QuantkitError(f"task {name} has item {row.id!r} twice")
        if not math.isfinite(row.score):
            raise QuantkitError(f"task {name}: item {row.id!r} has score {row.score}")
        if not 0 <= row.score <= 1:
            raise UsageError(
                f"task {name}: item {row.id!r} has score {row.score:g}, and a margin in points "
                "needs scores within 0..1",
                remedy="gate a metric such as acc or exact_match",
            )
        table[row.id] = row
    return table


def _listed(ids: Iterable[str]) -> str:
    names = sorted(ids)
    shown = ", ".join(repr(i) for i in names[:3])
    return f"{len(names)} ({shown}{', …' if len(names) > 3 else ''})" if names else "0"


def paired_windows(candidate: TextResult, baseline: TextResult) -> None:
    """Refuse texts whose windows cannot be paired.

    Raises:
        NotComparableError: text, window length or windows differ.
    """
    for what, ours, theirs in (
        ("held-out text", candidate.hash, baseline.hash),
        ("seq_len", candidate.seq_len, baseline.seq_len),
        ("number of windows", len(candidate.windows), len(baseline.windows)),
    ):
        if ours != theirs:
            raise NotComparableError(
                f"{what} differs: candidate {_short(ours)}, baseline {_short(theirs)}",
                remedy=_AGAIN,
            )
    for i, (a, b) in enumerate(zip(candidate.windows, baseline.windows, strict=True)):
        if a.tokens != b.tokens:
            raise NotComparableError(
                f"window {i} of the text has {a.tokens} tokens in the candidate and {b.tokens} "
                "in the baseline",
                remedy=_AGAIN,
            )


def flips(candidate: Results, baseline: Results, policy: Policy) -> tuple[Flip, ...]:
    """Every flipped item of the policy's tasks: losses first, then by id."""
    found = []
    for gate in policy.tasks:
        pairs = paired_rows(gate.task, candidate.tasks[gate.task], baseline.tasks[gate.task])
        for pair in sorted(pairs, key=lambda p: (not p.loss, p.baseline.id)):
            if pair.loss or pair.gain:
                found.append(_flip(gate.task, pair))
    return tuple(found)


def _flip(task: str, pair: Pair) -> Flip:
    base, quant = pair.baseline, pair.candidate
    return Flip(
        task=task,
        id=base.id,
        direction="loss" if pair.loss else "gain",
        slice=base.slice,
        prompt=base.prompt or quant.prompt,
        target=base.target or quant.target,
        baseline_prediction=base.prediction,
        candidate_prediction=quant.prediction,
        baseline_score=base.score,
        candidate_score=quant.score,
        must_not_flip=pair.must_not_flip,
    )
