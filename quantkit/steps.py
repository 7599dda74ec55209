"""A layer's algorithm list: what stands where, and the values that options take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.algorithms import (
    RECONSTRUCTORS,
    REFINERS,
    RESCALERS,
    ROTATE,
    SOLVERS,
    Reconstructor,
    Refiner,
    Rescaler,
    Solver,
)
from quantkit.errors import UsageError
from quantkit.recipe import Recipe, Step
from quantkit.schemes import DType, ScaleFormat, Scheme


@dataclass(frozen=True)
class LayerSteps:
    """A layer's algorithms by where they stand in its list, their options filled in."""

    rescalers: tuple[Step, ...]
    solver: Step
    reconstructor: Step | None = None
    refiner: Step | None = None


def layer_steps(recipe: Recipe, name: str) -> LayerSteps:
    """A layer's algorithms, their options checked and filled in.

    Raises:
        UsageError: a list that cannot run, an unknown algorithm or option, or a value that an
            option does not take.
    """
    # A rotation belongs to the whole model: `plan_rotation` reads it.
    given = [step for step in recipe.algorithm_for(name) if step.name != ROTATE]
    steps = [_filled_in(step, name) for step in given]
    stages = [_stage(step) for step in steps]
    once = stages.count(1) == 1 and stages.count(2) <= 1 and stages.count(3) <= 1
    if not once or stages != sorted(stages):
        raise UsageError(
            f"{name}: algorithm list {[s.name for s in steps]}: exactly one solver is needed, "
            "behind any rescalers and in front of a reconstructor and a refiner",
            remedy=f"rescalers: {', '.join(RESCALERS)}; solvers: {', '.join(SOLVERS)}; "
            f"reconstructors: {', '.join(RECONSTRUCTORS)}; refiners: {', '.join(REFINERS)}",
        )
    at = stages.index(1)
    turned = any(step.name == ROTATE for step in recipe.algorithm)
    if steps[at].options.get("outputs") == "coupled" and turned:
        raise UsageError(
            f"{name}: outputs: coupled knows the original's outputs, and a rotation makes others "
            "of them",
            remedy="take one of the two out of the algorithm list",
        )
    behind = {stage: step for stage, step in zip(stages, steps, strict=True) if stage > 1}
    return LayerSteps(tuple(steps[:at]), steps[at], behind.get(2), behind.get(3))


def _stage(step: Step) -> int:
    """Where a step stands in a layer's list."""
    stages = [set(RESCALERS), set(SOLVERS), set(RECONSTRUCTORS), set(REFINERS)]
    return next(i for i, known in enumerate(stages) if step.name in known)


def check_reconstructible(name: str, algorithm: str, scheme: Scheme) -> None:
    """UsageError for a scheme whose codes are no integers."""
    if scheme.weight.dtype is not DType.INT:
        raise UsageError(
            f"{name}: {algorithm} trains integers and their scales, and {scheme.name} has "
            f"{scheme.weight.label()} weights",
            remedy=f"take {algorithm} out of this layer's algorithm list",
        )


def check_codes(name: str, solver: str, scheme: Scheme) -> None:
    """UsageError for a solver of integer codes that is asked for others."""
    if SOLVERS[solver].integers and scheme.weight.dtype is not DType.INT:
        raise UsageError(
            f"{name}: {solver} works in steps of integer codes, and {scheme.name} has "
            f"{scheme.weight.label()} weights",
            remedy="take imatrix or gptq for this layer, or an integer scheme",
        )


def check_trainable(name: str, scheme: Scheme, step: Step) -> None:
    """UsageError for a scheme whose scales cannot move in small steps, or whose codes cannot where
    they are to."""
    if step.options["weight_lr"] and scheme.weight.dtype is not DType.INT:
        raise UsageError(
            f"{name}: distill moves integers where `weight_lr` is above 0, and {scheme.name} has "
            f"{scheme.weight.label()} weights",
            remedy="take `weight_lr` out of this layer's distill step",
        )
    if scheme.weight.scale is not ScaleFormat.MODEL:
        raise UsageError(
            f"{name}: distill trains scales in the model's dtype, and {scheme.name} has "
            f"{scheme.weight.scale} scales",
            remedy="take distill out of this layer's algorithm list",
        )


def one_trainer(asking: Mapping[str, Step], scope: str) -> Step | None:
    """The one reconstructor, or the one refiner, of the whole model.

    Args:
        asking: layer → its step.
        scope: what is trained at once, such as ``"the whole model"``.

    Raises:
        UsageError: layers ask for different ones, or for one with different options.
    """
    steps = list(asking.items())
    for name, step in steps[1:]:
        first = steps[0][1]
        if step.name != first.name:
            raise UsageError(
                f"{steps[0][0]} asks for {first.name} and {name} for {step.name}, and either "
                f"trains {scope} at once",
                remedy="give both the same, or leave one of them out",
            )
        if step != first:
            raise UsageError(
                f"{steps[0][0]} and {name} ask for {step.name} with different options, and it "
                f"trains {scope} at once",
                remedy="give both the same options",
            )
    return steps[0][1] if steps else None


