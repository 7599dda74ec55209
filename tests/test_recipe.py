"""Recipes: what is read, and the exact words for every mistake."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from quantkit.algorithms import KNOWN
from quantkit.errors import UsageError
from quantkit.observers import OBSERVER_OPTIONS, Candidates
from quantkit.recipe import (
    KV_CACHES,
    Calibration,
    Recipe,
    Rule,
    SourceSpec,
    Step,
    installed_recipes,
    load_recipe,
    matches,
    parse_recipe,
)
from quantkit.schemes import SCHEMES

ROOT = Path(__file__).parent.parent

#: Installed recipes that quantize the output layer too.
QUANTIZED_HEADS = {"w4a16-head8", "w8a8-head8", "w8a16-g32"}

FULL = r"""
model: some/model
scheme: w4a16-g64
algorithm: [rtn, {gptq: {damp: 1e-2, actorder: static}}]
keep: [lm_head, 're:.*\.1\.mlp\..*']
rules:
  - {match: "*.down_proj", scheme: w8a16, algorithm: rtn}
  - {match: "*.layers.0.*", scheme: keep}
  - match: "*.layers.0.up_proj"
    scheme: {weight: {bits: 5, group_size: 32, symmetric: false}}
kv_cache: fp8
calibrate:
  data: [evals:support_intent, {path: chats.jsonl, weight: 3, field: messages, split: train}]
  samples: 7
  seq_len: 64
  seed: 5
  chat_template: false
  observer: {percentile: {p: 99.9}}
suites: [support_intent]
gate:
  kl.mean: {max: 5e-2}
  support_intent.acc: {margin: 0.05}
