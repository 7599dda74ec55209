"""One verdict from a candidate's results, its baseline's and a policy.

Every gate asks one question of its bounds, never of its point estimate: a model that sits
exactly at its allowed loss passes a comparison of points half of the time.

    PASS          the whole plausible range is inside the limit
    FAIL          the whole plausible range is outside
    INCONCLUSIVE  the limit lies within it: more items, or another limit, would decide

"All gates pass" is an intersection-union test and needs no correction for their number.
"""

from __future__ import annotations

from quantkit.errors import EXIT_PASS, EXIT_REGRESSION
from quantkit.gate.compare import check_comparable
from quantkit.gate.limits import LIMIT_CHECKS
from quantkit.gate.policy import Policy, TaskGate, default_policy
from quantkit.gate.tasks import judge_task
from quantkit.results import GateCheck, Outcome, Results, Verdict


def judge(candidate: Results, baseline: Results, policy: Policy | None = None) -> Verdict:
    """Hold a candidate against its baseline.

    Args:
        candidate: results of the reloaded artifact.
        baseline: results of the original model, scored with the same files and settings.
        policy: the gates; `default_policy` when None.

    Raises:
        UsageError: the policy names what neither of the results has, or what only
            ``eval --reference`` measures.
        NotComparableError: the results describe different experiments.
        QuantkitError: a number that is not finite, or no rows.
    """
    if policy is None:
        policy = default_policy(candidate, baseline)
    check_comparable(candidate, baseline, policy)
    checks: list[GateCheck] = []
    warnings: list[str] = []
    for gate in policy.gates:
        if isinstance(gate, TaskGate):
            made, said = judge_task(gate, candidate, baseline)
            checks += made
            warnings += said
        else:
            checks.append(LIMIT_CHECKS[gate.name](gate, candidate, baseline))
    outcomes = {check.outcome for check in checks}
    worst = (Outcome.FAIL, Outcome.INCONCLUSIVE, Outcome.PASS)
    return Verdict(next(o for o in worst if o in outcomes), tuple(checks), tuple(warnings))


def exit_code(verdict: Verdict, on_inconclusive: str | None = None) -> int:
    """The process's exit code. ``on_inconclusive`` turns 3 into 1 (fail) or 0 (warn)."""
    if verdict.outcome is Outcome.INCONCLUSIVE and on_inconclusive is not None:
        return {"fail": EXIT_REGRESSION, "warn": EXIT_PASS}[on_inconclusive]
    return verdict.exit_code
