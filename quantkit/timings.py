"""Latencies of one model on one set of prompts, as plain data.

TTFT is the time to the first token, TPOT the time per output token after it, both in seconds.
Two models' timings are paired by prompt, and mean something only when they were taken on one
host, interleaved, at one concurrency.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Of the file that `PairedTimings` are kept in.
SCHEMA = 1

#: What two timings must share to be compared.
HOST_KEYS = ("machine", "cpu", "threads")


@dataclass(frozen=True)
class Timings:
    """Latencies by prompt.

    Attributes:
        host: ``machine``, ``cpu`` and ``threads`` of the computer that ran both models.
        concurrency: requests in flight.
        ttft, tpot: by prompt id, seconds of each repeat after the warm-up.
    """

    host: Mapping[str, Any]
    concurrency: int
    ttft: Mapping[str, tuple[float, ...]]
    tpot: Mapping[str, tuple[float, ...]]

    def to_json(self) -> dict[str, Any]:
        return {
            "host": dict(self.host),
            "concurrency": self.concurrency,
            "ttft": {k: list(v) for k, v in self.ttft.items()},
            "tpot": {k: list(v) for k, v in self.tpot.items()},
        }

    @staticmethod
    def from_json(doc: Mapping[str, Any]) -> Timings:
        """Read `to_json` back.

        Raises:
            KeyError, TypeError, ValueError: not such a document, or a time that is not one.
        """

        def times(kind: str) -> dict[str, tuple[float, ...]]:
            table = {str(k): tuple(float(s) for s in v) for k, v in doc[kind].items()}
            for prompt, seconds in table.items():
                if not seconds or not all(0 < s < math.inf for s in seconds):
                    raise ValueError(f"{kind} of prompt {prompt!r} is {seconds}, not times above 0")
            return table

        return Timings(dict(doc["host"]), int(doc["concurrency"]), times("ttft"), times("tpot"))


@dataclass(frozen=True)
class Timed:
    """One side of a comparison: which system it was, by its fingerprint, and its latencies."""

    model: str
    kernels: str
    timings: Timings

    def to_json(self) -> dict[str, Any]:
        return {"model": self.model, "kernels": self.kernels, "timings": self.timings.to_json()}

    @staticmethod
    def from_json(doc: Mapping[str, Any]) -> Timed:
        """Read `to_json` back; raises as `Timings.from_json`."""
        return Timed(
            str(doc["model"]), str(doc["kernels"]), Timings.from_json(dict(doc["timings"]))
        )


@dataclass(frozen=True)
class PairedTimings:
    """Two models, timed in one session: what ``quantkit bench decode --timings`` writes."""

    candidate: Timed
    baseline: Timed

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "candidate": self.candidate.to_json(),
            "baseline": self.baseline.to_json(),
        }

    @staticmethod
    def from_json(doc: Mapping[str, Any]) -> PairedTimings:
        """Read `to_json` back; raises as `Timings.from_json`."""
        if doc["schema"] != SCHEMA:
            raise ValueError(f"schema {doc['schema']!r} is not {SCHEMA}")
        return PairedTimings(Timed.from_json(doc["candidate"]), Timed.from_json(doc["baseline"]))
