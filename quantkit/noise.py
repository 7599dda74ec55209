"""The noise floor: how much a model disagrees with itself in another batch or kernel.

Floating-point sums depend on their order, so one model scored twice, with other kernels or
another batch size, flips a few items. A flip rate below that says nothing of quantization.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TaskNoise:
    """One task scored twice by the same weights.

    Attributes:
        n: items.
        differences: second score minus first, by item id; items of equal score are left out.
    """

    n: int
    differences: Mapping[str, float]


@dataclass(frozen=True)
class NoiseFloor:
    """A model against itself.

    Attributes:
        kernels: the numerics of the second run; those of the first are in the fingerprint.
        tasks: by suite name.
        kl_mean: mean KL(first || second) on held-out text, nats a token; None without text.
    """

    kernels: str
    tasks: Mapping[str, TaskNoise] = field(default_factory=dict)
    kl_mean: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "kernels": self.kernels,
            "kl_mean": self.kl_mean,
            "tasks": {
                name: {"n": t.n, "differences": dict(t.differences)}
                for name, t in self.tasks.items()
            },
        }

    @staticmethod
    def from_json(doc: Mapping[str, Any]) -> NoiseFloor:
        """Read `to_json` back.

        Raises:
            KeyError, TypeError, ValueError: not such a document, or a number that is none.
        """
        tasks = {}
        for name, t in doc["tasks"].items():
            made = TaskNoise(int(t["n"]), {str(k): float(v) for k, v in t["differences"].items()})
            if len(made.differences) > made.n:
                raise ValueError(f"noise floor of {name}: more differences than {made.n} items")
            if not all(math.isfinite(d) for d in made.differences.values()):
                raise ValueError(f"noise floor of {name}: a difference is not finite")
            tasks[name] = made
        return NoiseFloor(str(doc["kernels"]), tasks, doc.get("kl_mean"))
