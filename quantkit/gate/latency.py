"""Latency gates: how much slower or faster, as a ratio, on the host that measured both.

Each prompt gives one log ratio, r = ln(median time of the candidate / that of the baseline);
medians, because a repeat that met another process is not the model's doing. The bounds are
those of exp(mean r), from a BCa bootstrap over prompts. TTFT and TPOT are gated apart: 4-bit
weights usually shorten the second and may lengthen the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

import numpy as np

from quantkit.errors import NotComparableError, UsageError
from quantkit.gate.policy import LimitGate
from quantkit.gate.statistics import Bounds, mean_bounds
from quantkit.gate.words import RATIO, against, outcome_of
from quantkit.results import GateCheck, Results
from quantkit.timings import HOST_KEYS, Timings

#: Below this a bootstrap has too few distinct resamples for a 95 % bound.
FEWEST_PROMPTS = 8

_AGAIN = "time both models in one session, on one host, at one concurrency, on the same prompts"


def log_ratios(
    candidate: Mapping[str, tuple[float, ...]], baseline: Mapping[str, tuple[float, ...]]
) -> np.ndarray:
    """ln(candidate / baseline) of each prompt's median seconds, by prompt id, fp64 ``[n]``.

    Raises:
        NotComparableError: the prompts differ.
    """
    if candidate.keys() != baseline.keys():
        differing = sorted(candidate.keys() ^ baseline.keys())
        raise NotComparableError(
            f"latency: the prompts differ ({differing[0]!r} was timed on one side only)",
            remedy=_AGAIN,
        )
    return np.array(
        [math.log(median(candidate[p]) / median(baseline[p])) for p in sorted(candidate)]
    )


def latency_check(gate: LimitGate, candidate: Results, baseline: Results) -> GateCheck:
    """PASS if the upper bound of the ratio of times is at most the limit.

    Raises:
        UsageError: neither side holds timings.
        NotComparableError: one side has none, or host, concurrency or prompts differ.
    """
    ours, theirs = _timings(gate, candidate, baseline)
    kind = gate.name.rpartition(".")[2]
    ratios = log_ratios(getattr(ours, kind), getattr(theirs, kind))
    if len(ratios) < FEWEST_PROMPTS:
        estimate = float(np.exp(ratios.mean())) if len(ratios) else 1.0
        bounds = Bounds(estimate, None, None, "too few prompts")
        reason = f"{len(ratios)} prompts bound nothing; at least {FEWEST_PROMPTS} are needed"
    else:
        mean = mean_bounds(ratios)
        assert mean.lower is not None
        assert mean.upper is not None
        bounds = Bounds(
            math.exp(mean.estimate), math.exp(mean.lower), math.exp(mean.upper), mean.method
        )
        reason = f"{RATIO.show(bounds.estimate)} times the baseline's {kind.upper()}, " + against(
            bounds, gate.limit, "max", RATIO, "prompt"
        )
    return GateCheck(
        gate.name,
        outcome_of(bounds, gate.limit, "max"),
        bounds.estimate,
        bounds.lower,
        bounds.upper,
        gate.limit,
        reason,
        {"method": bounds.method, "prompts": len(ratios), "concurrency": ours.concurrency},
    )


def _timings(gate: LimitGate, candidate: Results, baseline: Results) -> tuple[Timings, Timings]:
    ours, theirs = candidate.timings, baseline.timings
    if ours is None and theirs is None:
        raise UsageError(
            f"{gate.name}: neither of the results holds timings",
            remedy="drop the gate, or add `timings` to both results",
        )
    if ours is None or theirs is None:
        side = "candidate" if ours is None else "baseline"
        raise NotComparableError(f"{gate.name}: the {side} has no timings", remedy=_AGAIN)
    for key in HOST_KEYS:
        if ours.host.get(key) != theirs.host.get(key):
            raise NotComparableError(
                f"{gate.name}: host {key} differs: candidate {ours.host.get(key)}, "
                f"baseline {theirs.host.get(key)}",
                remedy=_AGAIN,
            )
    if ours.concurrency != theirs.concurrency:
        raise NotComparableError(
            f"{gate.name}: concurrency differs: candidate {ours.concurrency}, "
            f"baseline {theirs.concurrency}",
            remedy=_AGAIN,
        )
    return ours, theirs
