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
