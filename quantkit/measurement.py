"""From a model and text to a sensitivity file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy import stats

from quantkit import model as models
from quantkit.ablation import measure_ablations
from quantkit.curvature import Curvature, fits, measure_curvature
from quantkit.data.tokens import TokenBatches
from quantkit.mixture import candidate
from quantkit.progress import Reporter, silent_reporter
from quantkit.schemes import Scheme
from quantkit.sensitivity import Check, Checks, Cost, Layer, Sensitivity

#: Windows that checks are measured on.
CHECK_WINDOWS = 8


def origin(
    source: models.SourceModel,
    tokens: TokenBatches,
    schemes: Sequence[str],
    solver: str,
    seed: int,
    checks: int,
) -> dict[str, Any]:
    """What the numbers depend on; equal for equal measurements."""
    return {
        "weights": source.weight_hash,
        "data": tokens.hash,
        "schemes": list(schemes),
        "solver": solver,
        "seed": seed,
        "checks": checks,
    }


def measure_sensitivity(
    source: models.SourceModel,
    tokens: TokenBatches,
    schemes: Sequence[str],
    *,
    solver: str = "gptq",
    seed: int = 0,
    checks: int = 0,
    reporter: Reporter = silent_reporter,
) -> Sensitivity:
    """Estimate every layer's KL under every scheme, and measure some of them.

    Args:
        source: the original; converted to fp32 if there are checks.
        tokens: windows; half of them are differentiated.
        schemes: names, see `mixture.candidate`.
        solver: whose rounding errors are judged.
        seed: of the labels, and of what is checked.
        checks: how many layers to measure, each under one scheme.
        reporter: shows progress.

    Raises:
        UsageError, QuantkitError: see `curvature.measure_curvature`.
    """
    parsed = {label: candidate(label) for label in dict.fromkeys(schemes)}
    specs = {label: scheme for label, (scheme, _) in parsed.items()}
    chosen = _drawn(source, specs, checks, seed)
    with reporter("sensitivity") as progress:
        curvature = measure_curvature(
            source, tokens.ids, specs, solver, seed=seed, keep=chosen, progress=progress
        )
    layers = _layers(source, curvature, specs)
    found = None
    if chosen:
        with reporter("checks") as progress:
            ids = tokens.ids[len(tokens.ids) // 2 :][:CHECK_WINDOWS]
            alone, together = measure_ablations(source, ids, curvature.kept, progress=progress)
        found = _compared(layers, alone, together)
    return Sensitivity(
        origin=origin(source, tokens, list(parsed), solver, seed, checks),
        source=source.source,
        data=tuple(report.path for report in tokens.report),
        samples=len(tokens.ids),
        seq_len=tokens.ids.shape[1],
        head=models.head_name(source.model),
        schemes={label: written for label, (_, written) in parsed.items()},
        layers=layers,
        checks=found,
    )


def _layers(
    source: models.SourceModel, curvature: Curvature, schemes: Mapping[str, Scheme]
) -> dict[str, Layer]:
    bits = torch.finfo(source.model.dtype).bits
    leaders = {name: group[0] for group in curvature.groups for name in group}
    found = {}
    for name, module in models.linear_layers(source.model).items():
        if name not in leaders:
            continue
        shape = (module.out_features, module.in_features)
        costs = {
            scheme: Cost(schemes[scheme].weight.stored_bits(shape, bits), e.kl, e.error, e.direct)
            for scheme, e in curvature.estimates[name].items()
        }
        found[name] = Layer(shape, leaders[name], costs)
    return found


def _drawn(
    source: models.SourceModel, schemes: Mapping[str, Scheme], count: int, seed: int
) -> list[tuple[str, str]]:
    """Layers without repetition, the schemes in turn."""
    prefix, _ = models.find_blocks(source.model)
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in models.linear_layers(source.model).items()
        if name.startswith(f"{prefix}.")
    }
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(linears), generator=generator)[:count].tolist()
    names = list(linears)
    drawn = []
    for turn, at in enumerate(order):
        possible = [s for s, scheme in schemes.items() if fits(scheme, linears[names[at]])]
        if possible:  # else the measurement itself says which layer no scheme fits
            drawn.append((names[at], possible[turn % len(possible)]))
    return drawn


def _compared(
    layers: Mapping[str, Layer], alone: Mapping[tuple[str, str], float], together: float
) -> Checks:
    single = tuple(
        Check(name, scheme, layers[name].costs[scheme].kl, measured)
        for (name, scheme), measured in alone.items()
    )
    predicted = [check.predicted for check in single]
    rank = _spearman(predicted, [check.measured for check in single])
    return Checks(single, rank, sum(predicted), together)


def _spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of ranks; 0 where one side has no order."""
    if min(len(set(a)), len(set(b))) < 2:
        return 0.0
    return float(stats.spearmanr(a, b).statistic)