"""


def parse(text: str) -> Recipe:
    return parse_recipe(
        text, Path("r.yaml"), known_algorithms=KNOWN, known_observers=OBSERVER_OPTIONS
    )


def test_every_key_is_read() -> None:
    recipe = parse(FULL)
    assert recipe.model == "some/model"
    assert recipe.scheme == dataclasses.replace(SCHEMES["w4a16-g64"], kv=KV_CACHES["fp8"])
    assert recipe.kv_cache == KV_CACHES["fp8"]
    assert recipe.algorithm == (Step("rtn"), Step("gptq", {"damp": 0.01, "actorder": "static"}))
    assert recipe.keep == ("lm_head", r"re:.*\.1\.mlp\..*")
    assert recipe.rules[0] == Rule(
        "*.down_proj",
        dataclasses.replace(SCHEMES["w8a16"], kv=KV_CACHES["fp8"]),
        (Step("rtn"),),
    )
    assert recipe.rules[1] == Rule("*.layers.0.*", None)
    assert recipe.rules[2].scheme is not None
    assert recipe.rules[2].scheme.weight.label() == "int5 asym g32"
    assert recipe.calibrate == Calibration(
        data=(
            SourceSpec("evals:support_intent"),
            SourceSpec("chats.jsonl", 3.0, "messages", "train"),
        ),
        samples=7,
        seq_len=64,
        seed=5,
        chat_template=False,
        observer=Step("percentile", {"p": 99.9}),
    )
    assert recipe.suites == ("support_intent",)
    assert recipe.gate == {"kl.mean": {"max": 0.05}, "support_intent.acc": {"margin": 0.05}}
    assert recipe.gate_lines == {"kl.mean": 21, "support_intent.acc": 22}
    assert len(recipe.sha256) == 64
    assert dataclasses.asdict(recipe)["calibrate"]["samples"] == 7


def test_only_the_scheme_is_required() -> None:
    recipe = parse("scheme: w8a8\n")
    assert recipe.scheme is not None
    assert recipe.algorithm == (Step("rtn"),)
    assert recipe.calibrate == Calibration()
    assert recipe.calibrate.observer == Step("minmax")
    assert recipe.kv_cache is None
    assert recipe.gate == {}


def test_the_hash_is_the_texts() -> None:
    assert parse("scheme: w8a8\n").sha256 == parse("scheme: w8a8\n").sha256
    assert parse("scheme: w8a8\n").sha256 != parse("scheme: w8a8 # why\n").sha256


MISTAKES = [
    ("{}", "r.yaml:1 no scheme; add a line such as `scheme: w8a16`"),
    ("", "r.yaml:1 is empty"),
    ("[w8a8]", "r.yaml:1 file: a list is not a mapping"),
    ("schema: w8a8", "r.yaml:1 unknown key 'schema'; did you mean 'scheme'?"),
    (
        "scheme: w8a8\ncalibrate:\n  sampels: 3",
        "r.yaml:3 unknown key 'sampels'; did you mean 'samples'?",
    ),
    (
        "scheme:\n  weight:\n    bits: 4\n    grop: 64",
        "r.yaml:4 unknown key 'grop'; did you mean 'group_size'?",
    ),
    (
        "scheme: w8a8\nzzz: 1",
        "r.yaml:2 unknown key 'zzz'; known: model, scheme, algorithm, keep, rules, kv_cache, "
        "calibrate, suites, gate",
    ),
    ("scheme: w8a8\nscheme: fp8", "r.yaml:2 key 'scheme' appears twice; first on line 1"),
    (
        "scheme: w8a8\ngate:\n  kl.mean: {max: 1, max: 2}",
        "r.yaml:3 key 'max' appears twice; first on line 3",
    ),
    ("scheme: w8a9", "r.yaml:1 unknown scheme 'w8a9'; did you mean 'w8a8'?"),
    ("scheme: 8", "r.yaml:1 scheme: 8 is not text; quote it if it is a name"),
    ("scheme:", "r.yaml:1 scheme: nothing is not text; quote it if it is a name"),
    ("scheme: keep", "r.yaml:1 scheme: keep would quantize nothing; name a scheme"),
    (
        "\nscheme: {weight: {bits: 9}}",
        "r.yaml:2 int9: integer codes have 2 to 8 bits",
    ),
    (
        "scheme: w8a8\nalgorithm: gtpq",
        "r.yaml:2 unknown algorithm 'gtpq'; did you mean 'gptq'?",
    ),
    (
        "scheme: w8a8\nalgorithm:\n  gptq:\n    dampp: 0.1",
        "r.yaml:4 unknown key 'dampp'; did you mean 'damp'?",
    ),
    (
        "scheme: w8a8\nalgorithm: {rtn: {}, gptq: {}}",
        "r.yaml:2 algorithm: 2 names in one mapping have no order; "
        "write a list with one name an item",
    ),
    (
        "scheme: w8a8\nalgorithm: {gptq: 0.01}",
        "r.yaml:2 gptq: 0.01 is not a mapping",
    ),
    ("scheme: w8a8\nkeep: lm_head", "r.yaml:2 keep: 'lm_head' is not a list; write [a, b]"),
    (
        "scheme: w8a8\nkeep: ['re:(']",
        "r.yaml:2 're:(' is not a regular expression: missing ), unterminated subpattern "
        "at position 0",
    ),
    (
        "scheme: w8a8\nrules:\n  - {match: a}",
        "r.yaml:3 rules: no scheme; needs match and scheme",
    ),
    (
        "scheme: w8a8\nrules:\n  - {match: a, scheme: keep, algorithm: rtn}",
        "r.yaml:3 scheme: keep takes no algorithm; drop the key",
    ),
    (
        "scheme: w8a8\nkv_cache: int4",
        "r.yaml:2 kv_cache: 'int4' is not supported; known: fp8, int8",
    ),
    (
        "scheme: w8a8\ncalibrate: {samples: many}",
        "r.yaml:2 samples: 'many' is not a whole number",
    ),
    (
        "scheme: w8a8\ncalibrate: {samples: true}",
        "r.yaml:2 samples: True is not a whole number",
    ),
    ("scheme: w8a8\ncalibrate: {samples: 0}", "r.yaml:2 samples: 0 is below 1"),
    ("scheme: w8a8\ncalibrate: {seq_len: 1}", "r.yaml:2 seq_len: 1 is below 2"),
    ("scheme: w8a8\ncalibrate: {seed: -1}", "r.yaml:2 seed: -1 is below 0"),
    (
        "scheme: w8a8\ncalibrate: {apart: 1.5}",
        "r.yaml:2 apart: 1.5 is not from 0 to 1",
    ),
    (
        "scheme: w8a8\ncalibrate: {apart: all}",
        "r.yaml:2 apart: 'all' is not a number",
    ),
    (
        "scheme: w8a8\ncalibrate: {chat_template: 'yes'}",
        "r.yaml:2 chat_template: 'yes' is not true or false",
    ),
    (
        "scheme: w8a8\ncalibrate: {data: [{weight: 2}]}",
        "r.yaml:2 data: no path; needs path",
    ),
    (
        "scheme: w8a8\ncalibrate: {data: [{path: x, weight: -2}]}",
        "r.yaml:2 weight: -2 is not positive and finite",
    ),
    (
        "scheme: w8a8\ncalibrate: {data: [{path: x, weight: .nan}]}",
        "r.yaml:2 weight: nan is not positive and finite",
    ),
    (
        "scheme: w8a8\ncalibrate: {data: [{path: x, weight: heavy}]}",
        "r.yaml:2 weight: 'heavy' is not a number",
    ),
    (
        "scheme: w8a8\ncalibrate: {observer: minmix}",
        "r.yaml:2 unknown observer 'minmix'; did you mean 'minmax'?",
    ),
    (
        "scheme: w8a8\ncalibrate: {observer: {minmax: {p: 1}}}",
        "r.yaml:2 unknown key 'p'; it takes none",
    ),
    (
        "scheme: w8a8\ncalibrate: {observer: [mse, minmax]}",
        "r.yaml:2 observer: 2 given, one is needed",
    ),
    ("scheme: w8a8\ngate: strict", "r.yaml:2 gate: 'strict' is not a mapping"),
    ("scheme: w8a8\ngate: {1: 2}", "r.yaml:2 a key: 1 is not text; quote it if it is a name"),
    (
        "scheme: w8a8\nkeep: &a [x]\nsuites: *a",
        "r.yaml:3 YAML aliases are not allowed; write the value out",
    ),
    (
        "scheme: !!python/name:os.system",
        "r.yaml:1 scheme: the YAML tag 'tag:yaml.org,2002:python/name:os.system' "
        "is not allowed here",
    ),
    (
        "scheme: w8a8\nmodel: !!int x",
        "r.yaml:2 model: 'x' is not of the YAML type int",
    ),
    (
        "scheme: w8a8\nmodel: !!int ''",
        "r.yaml:2 model: '' is not of the YAML type int",
    ),
    (
        "scheme: w8a8\nkeep: [a",
        "r.yaml:2 is not YAML: expected ',' or ']', but got '<stream end>'",
    ),
    ("scheme: w8a8\n---\nscheme: fp8", "r.yaml:2 is not YAML: but found another document"),
    ("[" * 500 + "]" * 500, "r.yaml:1 is nested too deeply"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[m[:50] for _, m in MISTAKES])
def test_mistakes_name_the_line_and_the_remedy(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert str(caught.value) == message


def test_names_are_free_without_tables() -> None:
    recipe = parse_recipe("scheme: w8a8\nalgorithm: {mine: {depth: 2}}")
    assert recipe.algorithm == (Step("mine", {"depth": 2}),)


def test_keep_wins_and_the_last_rule_wins() -> None:
    recipe = parse(FULL)
    down = recipe.scheme_for("model.layers.3.mlp.down_proj")
    assert down is not None
    assert down.name == "w8a16"
    assert recipe.algorithm_for("model.layers.3.mlp.down_proj") == (Step("rtn"),)
    assert recipe.algorithm_for("model.layers.3.mlp.up_proj") == recipe.algorithm
    assert recipe.scheme_for("model.layers.3.mlp.up_proj") == recipe.scheme
    assert recipe.is_kept("model.layers.0.mlp.down_proj")  # the later rule
    assert recipe.is_kept("model.layers.1.mlp.down_proj")  # keep, over the rule
    assert recipe.is_kept("lm_head")
    assert not recipe.is_kept("model.lm_head")  # patterns match whole names


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*.down_proj", "model.layers.3.mlp.down_proj", True),
        ("*.down_proj", "down_proj", False),
        ("*.Down_proj", "a.down_proj", False),
        ("*.[qk]_proj", "a.k_proj", True),
        (r"re:.*\.[02]\..*", "layers.2.mlp", True),
        (r"re:layers", "layers.2.mlp", False),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_unmatched_patterns_are_found() -> None:
    recipe = parse(FULL)
    names = ["lm_head", "model.layers.0.mlp.down_proj"]
    assert recipe.unmatched(names) == (r"re:.*\.1\.mlp\..*", "*.layers.0.up_proj")


def test_data_is_looked_for_beside_the_recipe_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "mine.yaml").write_text("scheme: w8a8\n")
    for name in ("recipes/a.jsonl", "a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("recipes/mine.yaml")
    assert recipe.file == Path("recipes/mine.yaml")
    found = {p: recipe.locate(SourceSpec(p)) for p in ("a.jsonl", "b.jsonl", "evals:x", "hub/set")}
    assert found == {
        "a.jsonl": "recipes/a.jsonl",
        "b.jsonl": "b.jsonl",
        "evals:x": "evals:x",
        "hub/set": "hub/set",
    }


@pytest.mark.parametrize("name", sorted(installed_recipes()))
def test_installed_recipes_load_by_name(name: str) -> None:
    recipe = load_recipe(name, known_algorithms=KNOWN, known_observers=OBSERVER_OPTIONS)
    # Heads are kept by every recipe but those for serving on a CPU, which reads them whole.
    assert recipe.is_kept("lm_head") == (name not in QUANTIZED_HEADS)
    assert not recipe.is_kept("model.layers.3.mlp.up_proj")
    assert recipe.calibrate.data == (SourceSpec("evals:support_intent"),)
    # Codes that move ask for more text.
    samples = 1200 if name == "w2a16" else 128
    assert (recipe.calibrate.samples, recipe.calibrate.seq_len) == (samples, 512)
    assert recipe.suites == ("support_intent",)
    assert set(recipe.gate) == {"kl.mean", "support_intent.acc", "size.ratio"}
    Candidates.of(recipe.calibrate.observer.name, recipe.calibrate.observer.options)


def test_every_scheme_family_has_a_recipe() -> None:
    assert {p.stem for p in (ROOT / "recipes").glob("*.yaml")} == set(installed_recipes())
    covered = {_family(load_recipe(name).scheme.name) for name in installed_recipes()}
    assert {_family(name) for name in SCHEMES} == covered


def _family(name: str) -> str:
    """A scheme's widths and kinds, whatever shares a scale and whether there are zero points."""
    return name.split("-g")[0].removesuffix("-channel").removesuffix("-asym")


def test_unknown_names_and_files() -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe("w8a8-statik")
    assert str(caught.value).startswith("unknown recipe 'w8a8-statik'; did you mean 'w8a8-static'")
    with pytest.raises(UsageError) as caught:
        load_recipe("zzzzzzzz")
    assert "known: fp8, fp8-block" in str(caught.value)
    with pytest.raises(UsageError) as caught:
        load_recipe("fp8.yaml")
    assert str(caught.value) == (
        "recipe file fp8.yaml does not exist; the installed recipe is named 'fp8'"
    )
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(ROOT / "recipes" / ".")
