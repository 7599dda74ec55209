"""Blocks trained on their output: inputs, schemes and starts that each algorithm is tested on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from quantkit import model as models
from quantkit.algorithms import Stats, gptq, rtn
from quantkit.calibrate import Calibrated, CalibrationData, calibrate
from quantkit.numerics import QTensor
from quantkit.plan import make_plan
from quantkit.recipe import Recipe
from quantkit.schemes import Granularity, QuantSpec, Scheme

IDS = torch.randint(0, 256, (6, 32), generator=torch.Generator().manual_seed(4))
SPECS = [
    QuantSpec(bits, granularity=Granularity.GROUP, group_size=32, symmetric=symmetric)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
]
SPECS += [
    QuantSpec(4),
    QuantSpec(4, symmetric=False),
    QuantSpec(8, granularity=Granularity.TENSOR),
    QuantSpec(8, granularity=Granularity.BLOCK, block=(10, 48)),
]
BITS = [Scheme(spec.label(), spec) for spec in SPECS if spec.granularity is Granularity.GROUP]
WITH_INPUTS = Scheme("a8", SPECS[4], QuantSpec(8, granularity=Granularity.TOKEN, dynamic=True))


def starts(weight: Tensor, spec: QuantSpec) -> dict[str, QTensor]:
    """The results of solvers: of either sign of scales, far from the nearest codes."""
    x = torch.randn(256, weight.shape[1], generator=torch.Generator().manual_seed(7))
    x = x + 2 * x[:, :1]
    stats = Stats(x.t() @ x / len(x), len(x))
    return {
        "rtn": rtn.solve(weight, Stats(), spec, {"clip": "none"}),
        "mse": rtn.solve(weight, Stats(), spec, {"clip": "mse"}),
        "gptq": gptq.solve(weight, stats, spec, gptq.OPTIONS),
    }


def through(x: Tensor, rounded: object) -> Tensor:
    return x + (rounded(x) - x).detach()  # type: ignore[operator]


def run(
    source: Path, work: Path, recipe: Recipe, ids: Tensor = IDS, **options: object
) -> tuple[models.SourceModel, Calibrated]:
    loaded = models.load_source(str(source))
    plan = make_plan(recipe, loaded.model, samples=len(ids), seq_len=ids.shape[1])
    return loaded, calibrate(loaded, plan, CalibrationData(ids, "hash"), work, **options)  # type: ignore[arg-type]


def same_model(a: models.SourceModel, b: models.SourceModel) -> bool:
    left, right = dict(a.model.named_parameters()), dict(b.model.named_parameters())
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
