"""Policies are parsed strictly: a misspelt gate must not silently hold nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from gate_builders import pair_of_results, results, text
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import UsageError
from quantkit.gate import default_policy, load_policy, parse_policy
from quantkit.gate.policy import LIMITS, LimitGate, TaskGate

EVERYTHING = {
    "kl.mean": {"max": 0.05},
    "kl.p99": {"max": 0.8},
    "top1": {"min": 0.93},
    "perplexity.ratio": {"max": 1.05},
    "size.ratio": {"max": 0.45},
    "size.bits_per_weight": {"max": 5},
    "latency.ttft": {"max": 1.05},
    "latency.tpot": {"max": 0.9},
    "intent.acc": {"margin": 0.05, "floor": 0.5},
    "v1.5-chat.exact_match": {"margin": 0.02},
}


def write(folder: Path, text: str) -> Path:
    path = folder / "gate.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_everything_parses_and_writes_back() -> None:
    policy = parse_policy(EVERYTHING)
    assert policy.to_json() == EVERYTHING
    assert parse_policy(policy.to_json()) == policy
    assert TaskGate("intent", "acc", 0.05, 0.5) in policy.gates
    assert TaskGate("v1.5-chat", "exact_match", 0.02) in policy.gates
    assert LimitGate("top1", 0.93) in policy.gates


def test_every_limit_of_the_table_is_covered() -> None:
    assert set(LIMITS) <= set(EVERYTHING)


def test_file_reads_as_the_mapping(tmp_path: Path) -> None:
    path = write(tmp_path, "# ours\nkl.mean: {max: 0.05}\nintent.acc:\n  margin: .05\n")
    policy = load_policy(path)
    assert policy.to_json() == {"kl.mean": {"max": 0.05}, "intent.acc": {"margin": 0.05}}
    assert policy.source == str(path)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (
            "kl.mean: {max: 1}\nkl.men: {max: 0.05}",
            ":2 unknown key 'kl.men'; did you mean 'kl.mean'?",
        ),
        ("perplexiy.ratio: {max: 1.1}", ":1 unknown key 'perplexiy.ratio'; did you mean"),
        ("top-1: {min: 0.9}", ":1 unknown key 'top-1'; did you mean 'top1'?"),
        ("kl:\n  mean: {max: 0.1}", ":1 unknown key 'kl'; did you mean 'kl."),
        ("size.foo: {margin: 0.1}", ":1 unknown key 'size.foo'"),
        ("intent: {margin: 0.1}", ":1 unknown key 'intent'"),
        (
            "intent.acc:\n  margn: 0.1",
            ":2 unknown key 'margn' in intent.acc; did you mean 'margin'?",
        ),
        ("kl.mean: {min: 0.1}", ":1 unknown key 'min' in kl.mean; did you mean 'max'?"),
        ("intent.acc: {floor: 0.1}", ":1 intent.acc: 'margin' is missing"),
        ("intent.acc: 0.05", ":1 intent.acc: 0.05 is not a mapping; write {margin: …}"),
        ("a.acc: {margin: 0.1}\na.acc: {margin: 0.2}", ":2 key 'a.acc' is given twice"),
        ("a.acc: {margin: 0.1, margin: 0.2}", ":1 key 'margin' is given twice"),
        ("a.acc: {margin: 1e-2}", ":1 a.acc: margin '1e-2' is not a number"),
        ("a.acc: {margin: true}", ":1 a.acc: margin True is not a number"),
        ("a.acc: {margin: }", ":1 a.acc: margin None is not a number"),
        ("a.acc: {margin: [0.1]}", ":1 a.acc: margin a list is not a number"),
        ("a.acc: {margin: .nan}", ":1 a.acc: margin nan is not between 0 and 1; 0.05 allows"),
        ("kl.mean: {max: .inf}", ":1 kl.mean: max inf is not a finite number above 0"),
        ("perplexity.ratio: {max: 0.05}", ":1 perplexity.ratio: max 0.05 is not a finite number"),
        ("a.acc: {margin: !!python/object:os.system x}", ":1 not a value"),
        ("? [a, b]\n: 1", ":1 a key is not a name"),
        ("a.acc: {margin: 0.1", ":1 not YAML"),
        ("- a", "not a mapping"),
        ("", "names no gate"),
        ("[" * 600, "not YAML"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, written: str, said: str) -> None:
    path = write(tmp_path, written)
    with pytest.raises(UsageError) as caught:
        load_policy(path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "value", ['!!int ""', '!!float ""', "!!bool x", "!!timestamp x", '!!binary "ä"', "!!int x"]
)
def test_tags_that_do_not_fit_their_text(tmp_path: Path, value: str) -> None:
    """PyYAML raises whatever comes of it."""
    path = tmp_path / "gate.yaml"
    path.write_text(f"kl.mean: {{max: 0.05}}\ntop1: {{min: {value}}}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"gate.yaml:2"):
        load_policy(path)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_policy(tmp_path / "absent.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        load_policy(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a.acc: {margin: 0.1} # \xe9")
    with pytest.raises(UsageError, match="cannot be read"):
        load_policy(tmp_path / "latin.yaml")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0, 0.0, -0.05, 1, 5, 10**400])
@pytest.mark.parametrize("key", ["margin", "floor"])
def test_margins_and_floors_are_shares(key: str, bad: float) -> None:
    with pytest.raises(UsageError, match=rf"{key} .* is not between 0 and 1; "):
        parse_policy({"intent.acc": {"margin": 0.05, key: bad}})


@pytest.mark.parametrize("name", sorted(LIMITS))
@pytest.mark.parametrize("bad", [math.nan, math.inf, 0, -1])
def test_limits_are_finite_and_positive(name: str, bad: float) -> None:
    with pytest.raises(UsageError, match="is not"):
        parse_policy({name: {LIMITS[name].key: bad}})


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=6),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(["kl.mean", "a.acc", "max", "margin", 3]), inner, max_size=3
            )
        ),
        max_leaves=6,
    )
)
def test_any_mapping_parses_or_is_a_usage_error(mapping: object) -> None:
    try:
        policy = parse_policy(mapping)
    except UsageError:
        return
    assert policy.gates


def test_recipe_lines_reach_the_error() -> None:
    with pytest.raises(UsageError, match=r"recipe.yaml:12 kl.mean: max nan"):
        parse_policy(
            {"kl.mean": {"max": math.nan}},
            source="recipe.yaml",
            lines={"kl.mean": 11, "kl.mean max": 12},
        )
    with pytest.raises(UsageError, match=r"recipe.yaml:11 kl.mean: max nan"):
        parse_policy({"kl.mean": {"max": math.nan}}, source="recipe.yaml", lines={"kl.mean": 11})


def test_aliases_do_not_explode(tmp_path: Path) -> None:
    bomb = "a.acc: {margin: &a0 [x]}\n" + "".join(
        f"b{i}.acc: {{margin: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]}}\n" for i in range(30)
    )
    with pytest.raises(UsageError, match="margin a list is not a number"):
        load_policy(write(tmp_path, bomb))


def test_default_policy_holds_every_task_and_the_text() -> None:
    candidate, baseline = pair_of_results(5, 1, 1, 3)
    assert default_policy(candidate, baseline).to_json() == {"intent.acc": {"margin": 0.05}}
    with_text = results(text=text([3.0, 3.1]))
    assert default_policy(with_text, with_text).to_json() == {"perplexity.ratio": {"max": 1.1}}
    with pytest.raises(UsageError, match="nothing to gate"):
        default_policy(results(), results())
