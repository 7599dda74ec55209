"""A sensitivity file: what each layer costs under each scheme, and what it was measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import NotComparableError, UsageError
from quantkit.results import read_json, write_json

#: Changes when the file's meaning does.
SCHEMA = "quantkit.sensitivity/1"

#: Key of `Sensitivity.origin` → what it is called in an error.
_ORIGIN = {
    "weights": "model",
    "data": "data, samples or seq_len",
    "schemes": "schemes",
    "solver": "algorithm",
    "seed": "seed",
    "checks": "number of checks",
}


@dataclass(frozen=True)
class Cost:
    """One layer under one scheme.

    Attributes:
        bits: stored, scales and zero points included.
        kl: nats a token if this layer alone is quantized, to second order.
        error: standard error of ``kl`` over windows.
        direct: the estimate from this scheme alone, before it is drawn towards the layer's others.
    """

    bits: int
    kl: float
    error: float
    direct: float


@dataclass(frozen=True)
class Layer:
    """One linear layer.

    Attributes:
        shape: ``(N, K)``.
        inputs: name of the first layer that reads the same tensor; layers of one name share a
            scheme, because runtimes fuse them.
        costs: by scheme; only those that fit it.
    """

    shape: tuple[int, int]
    inputs: str
    costs: Mapping[str, Cost]

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Check:
    """A prediction beside what quantizing this layer alone did to the model's output, in nats."""

    layer: str
    scheme: str
    predicted: float
    measured: float


@dataclass(frozen=True)
class Checks:
    """Predictions against measurements.

    Attributes:
        single: one layer at a time.
        rank: Spearman's correlation of predicted and measured over them.
        predicted, measured: KL with all of these layers quantized at once; predicted by the sum.
    """

    single: tuple[Check, ...]
    rank: float
    predicted: float
    measured: float


@dataclass(frozen=True)
class Sensitivity:
    """What `quantkit inspect --sensitivity` writes.

    Attributes:
        origin: what the numbers depend on: the weights' sha256, the tokens' sha256, the schemes,
            the solver, the seed, the number of checks.
        source: the model as it was named.
        data: paths as they were given.
        samples, seq_len: windows and their tokens; half of the windows are differentiated.
        head: name of the output layer, which is not measured; None if there is none.
        schemes: name → how a recipe writes it.
        layers: by name, in the model's order.
        checks: None if none were asked for.
    """

    origin: Mapping[str, Any]
    source: str
    data: tuple[str, ...]
    samples: int
    seq_len: int
    head: str | None
    schemes: Mapping[str, Any]
    layers: Mapping[str, Layer]
    checks: Checks | None = None

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers.values())

    def save(self, path: Path) -> None:
        """Write as JSON, by a rename. Raises UsageError if the folder cannot be written."""
        document = {"schema": SCHEMA, **asdict(self)}
        # In the model's order, which sorted keys would lose.
        document["layers"] = [{"name": name, **layer} for name, layer in document["layers"].items()]
        write_json(path, document)

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """The inverse of `save`. Raises UsageError for anything else."""
        document = read_json(path)
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise UsageError(
                f"{path}: is not a sensitivity file of this version",
                remedy="measure again: quantkit inspect MODEL --data FILE --sensitivity NEW.json",
            )
        try:
            return cls(
                origin=document["origin"],
                source=document["source"],
                data=tuple(document["data"]),
                samples=document["samples"],
                seq_len=document["seq_len"],
                head=document["head"],
                schemes=document["schemes"],
                layers={row["name"]: _layer(row) for row in document["layers"]},
                checks=_checks(document["checks"]),
            )
        except (KeyError, TypeError) as e:
            raise UsageError(f"{path}: is a damaged sensitivity file ({e})") from e

    def require(self, origin: Mapping[str, Any], path: Path) -> None:
        """Refuse to stand for another experiment.

        Args:
            origin: those of its keys that are known.
            path: of this file, for the message.

        Raises:
            NotComparableError: a value differs.
        """
        for key, value in origin.items():
            if self.origin[key] != value:
                raise NotComparableError(
                    f"{path}: was measured with another {_ORIGIN[key]} "
                    f"({_short(self.origin[key])}, not {_short(value)})",
                    remedy="give --sensitivity another file, or remove this one",
                )


def _layer(row: Mapping[str, Any]) -> Layer:
    n, k = row["shape"]
    return Layer((n, k), row["inputs"], {s: Cost(**cost) for s, cost in row["costs"].items()})


def _checks(found: Mapping[str, Any] | None) -> Checks | None:
    if found is None:
        return None
    single = tuple(Check(**row) for row in found["single"])
    return Checks(single, found["rank"], found["predicted"], found["measured"])


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:12]}…"
