"""How often a gate passes a model that sits exactly at its allowed loss.

    python -m benchmarks.gate_simulation [--json]

A model whose true loss is the margin should pass 5 % of the time at most. Every cell is exact:
the probabilities of all (gains, losses) that a rule passes are summed, so there is no seed.

    tango   quantkit's gate: Tango's score test, lower 95 % bound above -margin
    wald    the textbook interval, D ± z √((flips - D²) / n)
    point   comparing scores: D ≥ -margin

``n/a``: a flip rate below the margin cannot lose the margin, so there is no null to test.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import special

from quantkit.gate.statistics import tango_z

Floats = NDArray[np.float64]

SIZES = (50, 200, 1000)
FLIP_RATES = (0.02, 0.05, 0.2)
MARGINS = (0.01, 0.02, 0.05, 0.1)
Z95 = float(special.ndtri(0.95))


def trinomial(n: int, flips: float, difference: float) -> tuple[Floats, Floats, Floats]:
    """(gains, losses, probability) of every outcome but those below 1e-12 in all.

    Args:
        n: items.
        flips: ψ, the share of items that flip.
        difference: D, gains minus losses as a share, ``|D| ≤ ψ``.
    """
    spread = 9 * math.sqrt(n * flips * (1 - flips)) + 20
    m = np.arange(max(0, int(n * flips - spread)), min(n, int(n * flips + spread)) + 1)
    losses, total = (a.ravel().astype(float) for a in np.meshgrid(np.arange(m[-1] + 1), m))
    inside = losses <= total
    losses, total = losses[inside], total[inside]
    share = (flips - difference) / (2 * flips)

    def binomial(k: Floats, of: Floats | int, p: float) -> Floats:
        coefficient = special.gammaln(of + 1) - special.gammaln(k + 1) - special.gammaln(of - k + 1)
        return np.asarray(np.exp(coefficient + special.xlogy(k, p) + special.xlog1py(of - k, -p)))

    weight = binomial(total, n, flips) * binomial(losses, total, share)
    return total - losses, losses, weight


def tango(gains: Floats, losses: Floats, n: int, margin: float) -> NDArray[np.bool_]:
    return np.asarray(tango_z(gains, losses, n, -margin) > Z95)


def wald(gains: Floats, losses: Floats, n: int, margin: float) -> NDArray[np.bool_]:
    d, flips = (gains - losses) / n, (gains + losses) / n
    return np.asarray(d - Z95 * np.sqrt(np.maximum(flips - d * d, 0) / n) > -margin)


def point(gains: Floats, losses: Floats, n: int, margin: float) -> NDArray[np.bool_]:
    return np.asarray(gains - losses >= -margin * n - 1e-9)


RULES: dict[str, Callable[[Floats, Floats, int, float], NDArray[np.bool_]]] = {
    "tango": tango,
    "wald": wald,
    "point": point,
}


def pass_rate(rule: str, n: int, flips: float, margin: float, difference: float) -> float:
    """Exact probability that a rule passes a model of this flip rate and difference."""
    gains, losses, weight = trinomial(n, flips, difference)
    return float(weight[RULES[rule](gains, losses, n, margin)].sum())


def type_one_errors(n: int, flips: float, margin: float) -> dict[str, float] | None:
    """Pass rates at a true loss of exactly the margin; None where flips cannot lose that much."""
    if margin > flips:
        return None
    return {rule: pass_rate(rule, n, flips, margin, -margin) for rule in RULES}


def main() -> None:
    parser = argparse.ArgumentParser(description="How often gates pass a model at its margin.")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    as_json = parser.parse_args().json
    rows = [
        {"n": n, "flips": flips, "margin": margin, "errors": type_one_errors(n, flips, margin)}
        for n in SIZES
        for flips in FLIP_RATES
        for margin in MARGINS
    ]
    if as_json:
        print(json.dumps({"pass_rate_at_the_margin": rows}))
        return
    print(f"{'items':>5}  {'flips':>6}  {'margin':>6}  {'tango':>6}  {'wald':>6}  {'point':>6}")
    for row in rows:
        head = f"{row['n']:>5}  {row['flips']:>6.0%}  {row['margin']:>6.0%}  "
        errors = row["errors"]
        if errors is None:
            print(head + "  ".join(f"{'n/a':>6}" for _ in RULES))
            continue
        print(head + "  ".join(f"{errors[rule]:>6.3f}" for rule in RULES))


if __name__ == "__main__":
    main()
