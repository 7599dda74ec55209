"""Quantization algorithms: tensors in, tensors out; they never see a module.

A solver is ``(weight [N, K] fp32 or the model's dtype, stats, spec, options) → QTensor``.
A rescaler is ``(scaling, options) → scales [P]``: what to divide each channel of an input by
before the layers that read it are solved. `rotate` turns the whole model before either; a
reconstructor trains on a block's error after both, a refiner on the whole model's. A recipe's list
is at most one `rotate`, any number of rescalers, one solver, at most one reconstructor, at most one
refiner.

To add one: one file with an ``OPTIONS`` table and a function, and a row in `SOLVERS`, `RESCALERS`,
`RECONSTRUCTORS` or `REFINERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quantkit.algorithms import (
    awq,
    blockdistill,
    distill,
    gptq,
    hqq,
    imatrix,
    outliers,
    rotate,
    rtn,
    signround,
    smoothquant,
)
from quantkit.algorithms.scaling import Scaling
from quantkit.algorithms.training import Solved, Training
from quantkit.numerics import QTensor
from quantkit.schemes import QuantSpec


@dataclass(frozen=True)
class Stats:
    """What calibration learnt about the input of one layer.

    Attributes:
        hessian: fp32 ``[K, K]``, xᵀx / tokens over every calibration token; None for a
            solver that does not ask for it.
        tokens: how many tokens were seen.
        drift: fp32 ``[K, K]``, (x̃ − x)ᵀx / tokens with x̃ the unquantized model's inputs; None
            for a solver that does not ask for it.
        outputs: diagonal blocks of the Fisher matrix of the layer's outputs, ``[n, n]`` each, N
            rows in all; empty where outputs are taken to be independent.
    """

    hessian: Tensor | None = None
    tokens: int = 0
    drift: Tensor | None = None
    outputs: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Solver:
    """A solver with its options (name → default), whether it needs a Hessian, whether it
    rounds to nearest by design: a result of any other that does is an error (`quantkit.rounding`);
    and whether it takes integer codes only.
    """

    solve: Callable[[Tensor, Stats, QuantSpec, Mapping[str, Any]], QTensor]
    options: Mapping[str, Any]
    needs_hessian: bool
    nearest: bool = False
    integers: bool = False


SOLVERS: dict[str, Solver] = {
    "rtn": Solver(rtn.solve, rtn.OPTIONS, needs_hessian=False, nearest=True),
    "gptq": Solver(gptq.solve, gptq.OPTIONS, needs_hessian=True),
    "imatrix": Solver(imatrix.solve, imatrix.OPTIONS, needs_hessian=True, nearest=True),
    "hqq": Solver(hqq.solve, hqq.OPTIONS, needs_hessian=False, nearest=True, integers=True),
}


@dataclass(frozen=True)
class Rescaler:
    """A rescaler with its options (name → default) and whether it needs a Hessian."""

    scales: Callable[[Scaling, Mapping[str, Any]], Tensor]
    options: Mapping[str, Any]
    needs_hessian: bool


RESCALERS: dict[str, Rescaler] = {
    "smoothquant": Rescaler(smoothquant.scales, smoothquant.OPTIONS, needs_hessian=False),
    "awq": Rescaler(awq.scales, awq.OPTIONS, needs_hessian=True),
    "outliers": Rescaler(outliers.scales, outliers.OPTIONS, needs_hessian=False),
}


@dataclass(frozen=True)
class Reconstructor:
    """What trains a block once its layers are solved, with its options (name → default); and
    whether it holds windows back, to be judged on those alone."""

    start: Callable[[Solved, Mapping[str, Any]], Training]
    options: Mapping[str, Any]
    holds_back: bool = False


RECONSTRUCTORS: dict[str, Reconstructor] = {
    "signround": Reconstructor(signround.SignRound, signround.OPTIONS),
    "blockdistill": Reconstructor(blockdistill.BlockDistill, blockdistill.OPTIONS, holds_back=True),
}


@dataclass(frozen=True)
class Refiner:
    """What trains on the whole model once every layer is solved, with its options."""

    options: Mapping[str, Any]


REFINERS: dict[str, Refiner] = {"distill": Refiner(distill.OPTIONS)}

#: The name of the one algorithm that is none of these: it belongs to no layer.
ROTATE = "rotate"

#: For recipe validation: algorithm → the options it knows.
KNOWN: dict[str, frozenset[str]] = {
    ROTATE: frozenset(rotate.OPTIONS),
    **{name: frozenset(solver.options) for name, solver in SOLVERS.items()},
    **{name: frozenset(rescaler.options) for name, rescaler in RESCALERS.items()},
    **{name: frozenset(trained.options) for name, trained in RECONSTRUCTORS.items()},
    **{name: frozenset(refiner.options) for name, refiner in REFINERS.items()},
}
