"""Tests and bounds for paired comparisons. Pure arithmetic: arrays in, floats out.

Notation, the same throughout the gate: ``n`` items were scored by both models; ``gains`` (g)
of them the baseline got wrong and the candidate right, ``losses`` (l) the other way round.
``D = (g - l) / n`` is the difference of accuracies (candidate minus baseline, a share, not
points) and ``flips = (g + l) / n``.

Every bound is one-sided at level ``1 - alpha`` (95 % by default), so a (lower, upper) pair is
a 90 % interval: a non-inferiority gate spends its whole alpha on one side.

Sources:
    Tango 1998, Stat. Med. 17:891, for the paired score test and its restricted MLE.
    Wilson 1927, JASA 22:209, for the score interval of one proportion.
    Efron 1987, JASA 82:171, for the BCa bootstrap.
    Holm 1979, Scand. J. Stat. 6:65, for the step-down correction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

ALPHA = 0.05

#: Below this number of clusters the t bound is joined by a BCa bootstrap.
FEW_CLUSTERS = 20

#: A mean that rests on fewer changed clusters than this is a count of rare events, not a
#: normal variable, and gets a score bound.
FEW_CHANGED = 10

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Bounds:
    """An estimate with one-sided bounds, in the estimate's own unit.

    ``lower`` and ``upper`` are None when a single cluster leaves the variance unknown.
    """

    estimate: float
    lower: float | None
    upper: float | None
    method: str


# -- paired binary items ---------------------------------------------------------------------


def tango_z(gains: ArrayLike, losses: ArrayLike, n: ArrayLike, difference: ArrayLike) -> Floats:
    """Tango's score statistic for H0: D = ``difference``. Broadcasts over all arguments.

    ``q`` is the maximum-likelihood probability of a loss under H0 (the probability of a gain
    is then q + difference): the larger root of A q² + B q + C = 0. At ``difference`` 0 the
    statistic is McNemar's, (g - l) / √(g + l).

    Where the variance under H0 is zero the statistic is 0 if the data agree with H0 and ±inf
    if they refute it: D = 0 fixes nothing when no item flipped, D = ±1 demands that all did.
    """
    g, lo, count, d0 = np.broadcast_arrays(
        *(np.asarray(x, dtype=np.float64) for x in (gains, losses, n, difference))
    )
    a = 2 * count
    b = -(g + lo) + (2 * count - g + lo) * d0
    c = -lo * d0 * (1 - d0)
    # The discriminant is non-negative in exact arithmetic; rounding may leave -1e-17.
    q = (np.sqrt(np.maximum(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = np.maximum(count * (2 * q + d0 - d0 * d0), 0.0)
    excess = g - lo - count * d0
    with np.errstate(divide="ignore", invalid="ignore"):
        z = excess / np.sqrt(variance)
    agrees = np.abs(excess) <= 1e-9 * count
    return np.where(variance > 0, z, np.where(agrees, 0.0, np.copysign(np.inf, excess)))


def tango_bounds(
    gains: ArrayLike, losses: ArrayLike, n: ArrayLike, alpha: float = ALPHA
) -> tuple[Floats, Floats]:
    """One-sided lower and upper bounds of D: the differences that Tango's test keeps.

    Z falls as the hypothesised difference rises, so bisection needs no starting guess and
    cannot diverge at g = l = 0 or l = n. Counts may be fractional. Vectorised.
    """
    g, lo, count = np.broadcast_arrays(
        *(np.asarray(x, dtype=np.float64) for x in (gains, losses, n))
    )
    estimate = (g - lo) / count
    z = float(special.ndtri(1 - alpha))

    def bisect(outer: Floats, target: float) -> Floats:
        """Bring ``outer`` (rejected) and ``inner`` (kept: Z is 0 there) together."""
        inner = estimate
        for _ in range(50):
            middle = (outer + inner) / 2
            kept = np.abs(tango_z(g, lo, count, middle)) <= target
            inner, outer = np.where(kept, middle, inner), np.where(kept, outer, middle)
        return (outer + inner) / 2

    return bisect(np.full(g.shape, -1.0), z), bisect(np.full(g.shape, 1.0), z)


def mcnemar_p(gains: int, losses: int) -> float:
    """Exact two-sided McNemar p: are gains and losses equally likely?"""
    flips = gains + losses
    if flips == 0:
        return 1.0
    return min(1.0, 2 * float(special.bdtr(min(gains, losses), flips, 0.5)))


def loss_p(gains: int, losses: int) -> float:
    """Exact one-sided sign test: p of at least this many losses if flips were a fair coin."""
    flips = gains + losses
    return float(special.bdtrc(losses - 1, flips, 0.5)) if losses else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p values, in the given order: which of several tests stand together."""
    order = np.argsort(p_values, kind="stable")
    m = len(order)
    scaled = np.asarray(p_values, dtype=np.float64)[order] * np.arange(m, 0, -1)
    adjusted = np.empty(m)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(p) for p in adjusted]


