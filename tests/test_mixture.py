"""Choosing schemes from a sensitivity file, and the recipe that says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantkit.algorithms import KNOWN
from quantkit.errors import NotComparableError, UsageError
from quantkit.mixture import (
    best_mixtures,
    candidate,
    choose_mixture,
    uniform_mixtures,
    write_recipe,
)
from quantkit.recipe import parse_recipe
from quantkit.schemes import parse_scheme
from quantkit.sensitivity import Check, Checks, Cost, Layer, Sensitivity

LABELS = ("w3a16-g64", "w4a16-g64", "w5a16-asym-g64", "w8a16-g64")
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def sensitivity() -> Sensitivity:
    """Four blocks; down_proj of the first is a hundred times as sensitive as any other layer."""
    parsed = {label: candidate(label) for label in LABELS}
    layers = {}
    for block in range(4):
        for group in GROUPS:
            for leaf in group:
                name = f"model.layers.{block}.{leaf}"
                scale = 1.0 if (block, leaf) == (0, "mlp.down_proj") else 0.01
                costs = {}
                for label, (scheme, _) in parsed.items():
                    bits = scheme.weight.stored_bits((64, 128))
                    kl = scale * 4.0**-scheme.weight.bits
                    costs[label] = Cost(bits, kl, 0.1 * kl, kl)
                layers[name] = Layer((64, 128), f"model.layers.{block}.{group[0]}", costs)
    origin = {
        "weights": "a" * 64,
        "data": "b" * 64,
        "schemes": list(LABELS),
        "solver": "gptq",
        "seed": 0,
        "checks": 0,
    }
    schemes = {label: written for label, (_, written) in parsed.items()}
    return Sensitivity(origin, "m", ("it's.jsonl",), 8, 64, "lm_head", schemes, layers)


@pytest.mark.parametrize("bits", [3.3, 4.25, 4.5, 6.0, 9.0])
def test_a_mixture_keeps_its_budget_and_beats_every_scheme_of_its_size(bits: float) -> None:
    found = sensitivity()
    mixture = choose_mixture(found, bits)
    assert mixture.bits <= bits * found.weights
    for uniform in uniform_mixtures(found).values():
        if uniform.bits <= bits * found.weights:
            assert mixture.kl <= uniform.kl * (1 + 1e-9)
    cost = sum(found.layers[n].costs[s].kl for n, s in mixture.chosen.items())
    assert cost == pytest.approx(mixture.kl)


def test_layers_of_one_input_share_a_scheme() -> None:
    found = sensitivity()
    chosen = choose_mixture(found, 4.4).chosen
    assert len(set(chosen.values())) > 1
    for name, layer in found.layers.items():
        assert chosen[name] == chosen[layer.inputs]
    assert chosen["model.layers.0.mlp.down_proj"] == "w8a16-g64"


def test_the_recipe_gives_each_layer_what_was_chosen() -> None:
    found = sensitivity()
    mixture = choose_mixture(found, 4.4)
    recipe = parse_recipe(write_recipe(found, mixture), known_algorithms=KNOWN)
    for name, label in mixture.chosen.items():
        scheme = recipe.scheme_for(name)
        assert scheme is not None
        assert scheme.weight == candidate(label)[0].weight, name
    assert recipe.is_kept("lm_head")
    assert not recipe.unmatched([*found.layers, "lm_head"])
    assert [source.path for source in recipe.calibrate.data] == ["it's.jsonl"]
    assert recipe.algorithm[0].name == "gptq"


def test_the_frontier_runs_from_the_smallest_to_the_best() -> None:
    found = sensitivity()
    points = best_mixtures(found)
    assert points[0][0] == pytest.approx(3.25)
    assert points[-1][0] == pytest.approx(8.25)
    uniform = uniform_mixtures(found)
    assert points[0][1] == pytest.approx(uniform["w3a16-g64"].kl)
    assert points[-1][1] == pytest.approx(uniform["w8a16-g64"].kl)


def test_a_scheme_that_fits_one_layer_of_a_group_only_is_not_given_to_it() -> None:
    found = sensitivity()
    layers = dict(found.layers)
    odd = layers["model.layers.1.self_attn.k_proj"]
    costs = {s: c for s, c in odd.costs.items() if s != "w3a16-g64"}
    layers["model.layers.1.self_attn.k_proj"] = replace(odd, costs=costs)
    found = replace(found, layers=layers)
    with pytest.raises(UsageError, match="the smallest schemes measured take 3"):
        choose_mixture(found, 3.25)
    assert choose_mixture(found, 3.4).chosen["model.layers.1.self_attn.q_proj"] != "w3a16-g64"
    assert "w3a16-g64" not in uniform_mixtures(found)


@pytest.mark.parametrize(
    ("label", "bits", "group", "symmetric"),
    [
        ("w4a16-g64", 4, 64, True),
        ("w5a16-g64", 5, 64, True),
        ("w3a16-asym-g32", 3, 32, False),
        ("w5a16-asym-g32", 5, 32, False),
        ("w6a16-channel", 6, None, True),
    ],
)
def test_names_of_candidates(label: str, bits: int, group: int | None, symmetric: bool) -> None:
    scheme, written = candidate(label)
    spec = scheme.weight
    assert (scheme.name, spec.bits, spec.group_size, spec.symmetric) == (
        label, bits, group, symmetric,
    )  # fmt: skip
    assert parse_scheme(written).weight == spec


@pytest.mark.parametrize("label", ["w9a16-g64", "w4a8-g64", "int4"])
def test_names_that_are_no_candidates(label: str) -> None:
    with pytest.raises(UsageError, match="unknown scheme"):
        candidate(label)


def test_a_file_reads_back_as_it_was(tmp_path: Path) -> None:
    checks = Checks((Check("model.layers.0.mlp.down_proj", LABELS[0], 0.1, 0.2),), 1.0, 0.1, 0.2)
    found = replace(sensitivity(), checks=checks)
    found.save(tmp_path / "s.json")
    again = Sensitivity.load(tmp_path / "s.json")
    assert again == found
    assert list(again.layers) == list(found.layers)


@pytest.mark.parametrize("key", ["weights", "data", "schemes", "solver", "seed", "checks"])
def test_a_file_does_not_stand_for_another_experiment(key: str) -> None:
    found = sensitivity()
    found.require(found.origin, Path("s.json"))
    with pytest.raises(NotComparableError, match=r"s\.json: was measured with another"):
        found.require({**found.origin, key: "other"}, Path("s.json"))


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema": "quantkit.sensitivity/1"}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="sensitivity file"):
        Sensitivity.load(path)
