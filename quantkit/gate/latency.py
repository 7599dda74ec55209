"""Latency gates: how much slower or faster, as a ratio, on the host that measured both.

Each prompt gives one log ratio, r = ln(median time of the candidate / that of the baseline);
medians, because a repeat that met another process is not the model's doing. The bounds are
those of exp(mean r), from a BCa bootstrap over prompts. TTFT and TPOT are gated apart: 4-bit
weights usually shorten the second and may lengthen the first. The times come from ``quantkit bench
decode CKPT --reference MODEL --timings FILE``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from quantkit.errors import NotComparableError, UsageError
from quantkit.gate.policy import LimitGate
from quantkit.gate.statistics import Bounds, mean_bounds
from quantkit.gate.words import RATIO, against, outcome_of
from quantkit.results import GateCheck, Results, read_json
from quantkit.timings import HOST_KEYS, PairedTimings, Timings

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


def ratio_bounds(ratios: np.ndarray) -> Bounds:
    """Bounds of the ratio of times from log ratios ``[n]``; none of fewer than `FEWEST_PROMPTS`."""
    if len(ratios) < FEWEST_PROMPTS:
        estimate = float(np.exp(ratios.mean())) if len(ratios) else 1.0
        return Bounds(estimate, None, None, "too few prompts")
    mean = mean_bounds(ratios)
    assert mean.lower is not None
    assert mean.upper is not None
    return Bounds(math.exp(mean.estimate), math.exp(mean.lower), math.exp(mean.upper), mean.method)


def with_timings(
    path: str | Path, candidate: Results, baseline: Results
) -> tuple[Results, Results]:
    """(candidate, baseline) with the latencies of a file of ``quantkit bench decode --timings``.

    Raises:
        UsageError: no such file, or not of this form.
        NotComparableError: another checkpoint, original or kernels than those that were scored.
    """
    document = read_json(path)
    try:
        pair = PairedTimings.from_json(document)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise UsageError(
            f"{path}: not a file of timings ({e!r})",
            remedy="write it with `quantkit bench decode CKPT --reference MODEL --timings FILE`",
        ) from e
    sides = (("candidate", pair.candidate, candidate), ("baseline", pair.baseline, baseline))
    for side, timed, results in sides:
        for key, found in (("model", timed.model), ("kernels", timed.kernels)):
            scored = results.fingerprint.get(key)
            if found != scored:
                raise NotComparableError(
                    f"{path}: timed the {side} with {key} {found[:40]}, scored was {scored}",
                    remedy="time what was scored, in the same kernels",
                )
        _check_host(side, timed.timings, results)
    return (
        replace(candidate, timings=pair.candidate.timings),
        replace(baseline, timings=pair.baseline.timings),
    )


def _check_host(side: str, timings: Timings, results: Results) -> None:
    """Scores and speed must be of one kind of machine: another one runs other kernels. The number
    of threads changes no score."""
    scored = results.fingerprint.get("host")
    if not isinstance(scored, Mapping):  # an endpoint's machine is unknown
        return
    for key in ("machine", "cpu"):
        if timings.host.get(key) != scored.get(key):
            raise NotComparableError(
                f"the {side} was timed on {key} {timings.host.get(key)}, scored on "
                f"{scored.get(key)}",
                remedy="score and time on the host that will serve",
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
    bounds = ratio_bounds(ratios)
    if bounds.upper is None:
        reason = f"{len(ratios)} prompts bound nothing; at least {FEWEST_PROMPTS} are needed"
    else:
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
            remedy="drop the gate, or give --timings FILE, made by `quantkit bench decode`",
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