def wilson_bounds(successes: float, n: float, alpha: float = ALPHA) -> tuple[float, float]:
    """One-sided Wilson score bounds of one proportion. Counts may be fractional."""
    z = float(special.ndtri(1 - alpha))
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


# -- clusters --------------------------------------------------------------------------------


def cluster_sums(values: ArrayLike, clusters: Sequence[str]) -> tuple[Floats, Floats]:
    """Per-cluster sums and sizes. ``values`` [n], ``clusters`` [n] → two arrays [G]."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    weights = np.asarray(values, dtype=np.float64)
    sizes = np.bincount(index).astype(np.float64)
    return np.bincount(index, weights=weights).astype(np.float64), sizes


def ratio_bounds(sums: ArrayLike, sizes: ArrayLike, alpha: float = ALPHA) -> Bounds:
    """Bounds of ΣS/ΣT over independent clusters g with sums S_g and sizes T_g.

    The linearised (CR1) standard error, with k = ΣS/ΣT and G clusters::

        SE² = G/(G-1) · Σ(S_g - k T_g)² / (ΣT)²        t quantile with G - 1 degrees

    With T_g the number of items this is the clustered variance of a mean; with T_g tokens it
    is that of a mean KL or a difference of NLL, and the unit is that of S per token.

    Under 20 clusters a seeded BCa bootstrap of clusters adds what t misses, the skew. It
    cannot see past the largest cluster it has, so it is too narrow alone: the wider bound of
    the two counts on each side.
    """
    s, t = np.asarray(sums, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    # One order for one set of clusters: sums and resamples must not depend on row order.
    order = np.lexsort((t, s))
    s, t = s[order], t[order]
    estimate, groups = float(s.sum() / t.sum()), len(s)
    if groups < 2:
        return Bounds(estimate, None, None, "one cluster")
    variance = groups / (groups - 1) * float(((s - estimate * t) ** 2).sum() / t.sum() ** 2)
    half = float(special.stdtrit(groups - 1, 1 - alpha)) * variance**0.5
    lower, upper = estimate - half, estimate + half
    if groups >= FEW_CLUSTERS:
        return Bounds(estimate, lower, upper, f"t, {groups} clusters")
    low, high = _bca(s, t, alpha)
    return Bounds(estimate, min(lower, low), max(upper, high), f"t and BCa, {groups} clusters")


def _bca(
    s: Floats, t: Floats, alpha: float, resamples: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """Bias-corrected accelerated bootstrap bounds of Σs/Σt over clusters."""
    groups, estimate = len(s), s.sum() / t.sum()
    picks = np.random.default_rng(seed).integers(0, groups, (resamples, groups))
    draws = s[picks].sum(axis=1) / t[picks].sum(axis=1)
    # A resample of the same clusters in another order must count as equal, not as below.
    tied = np.isclose(draws, estimate, rtol=1e-12, atol=1e-15)
    share = float(((draws < estimate) & ~tied).mean() + tied.mean() / 2)
    bias = special.ndtri(np.clip(share, 0.5 / resamples, 1 - 0.5 / resamples))
    jackknife = (s.sum() - s) / (t.sum() - t)
    u = jackknife.mean() - jackknife
    scale = float((u**2).sum() ** 1.5)
    acceleration = float((u**3).sum()) / (6 * scale) if scale > 0 else 0.0
    z = special.ndtri(np.array([alpha, 1 - alpha]))
    levels = special.ndtr(bias + (bias + z) / (1 - acceleration * (bias + z)))
    low, high = np.quantile(draws, levels)
    return float(low), float(high)


def mean_bounds(values: ArrayLike, alpha: float = ALPHA) -> Bounds:
    """BCa bootstrap bounds of the mean of independent values ``[n]``, never tighter than t's:
    the bootstrap sees the skew, t what n values cannot show."""
    s = np.sort(np.asarray(values, dtype=np.float64))
    bounds = ratio_bounds(s, np.ones(len(s)), alpha)
    if bounds.lower is None or bounds.upper is None or len(s) < FEW_CLUSTERS:
        return bounds  # t and BCa joined already
    low, high = _bca(s, np.ones(len(s)), alpha)
    lower, upper = min(bounds.lower, low), max(bounds.upper, high)
    return Bounds(bounds.estimate, lower, upper, f"t and BCa, {len(s)} values")


def difference_bounds(
    differences: ArrayLike, clusters: Sequence[str], alpha: float = ALPHA
) -> Bounds:
    """Bounds of a mean score difference d = candidate - baseline, |d| ≤ 1, over clusters.

    `ratio_bounds`, joined by Tango's where t is too sure of itself; the wider bound counts:

    - d is -1, 0 or 1. Flips are rare and one-sided, so t is skewed (9 % type I error where 5
      are promised). Counts are divided by the design effect, the clustered variance over
      that of independent items (Rao & Scott 1992, Biometrics 48:577).
    - Almost nothing changed: fewer than 10 clusters, and fewer than half of them. Identical
      scores have variance zero, and t would call three of them proof. Clusters are counted
      as Tango counts items: a cluster's mean difference is a fractional gain or loss.
    """
    d = np.asarray(differences, dtype=np.float64)
    s, t = cluster_sums(d, clusters)
    bounds = ratio_bounds(s, t, alpha)
    groups, n = len(s), len(d)
    if bounds.lower is None or bounds.upper is None:
        return bounds
    lower, upper, method = bounds.lower, bounds.upper, bounds.method

    def join(gains: float, losses: float, count: float, name: str) -> None:
        nonlocal lower, upper, method
        low, high = tango_bounds(gains, losses, count, alpha)
        lower, upper = min(lower, float(low)), max(upper, float(high))
        method += f", {name}"

    mean = s.sum() / n
    independent = ((d * d).sum() / n - mean * mean) / n
    if np.isin(d, (-1.0, 0.0, 1.0)).all() and independent > 0:
        clustered = groups / (groups - 1) * ((s - mean * t) ** 2).sum() / n**2
        effect = max(1.0, float(clustered / independent))
        gains, losses = int((d > 0).sum()), int((d < 0).sum())
        join(gains / effect, losses / effect, n / effect, f"score, design effect {effect:.2f}")
    changed = int(np.count_nonzero(s))
    if np.ptp(s / t) == 0 or (changed < FEW_CHANGED and 2 * changed < groups):
        scale = groups / n
        gains, losses = np.maximum(s, 0).sum() * scale, np.maximum(-s, 0).sum() * scale
        join(gains, losses, groups, f"score, {changed} clusters changed")
    return Bounds(bounds.estimate, lower, upper, method)


def score_bounds(scores: ArrayLike, clusters: Sequence[str], alpha: float = ALPHA) -> Bounds:
    """Bounds of one model's mean score, scores within 0..1: Wilson for unclustered binary
    scores, else `ratio_bounds` (never tighter than Wilson where all clusters agree)."""
    values = np.asarray(scores, dtype=np.float64)
    s, t = cluster_sums(values, clusters)
    if len(s) == len(values) and bool(np.isin(values, (0.0, 1.0)).all()):
        low, high = wilson_bounds(float(values.sum()), len(values), alpha)
        return Bounds(float(values.mean()), low, high, "Wilson")
    bounds = ratio_bounds(s, t, alpha)
    if bounds.lower is None or bounds.upper is None or np.ptp(s / t) > 0:
        return bounds
    low, high = wilson_bounds(bounds.estimate * len(s), len(s), alpha)
    return Bounds(bounds.estimate, min(bounds.lower, low), max(bounds.upper, high), "Wilson")


def agreement_bounds(agreeing: ArrayLike, tokens: ArrayLike, alpha: float = ALPHA) -> Bounds:
    """Bounds of a token agreement rate over windows: `ratio_bounds`, never tighter than
    Wilson on single tokens (perfect agreement has variance zero, and is still a sample)."""
    s, t = np.asarray(agreeing, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    bounds = ratio_bounds(s, t, alpha)
    if bounds.lower is None or bounds.upper is None:
        return bounds
    low, high = wilson_bounds(float(s.sum()), float(t.sum()), alpha)
    return Bounds(bounds.estimate, min(bounds.lower, low), max(bounds.upper, high), bounds.method)
