"""How much of a flip rate is quantization: the baseline's flips against itself.

Two runs of the same weights differ by rounding alone. Their flip rate ψ_AA is the floor under
ψ, and ψ - ψ_AA the flips in excess of it. Where two runs of an *unchanged* model could not
be told apart from a loss of the margin, no number of candidates will pass: the margin is
finer than the measurement.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.gate.compare import RIGHT, Pair
from quantkit.gate.policy import TaskGate
from quantkit.gate.statistics import difference_bounds, tango_bounds
from quantkit.noise import NoiseFloor, TaskNoise
from quantkit.results import TaskResult


@dataclass(frozen=True)
class Floor:
    """The noise floor of one task.

    Attributes:
        kernels: numerics of the second run.
        flips: ψ_AA, share of items that only one of the two runs got right.
        excess_flips: ψ - ψ_AA.
        half_width: distance from an unchanged model's D to its 95 % lower bound, a share.
    """

    kernels: str
    flips: float
    excess_flips: float
    half_width: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def warnings(self, gate: TaskGate) -> list[str]:
        """The line that says that no candidate could pass, if that is so."""
        if self.half_width < gate.margin:
            return []
        return [
            f"{gate.name}: the noise floor alone makes the {100 * gate.margin:g}-point margin "
            f"inconclusive: {100 * self.flips:.1f} % of items flip between two runs of the "
            f"unquantized model, which bounds D to {100 * self.half_width:.1f} points; more "
            "items or a wider margin would decide"
        ]


def flip_rate(task: TaskResult, noise: TaskNoise) -> float:
    """ψ_AA: share of a task's items that only one of the two runs got right."""
    moved = ((row.score, row.score + noise.differences.get(row.id, 0.0)) for row in task.rows)
    return sum((one >= RIGHT) != (two >= RIGHT) for one, two in moved) / task.n


def noise_floor(
    gate: TaskGate, pairs: tuple[Pair, ...], baseline: TaskResult, noise: NoiseFloor
) -> Floor:
    """What the baseline's second run says of a task.

    Args:
        gate: the task.
        pairs: its items, ordered by id.
        baseline: the first of the two runs.
        noise: measured with the baseline.

    Raises:
        QuantkitError: the floor is of other items.
    """
    task = noise.tasks[gate.task]
    n, ids = len(pairs), {p.baseline.id for p in pairs}
    if task.n != n or not task.differences.keys() <= ids:
        raise QuantkitError(
            f"{gate.name}: the baseline's noise floor is of {task.n} items, its results of {n}",
            remedy="run `quantkit eval --noise-floor` again",
        )
    flips = round(n * flip_rate(baseline, task))
    ours = sum(p.gain or p.loss for p in pairs)
    differences = [task.differences.get(p.baseline.id, 0.0) for p in pairs]
    clusters = [p.cluster for p in pairs]
    if len(set(clusters)) == n and all(d in (-1.0, 0.0, 1.0) for d in differences):
        # The true difference is zero, whichever way the few flips of these two runs fell.
        half = -float(tango_bounds(flips / 2, flips / 2, n)[0])
    else:
        bounds = difference_bounds(differences, clusters)
        half = 1.0 if bounds.lower is None else bounds.estimate - bounds.lower
    return Floor(noise.kernels, flips / n, (ours - flips) / n, half)
