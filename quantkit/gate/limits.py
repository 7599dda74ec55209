"""Limit gates: one number of a model against a maximum or minimum.

Divergence and perplexity are means over held-out text whose windows are the clusters; sizes
are deterministic. KL correlates with damage across schemes but not near the baseline, so it
is a tripwire that fails fast, never a substitute for a task gate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from quantkit.errors import QuantkitError, UsageError
from quantkit.gate.latency import latency_check
from quantkit.gate.policy import LimitGate
from quantkit.gate.statistics import Bounds, agreement_bounds, ratio_bounds
from quantkit.gate.words import NATS, PERCENT, RATIO, Unit, Word, against, outcome_of
from quantkit.results import GateCheck, Outcome, Results, TextWindow


def _windows(candidate: Results, gate: LimitGate) -> tuple[TextWindow, ...]:
    assert candidate.text is not None  # check_comparable refused it otherwise
    windows = candidate.text.windows
    if not windows or any(w.tokens <= 0 for w in windows):
        raise QuantkitError(f"{gate.name}: the held-out text has no tokens")
    return windows


def _needs_reference(gate: LimitGate) -> UsageError:
    return UsageError(
        f"{gate.name}: the candidate was scored without a reference model",
        remedy="run `quantkit eval --reference MODEL --text FILE`, or drop the gate",
    )


def _finite(value: float, what: str) -> float:
    if not math.isfinite(value):
        raise QuantkitError(f"{what} is {value}", remedy="run `quantkit eval` again")
    return float(value)


def _kl_mean(gate: LimitGate, candidate: Results, baseline: Results) -> GateCheck:
    """Mean KL(reference || candidate), nats per token; windows are clusters."""
    windows = _windows(candidate, gate)
    sums = [_finite(w.kl, "a window's KL") for w in windows if w.kl is not None]
    if len(sums) < len(windows):
        raise _needs_reference(gate)
    bounds = ratio_bounds(sums, [w.tokens for w in windows])
    check = _bounded(gate, bounds, "max", NATS, "nats/token", len(windows))
    if baseline.noise is None or baseline.noise.kl_mean is None:
        return check
    # What rounding alone costs: two runs of the unquantized model.
    return replace(check, details={**check.details, "noise": baseline.noise.kl_mean})


def _kl_p99(gate: LimitGate, candidate: Results, baseline: Results) -> GateCheck:
    """99th percentile of KL over tokens, nats. Results hold no per-token values, so this is
    compared as it is, and is a tripwire only."""
    _windows(candidate, gate)
    p99 = candidate.text.kl_p99 if candidate.text is not None else None
    if p99 is None:
        raise _needs_reference(gate)
    return _exact(gate, _finite(p99, "kl_p99"), NATS, "nats at the 99th percentile", {})


def _top1(gate: LimitGate, candidate: Results, baseline: Results) -> GateCheck:
    """Share of tokens where candidate and reference agree on the most likely token."""
    windows = _windows(candidate, gate)
    agreeing = [w.top1 for w in windows if w.top1 is not None]
    if len(agreeing) < len(windows):
        raise _needs_reference(gate)
    if any(not 0 <= w.top1 <= w.tokens for w in windows if w.top1 is not None):
        raise QuantkitError("a window's top-1 agreement exceeds its tokens")
    bounds = agreement_bounds(agreeing, [w.tokens for w in windows])
    return _bounded(gate, bounds, "min", PERCENT, "% of tokens agree", len(windows))


def _perplexity_ratio(gate: LimitGate, candidate: Results, baseline: Results) -> GateCheck:
    """exp(ΔNLL): the bounds of the mean ΔNLL, nats per token, against ln(limit)."""
    windows = _windows(candidate, gate)
    assert baseline.text is not None  # check_comparable refused it otherwise
    sums = [
        _finite(ours.nll, "a window's NLL") - _finite(theirs.nll, "a window's NLL")
        for ours, theirs in zip(windows, baseline.text.windows, strict=True)
    ]
    nll = ratio_bounds(sums, [w.tokens for w in windows])
    bounds = Bounds(
        _exp(nll.estimate),
        None if nll.lower is None else _exp(nll.lower),
        None if nll.upper is None else _exp(nll.upper),
        nll.method,
    )
    return _bounded(gate, bounds, "max", RATIO, "times the baseline's", len(windows))


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # a ruined model's ratio stays a finite number


def _bounded(
    gate: LimitGate, bounds: Bounds, word: Word, unit: Unit, what: str, windows: int
) -> GateCheck:
    """A mean over windows of text, held against a limit by its bounds."""
    return GateCheck(
        gate.name,
        outcome_of(bounds, gate.limit, word),
        bounds.estimate,
        bounds.lower,
        bounds.upper,
        gate.limit,
        f"{unit.show(bounds.estimate)} {what}, "
        + against(bounds, gate.limit, word, unit, "window of text"),
        {"method": bounds.method, "windows": windows},
    )


def _cost(results: Results, key: str, gate: LimitGate) -> float:
    value = results.cost.get(key)
    if value is None:
        raise UsageError(
            f"{gate.name}: the results hold no {key}",
            remedy="run `quantkit eval` on the checkpoint's folder",
        )
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise QuantkitError(f"{gate.name}: {key} is {value!r}, not a number above 0")
    return float(value)


def _size_ratio(gate: LimitGate, candidate: Results, baseline: Results) -> GateCheck:
    """Bytes over the original's bytes. The baseline's own size stands in where the candidate
    does not know its original: a baseline may itself be a quantized model."""
    size = _cost(candidate, "size_bytes", gate)
    if candidate.cost.get("reference_size_bytes") is not None:
        original = _cost(candidate, "reference_size_bytes", gate)
    else:
        original = _cost(baseline, "size_bytes", gate)
    what = f"of the original ({size / 1e6:.1f} of {original / 1e6:.1f} MB)"
    details = {"size_bytes": size, "reference_size_bytes": original}
    return _exact(gate, size / original, RATIO, what, details)


def _bits_per_weight(gate: LimitGate, candidate: Results, baseline: Results) -> GateCheck:
    return _exact(gate, _cost(candidate, "bits_per_weight", gate), RATIO, "bits per weight", {})


def _exact(
    gate: LimitGate, value: float, unit: Unit, what: str, details: Mapping[str, Any]
) -> GateCheck:
    """A number without sampling error, held against a maximum."""
    outcome = Outcome.PASS if value <= gate.limit else Outcome.FAIL
    digits = unit.digits_apart(value, gate.limit)
    sign = "≤" if outcome is Outcome.PASS else ">"
    reason = f"{unit.show(value, digits)} {what} {sign} {unit.show(gate.limit, digits)} max"
    return GateCheck(gate.name, outcome, value, None, None, gate.limit, reason, details)


LIMIT_CHECKS: dict[str, Callable[[LimitGate, Results, Results], GateCheck]] = {
    "kl.mean": _kl_mean,
    "kl.p99": _kl_p99,
    "top1": _top1,
    "perplexity.ratio": _perplexity_ratio,
    "size.ratio": _size_ratio,
    "size.bits_per_weight": _bits_per_weight,
    "latency.ttft": latency_check,
    "latency.tpot": latency_check,
}
