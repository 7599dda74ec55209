"""Who sends the load: shares of the requests, each with an API key and promises of its own.

.. code-block:: yaml

    paid: {share: 0.2, key_file: paid.key, ttft: 1.0, tpot: 0.1}
    free: {share: 0.8, key_file: free.key, ttft: 20}

Promises are seconds: ``ttft`` to the first token, ``tpot`` per output token after it, ``e2e`` to
the last one. An answer counts if it keeps all that its tier has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import UsageError
from quantkit.evals.endpoint import read_key
from quantkit.strict_yaml import Node, compose

#: The tier of a load without a file of them.
DEFAULT = "all"


@dataclass(frozen=True)
class Slo:
    """Service-level objective: seconds at most; None promises nothing."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @property
    def promises(self) -> bool:
        return self != Slo()


@dataclass(frozen=True)
class LoadTier:
    """A class of clients.

    Attributes:
        name: label of its rows.
        share: of all requests; those of all tiers add up to 1.
        slo: what its answers must keep.
        key: bearer token; None sends none.
    """

    name: str
    share: float
    slo: Slo
    key: str | None = None


def read_tiers(path: Path) -> tuple[LoadTier, ...]:
    """Read a file of tiers. Key files lie beside it unless their path is absolute.

    Raises:
        UsageError: with file and line, for everything that is not as above.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"tiers {path} cannot be read: {error}") from error
    root = compose(text, str(path))
    tiers = tuple(_tier(name, node, path.parent) for name, node in root.mapping().items())
    total = sum(tier.share for tier in tiers)
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        root.fail(f"shares add up to {total:g}", "make it 1")
    return tiers


def _tier(name: str, node: Node, folder: Path) -> LoadTier:
    fields = node.mapping(("share", "key_file", "ttft", "tpot", "e2e"), ("share",))
    slo = {key: fields[key].positive() for key in ("ttft", "tpot", "e2e") if key in fields}
    key = read_key(folder / fields["key_file"].text()) if "key_file" in fields else None
    return LoadTier(name, fields["share"].positive(), Slo(**slo), key)
