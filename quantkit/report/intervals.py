"""95 % confidence intervals of one model's score, for the reader's eye.

The gate decides on paired differences with bounds of its own; these intervals only show how
far a single score can be trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, sqrt
from statistics import NormalDist

from quantkit.results import ItemRow

_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Interval:
    """A mean score with its bounds; ``method`` is what the report calls it."""

    estimate: float
    lower: float
    upper: float
    method: str


def wilson(mean: float, n: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion. ``n`` may be an effective count."""
    spread = _Z * sqrt(mean * (1 - mean) / n + _Z * _Z / (4 * n * n))
    centre, scale = mean + _Z * _Z / (2 * n), 1 + _Z * _Z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def score_interval(rows: Sequence[ItemRow]) -> Interval | None:
    """Wilson's interval; None where scores lie outside 0..1, or there are none.

    Items that share a cluster, and graded scores, count as fewer or more independent items:
    ``n`` is divided by the design effect, the clustered variance over p (1 - p) / n (Rao &
    Scott 1992). With one item a cluster and binary scores that is Wilson's own interval.
    """
    if not rows or any(not 0 <= row.score <= 1 for row in rows):
        return None
    n = len(rows)
    mean = fsum(row.score for row in rows) / n
    clusters: dict[str, list[float]] = {}
    for row in rows:
        # The prefix keeps an item's id apart from a cluster of the same name.
        key = f"i:{row.id}" if row.cluster is None else f"c:{row.cluster}"
        clusters.setdefault(key, []).append(row.score)
    groups = len(clusters)
    if groups == n and all(row.score in (0.0, 1.0) for row in rows):
        return Interval(mean, *wilson(mean, n), "Wilson")
    squares = fsum(fsum(s - mean for s in scores) ** 2 for scores in clusters.values())
    variance = groups / max(1, groups - 1) * squares / n**2
    # No variance between the clusters at hand does not prove that there is none.
    effective = mean * (1 - mean) / variance if variance > 0 else groups
    return Interval(mean, *wilson(mean, effective), f"Wilson over {groups} clusters")