def weighs_costs(rescalers: Sequence[Step]) -> bool:
    """Whether one of these, options filled in, searches by what errors cost the model."""
    return any(
        step.options.get("cost") == "fisher" and "auto" in step.options.values()
        for step in rescalers
    )


def _filled_in(step: Step, name: str) -> Step:
    known: dict[str, Solver | Rescaler | Reconstructor | Refiner] = {
        **RESCALERS,
        **SOLVERS,
        **RECONSTRUCTORS,
        **REFINERS,
    }
    if step.name not in known:
        raise UsageError(
            f"{name}: unknown algorithm {step.name!r}",
            remedy=f"known: {', '.join([ROTATE, *known])}",
        )
    defaults = known[step.name].options
    unknown = set(step.options) - set(defaults)
    if unknown:
        raise UsageError(
            f"{step.name}: unknown option {min(unknown)!r}",
            remedy=f"known: {', '.join(defaults)}",
        )
    options = {**defaults, **step.options}
    for key, value in options.items():
        _check_option(step.name, key, value)
    if step.options.get("cost") == "fisher" and "auto" not in options.values():
        raise UsageError(
            f"{step.name}: cost 'fisher': nothing is searched, so that no error is weighed",
            remedy=f"set {_searched(options)}: auto, or take cost out",
        )
    if options.get("outputs") == "coupled" and not (options["fisher"] and options["refine"]):
        raise UsageError(
            f"{step.name}: outputs: coupled takes the gradients of fisher and the descent of "
            "refine",
            remedy="set both, such as fisher: 0.5 and refine: 3",
        )
    return Step(step.name, options)


def _searched(options: Mapping[str, Any]) -> str:
    """The option of a rescaler that a search by cost chooses."""
    return next(key for key in ("alpha", "threshold") if key in options)


#: Option → the words it takes, where the algorithm does not narrow them.
_WORDS = {
    "clip": ("none", "mse"),
    "actorder": ("static", "none"),
    "error": ("diagonal", "blocks"),
    "pairs": ("norms", "all"),
    "cost": ("output", "fisher"),
    "outputs": ("independent", "coupled"),
}


def _check_option(algorithm: str, key: str, value: Any) -> None:
    def refuse(rule: str) -> None:
        raise UsageError(f"{algorithm}: {key} {value!r}: {rule}")

    words = _WORDS.get(key)
    if words is not None and value not in words:
        refuse(f"is {' or '.join(words)}")
    if key == "damp" and not _is_number(value, 0, 10):
        refuse("is a number from 0 to 10")
    if key == "alpha" and value != "auto" and not _is_number(value, 0, 1):
        refuse("is auto or a number from 0 to 1")
    if key == "threshold" and value != "auto" and not _is_number(value, 0.1, 1e6):
        refuse("is auto or a number from 0.1")
    if key == "grid" and not (isinstance(value, int) and _is_number(value, 1, 1000)):
        refuse("is a whole number from 1 to 1000")
    if key == "answers" and not _is_number(value, 1, 1000):
        refuse("is a number from 1 to 1000")
    if key in ("steps", "windows") and not (type(value) is int and _is_number(value, 1, 100_000)):
        refuse("is a whole number from 1 to 100000")
    if key == "patience" and not (type(value) is int and _is_number(value, 0, 100_000)):
        refuse("is a whole number from 0 to 100000")
    if key in ("lr", "range_lr") and value != "auto" and not _is_number(value, 0, 0.5):
        refuse("is auto or a number from 0 to 0.5")
    if key == "seed" and not (type(value) is int and value >= 0):
        refuse("is a whole number from 0")
    if key in ("scale_lr", "norm_lr", "zero_lr", "weight_lr") and not _is_number(value, 0, 0.5):
        refuse("is a number from 0 to 0.5")
    if key == "p" and not (_is_number(value, 0, 2) and value > 0):
        refuse("is a number above 0, at most 2")
    if key == "iterations" and not (type(value) is int and _is_number(value, 1, 1000)):
        refuse("is a whole number from 1 to 1000")
    if key == "refine" and not (type(value) is int and _is_number(value, 0, 100)):
        refuse("is a whole number from 0 to 100")
    if key in ("feedback", "fisher") and not _is_number(value, 0, 1):
        refuse("is a number from 0 to 1")


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
