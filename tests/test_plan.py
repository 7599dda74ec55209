"""Plans: what will be done to each layer, refused before any work when it cannot be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from quantkit import model as models
from quantkit.algorithms import KNOWN
from quantkit.errors import UsageError
from quantkit.observers import OBSERVER_OPTIONS
from quantkit.plan import make_plan
from quantkit.recipe import (
    KV_CACHES,
    Recipe,
    Rule,
    Step,
    installed_recipes,
    load_recipe,
    parse_recipe,
)
from quantkit.schemes import SCHEMES, parse_scheme
from tests.conftest import tiny_llama


@pytest.fixture(scope="module")
def model(tiny: Path):  # type: ignore[no-untyped-def]
    return models.load_source(str(tiny)).model


def test_every_layer_is_planned_or_kept(model) -> None:  # type: ignore[no-untyped-def]
    plan = make_plan(Recipe(SCHEMES["w4a16-g64"], keep=("lm_head",)), model, samples=2, seq_len=8)
    assert {x.name for x in plan.layers} | set(plan.kept) == set(models.linear_layers(model))
    assert plan.bits_per_weight == pytest.approx(4.25)
    assert plan.kept == ("lm_head",)
    assert not plan.unties_head


def test_theoretical_size_counts_a_tied_head_once(model) -> None:  # type: ignore[no-untyped-def]
    kept = make_plan(Recipe(SCHEMES["w8a16"], keep=("lm_head",)), model, samples=2, seq_len=8)
    whole = make_plan(Recipe(SCHEMES["w8a16"]), model, samples=2, seq_len=8)
    head = 272 * 384 + 272 * 2  # int8 codes and a bf16 scale a row
    assert whole.size_bytes - kept.size_bytes == head
    assert kept.source_bytes == whole.source_bytes


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(parse_scheme({"weight": {"bits": 4, "group_size": 100}})),
         r"q_proj: in_features 384 is not divisible by group 100; try 16 or 32 or 64 or 96"),
        (Recipe(SCHEMES["w8a16"], keep=("*.nothing",)), r"pattern '\*\.nothing' matches no layer"),
        (Recipe(SCHEMES["w8a16"], algorithm=(Step("gptk"),)), "unknown algorithm 'gptk'"),
        (Recipe(SCHEMES["w8a16"], algorithm=(Step("rtn"), Step("gptq"))), "exactly one solver"),
        (Recipe(SCHEMES["w8a16"], algorithm=(Step("gptq", {"dump": 1}),)), "unknown option 'dump'"),
        (Recipe(SCHEMES["w8a16"], algorithm=(Step("gptq", {"damp": -1}),)), "damp -1"),
        (Recipe(SCHEMES["w8a16"], algorithm=(Step("rtn", {"clip": "max"}),)), "clip 'max'"),
        (Recipe(SCHEMES["w8a16"], algorithm=(Step("imatrix", {"error": "x"}),)),
         "error 'x': is diagonal or blocks"),
        (Recipe(SCHEMES["w8a16"], algorithm=(Step("gptq", {"feedback": 2}),)), "feedback 2: is a"),
        (Recipe(SCHEMES["w8a16"], rules=(Rule("*", None),)), "keeps every layer"),
    ],
)  # fmt: skip
def test_refusals(recipe: Recipe, message: str, model) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=message):
        make_plan(recipe, model, samples=2, seq_len=8)


@pytest.mark.parametrize("kv", KV_CACHES)
def test_a_quantized_cache_needs_data_and_two_scales_a_block(kv: str, model) -> None:  # type: ignore[no-untyped-def]
    plain = make_plan(Recipe(SCHEMES["w8a16"]), model, samples=2, seq_len=8)
    cached = make_plan(
        Recipe(SCHEMES["w8a16"], kv_cache=KV_CACHES[kv]), model, samples=2, seq_len=8
    )
    assert cached.caches == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    assert cached.caches_in(1) == ["model.layers.1.self_attn"]
    assert cached.size_bytes - plain.size_bytes == 2 * 2 * 2
    assert (plain.needs_data, cached.needs_data) == (False, True)
    assert cached.digest != plain.digest


def test_a_block_without_a_cache_of_its_own_is_refused() -> None:
    model = tiny_llama()
    model.model.layers[1].self_attn = torch.nn.Identity()
    with pytest.raises(UsageError, match=r"kv_cache: 1 modules .* in 2 blocks"):
        make_plan(Recipe(SCHEMES["w8a16"], kv_cache=KV_CACHES["fp8"]), model, samples=2, seq_len=8)


@pytest.mark.parametrize("name", installed_recipes())
def test_every_installed_recipe_plans(name: str) -> None:
    plan = make_plan(load_recipe(name), tiny_llama(), samples=4, seq_len=16)
    assert plan.layers
    assert plan.size_bytes < plan.source_bytes


PAGES = Path(__file__).parent.parent / "docs" / "algorithms"


def test_every_algorithm_has_a_page() -> None:
    names = {path.stem for path in PAGES.glob("*.md")} - {"README", "observers"}
    assert names == set(KNOWN)
    listed = set(re.findall(r"\[(\w+)\]\(\1\.md\)", (PAGES / "README.md").read_text()))
    assert listed == names


@pytest.mark.parametrize("name", KNOWN)
def test_the_recipe_of_every_page_plans(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text()
    [example] = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    recipe = parse_recipe(example, known_algorithms=KNOWN)
    assert name in {step.name for step in recipe.algorithm}
    assert make_plan(recipe, tiny_llama(), samples=4, seq_len=16).layers
    assert "When it hurts" in text
    assert "Reference" in text


def test_digest_follows_the_plan(model) -> None:  # type: ignore[no-untyped-def]
    one = make_plan(Recipe(SCHEMES["w4a16-g64"]), model, samples=2, seq_len=8)
    again = make_plan(Recipe(SCHEMES["w4a16-g64"]), model, samples=2, seq_len=8)
    other = make_plan(Recipe(SCHEMES["w4a16-g32"]), model, samples=2, seq_len=8)
    assert one.digest == again.digest != other.digest


def test_the_recipe_of_the_observers_page_plans() -> None:
    text = (PAGES / "observers.md").read_text()
    [example] = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    recipe = parse_recipe(example, known_observers=OBSERVER_OPTIONS)
    assert recipe.calibrate.observer.name == "auto"
    assert make_plan(recipe, tiny_llama(), samples=4, seq_len=16).layers
    for name in OBSERVER_OPTIONS:
        assert f"| `{name}` |" in text
