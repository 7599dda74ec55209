"""Statistics of a group whose layers quantize their common input in different ways."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from quantkit.algorithms import gptq
from quantkit.collector import Collector
from quantkit.plan import PlannedLayer
from quantkit.quantize import QuantizedLayer
from quantkit.recipe import Step
from quantkit.schemes import SCHEMES, Granularity, QuantSpec, Scheme

N, K = 16, 64

#: Coarse enough that its Hessian gives other codes.
INT4_TOKENS = QuantSpec(bits=4, granularity=Granularity.TOKEN, dynamic=True)

SCHEMES_BY_NAME = {
    "dynamic": Scheme("w3a4", SCHEMES["w3a16-channel"].weight, INT4_TOKENS),
    "plain": SCHEMES["w3a16-channel"],
    "static int8": SCHEMES["w8a8-static"],
    "static fp8": SCHEMES["fp8-static"],
}


def layers() -> tuple[list[PlannedLayer], dict[str, nn.Linear]]:
    torch.manual_seed(0)
    planned, linears = [], {}
    for name, scheme in SCHEMES_BY_NAME.items():
        options = {**gptq.OPTIONS, "clip": "none"}
        planned.append(PlannedLayer(name, 0, (N, K), scheme, "gptq", options))
        linears[name] = nn.Linear(K, N, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    return planned, linears


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    spread = torch.logspace(-2, 1, K)
    return [
        (torch.randn(2, 40, K, generator=generator) * spread).to(torch.bfloat16) for _ in range(3)
    ]


def solve(
    members: Sequence[PlannedLayer], linears: dict[str, nn.Linear]
) -> dict[str, QuantizedLayer]:
    # The threshold that squared error chooses depends on the format that it is chosen for.
    collector = Collector(members, Step("mse"))
    for x in inputs():
        collector.update(x)
    return collector.solve(linears)


@pytest.mark.parametrize("first", SCHEMES_BY_NAME)
def test_a_layer_is_solved_as_if_it_were_alone(first: str) -> None:
    """Whichever layer of the group comes first."""
    planned, linears = layers()
    members = sorted(planned, key=lambda layer: layer.name != first)
    together = solve(members, linears)
    assert together.keys() == SCHEMES_BY_NAME.keys()
    for layer in members:
        alone = solve([layer], linears)[layer.name]
        mixed = together[layer.name]
        assert torch.equal(mixed.qtensor.codes, alone.qtensor.codes), layer.name
        assert torch.equal(mixed.qtensor.scale, alone.qtensor.scale), layer.name
        assert mixed.output_error == alone.output_error
        if alone.input_scale is None:
            assert mixed.input_scale is None
        else:
            assert torch.equal(mixed.input_scale, alone.input_scale), layer.name


def test_the_schemes_of_this_group_tell_statistics_apart() -> None:
    """Or the test above could not fail."""
    planned, linears = layers()
    by_name = {layer.name: layer for layer in planned}
    weight = linears["plain"].weight
    same = {"dynamic": nn.Linear(K, N, bias=False), "plain": nn.Linear(K, N, bias=False)}
    for linear in same.values():
        linear.weight = weight
    solved = solve([by_name["dynamic"]], same) | solve([by_name["plain"]], same)
    assert not torch.equal(solved["dynamic"].qtensor.codes, solved["plain"].qtensor.codes)
    ranges = []
    for name in ("static int8", "static fp8"):
        collector = Collector([by_name[name]], Step("mse"))
        for x in inputs():
            collector.update(x)
        assert collector.candidates is not None
        spec = by_name[name].scheme.input
        assert spec is not None
        [found] = collector.candidates.ranges(spec).values()
        ranges.append(torch.stack(found))
    for a, b in itertools.combinations(ranges, 2):
        assert not torch.equal(a, b)
