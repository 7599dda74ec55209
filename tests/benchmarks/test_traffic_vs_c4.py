"""How traffic is cut, which inputs are equal, and what a comparison says. Nothing is calibrated."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import traffic_vs_c4 as vs
from benchmarks.product_text import families, split_traffic
from quantkit.algorithms import KNOWN
from quantkit.errors import NotComparableError
from quantkit.evals.suites import find_suites, load_suite
from quantkit.gate.statistics import Bounds, tango_bounds
from quantkit.recipe import parse_recipe
from quantkit.results import ItemRow, Results, TaskResult, TextResult, TextWindow

FINGERPRINT = {"tokenizer": "t", "chat_template": "c", "lm_eval": "0.4", "seed": 0}


def prompt(assistant: int) -> str:
    return f"You are assistant number {assistant} of this shop, be kind."


def write_traffic(path: Path, assistants: list[int]) -> Path:
    """Conversation i belongs to the assistant of this number."""
    rows = [
        {
            "messages": [
                {"role": "system", "content": f"{prompt(assistant)}\nToday is day {i}."},
                {"role": "user", "content": f"Conversation {i}, näh."},
            ]
        }
        for i, assistant in enumerate(assistants)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def results(right: list[int], kls: list[float], clusters: list[str] | None = None) -> Results:
    """One task ``intent`` and windows of 10 tokens with these sums of KL."""
    rows = tuple(
        ItemRow(f"i{i}", float(x), f"h{i}", cluster=None if clusters is None else clusters[i])
        for i, x in enumerate(right)
    )
    windows = tuple(TextWindow(10, 30.0, kl, 8) for kl in kls)
    text = TextResult("text", 11, windows)
    return Results(FINGERPRINT, {"intent": TaskResult("acc", rows, "task")}, text)


# --- the cut ---------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    assistants=st.lists(st.integers(0, 5), min_size=2, max_size=40).filter(
        lambda found: len(set(found)) > 1
    ),
    share=st.floats(0.01, 0.6),
    seed=st.integers(0, 3),
)
def test_every_conversation_is_on_one_side_with_its_assistant(
    tmp_path_factory: pytest.TempPathFactory, assistants: list[int], share: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("split")
    traffic = write_traffic(folder / "t.jsonl", assistants)
    try:
        halves = split_traffic(traffic, share, seed, folder / "a")
    except SystemExit:  # the last family drawn has more than may be left
        assert max(map(assistants.count, assistants)) > (1 - share) * len(assistants)
        return
    calibration, held = (
        path.read_text().splitlines() for path in (halves.calibration, halves.held_out)
    )
    assert sorted(calibration + held) == sorted(traffic.read_text().splitlines())
    sides = [
        {a for a in assistants if any(prompt(a) in row for row in side)}
        for side in (calibration, held)
    ]
    assert not sides[0] & sides[1]
    assert len(held) == halves.held >= share * len(assistants)
    assert len(calibration) == halves.calibrated > 0
    again = split_traffic(traffic, share, seed, folder / "b")
    assert again.held_out.read_bytes() == halves.held_out.read_bytes()


def test_a_family_is_joined_by_any_of_its_members() -> None:
    one, two = prompt(1), prompt(2)
    assert families([one, two, f"{two}\nmore\n{one.upper()}", "thanks", "thanks"]) == [
        [0, 1, 2], [3], [4],
    ]  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(lines=st.lists(st.lists(st.integers(0, 8), max_size=3), max_size=12))
def test_families_are_the_connected_texts(lines: list[list[int]]) -> None:
    texts = ["\n".join(map(prompt, found)) for found in lines]
    expected: list[set[int]] = []  # by merging until nothing touches
    for i, found in enumerate(lines):
        near = [e for e in expected if any(set(found) & set(lines[j]) for j in e)]
        expected = [e for e in expected if e not in near] + [{i}.union(*near)]
    assert sorted(map(sorted, families(texts))) == sorted(map(sorted, expected))


def test_the_seed_chooses_who_is_held_out(tmp_path: Path) -> None:
    traffic = write_traffic(tmp_path / "t.jsonl", list(range(12)))
    held = {split_traffic(traffic, 0.3, seed, tmp_path).held_out.read_text() for seed in range(4)}
    assert len(held) > 1


@pytest.mark.parametrize("share", [0.0, 1.0, math.nan])
def test_a_share_that_leaves_nothing_is_refused(tmp_path: Path, share: float) -> None:
    traffic = write_traffic(tmp_path / "t.jsonl", [0, 1])
    with pytest.raises(SystemExit, match="between 0 and 1"):
        split_traffic(traffic, share, 0, tmp_path)
    with pytest.raises(SystemExit, match="1 families of up to 2"):
        split_traffic(write_traffic(traffic, [0, 0]), 0.5, 0, tmp_path)


def test_both_sources_give_as_many_windows(tiny: Path, tmp_path: Path) -> None:
    short, long = write_traffic(tmp_path / "s.jsonl", [0] * 4), tmp_path / "long.txt"
    long.write_text("\n\n".join(f"Document {i} of the web." for i in range(200)))
    args = argparse.Namespace(samples=50, seq_len=16, seed=0)
    found = vs.equal_windows(args, tiny, {"traffic": str(short), "C4": str(long)})
    assert 0 < found["samples"] < 50
    hashes = found["tokens_sha256"]
    assert hashes["traffic"] != hashes["C4"]
    args.samples = 2
    assert vs.equal_windows(args, tiny, {"traffic": str(short), "C4": str(long)})["samples"] == 2


@pytest.mark.parametrize("name", ["w4a16-gptq", "w4a16-fisher"])
@pytest.mark.parametrize("suite", ["support_intent", "grounded_qa"])
def test_a_recipe_is_gated_on_its_suite_alone(name: str, suite: str) -> None:
    text = vs.write_recipe(name, load_suite(find_suites(suite)[0]), 0.05)
    recipe = parse_recipe(text, known_algorithms=KNOWN)
    assert dict(recipe.gate) == {f"{suite}.acc": {"margin": 0.05}}
    assert [Path(path).stem for path in recipe.suites] == [suite]
    original = yaml.safe_load(vs.recipe_file(name).read_text())
    assert yaml.safe_load(text)["algorithm"] == original["algorithm"]


# --- one against the other -------------------------------------------------------------------


def test_a_difference_is_what_its_interval_leaves_0_out_of() -> None:
    def verdict(low: float | None, high: float | None, better: int) -> str:
        estimate = 0.0 if low is None or high is None else (low + high) / 2
        found: str = vs.interval(Bounds(estimate, low, high, "m"), better=better)["verdict"]
        return found

    assert verdict(0.01, 0.05, 1) == "better"
    assert verdict(-0.05, -0.01, 1) == "worse"
    assert verdict(-0.05, -0.01, -1) == "better"
    assert verdict(0.01, 0.05, -1) == "worse"
    assert verdict(-0.01, 0.05, 1) == "no difference shown"
    assert verdict(0.0, 0.05, 1) == "no difference shown"
    assert verdict(None, None, 1) == "no difference shown"


def test_items_are_compared_by_tango_at_two_sided_95_percent() -> None:
    both, gains, losses, neither = 60, 20, 2, 18
    ours = [1] * both + [1] * gains + [0] * losses + [0] * neither
    theirs = [1] * both + [0] * gains + [1] * losses + [0] * neither
    found = vs.compare("intent", results(ours, [1.0, 2.0]), results(theirs, [1.5, 2.0]), 0.05)
    score = found["score"]
    low, high = (float(x) for x in tango_bounds(gains, losses, 100, 0.025))
    assert (score["difference"], score["lower"], score["upper"]) == (0.18, low, high)
    assert (score["gains"], score["losses"], score["items"]) == (gains, losses, 100)
    assert score["verdict"] == "better"
    assert (score["traffic_not_worse"], score["c4_not_worse"]) == ("PASS", "FAIL")
    swapped = vs.compare("intent", results(theirs, [1.0, 2.0]), results(ours, [1.5, 2.0]), 0.05)
    mirrored = swapped["score"]
    assert mirrored["verdict"] == "worse"
    assert (mirrored["lower"], mirrored["upper"]) == pytest.approx((-high, -low))
    assert (mirrored["traffic_not_worse"], mirrored["c4_not_worse"]) == ("FAIL", "PASS")


def test_items_of_one_passage_are_one_cluster() -> None:
    """What is significant for 40 single items is not for 5 passages that flip as a whole."""
    ours, theirs = [1] * 40, [1] * 24 + [0] * 16
    clusters = [f"c{i // 8}" for i in range(40)]
    alone = vs.compare("intent", results(ours, [1.0, 2.0]), results(theirs, [1.0, 2.0]), 0.05)
    assert alone["score"]["verdict"] == "better"
    sides = [results(x, [1.0, 2.0], clusters) for x in (ours, theirs)]
    together = vs.compare("intent", *sides, 0.05)["score"]
    assert together["difference"] == alone["score"]["difference"]
    assert together["lower"] < 0 < together["upper"]
    assert together["verdict"] == "no difference shown"


def test_kl_is_paired_window_by_window() -> None:
    """Windows differ by much more than the two checkpoints do."""
    theirs = [float(10 * i) for i in range(1, 25)]
    ours = [kl - (0.9 if i % 2 else 1.1) for i, kl in enumerate(theirs)]
    a, b = results([1], ours).text, results([1], theirs).text
    assert a is not None
    assert b is not None
    found = vs.compare_kl(a, b)
    assert found["difference"] == pytest.approx(-0.1)
    spread = math.sqrt(24 * 0.1**2 / 23)  # of differences at ±0.1 around their mean
    assert found["error"] == pytest.approx(spread / math.sqrt(24) / 10)
    assert found["lower"] < -0.1 < found["upper"] < 0
    assert found["verdict"] == "better"
    assert vs.compare_kl(b, a)["verdict"] == "worse"


def test_scores_of_other_text_or_items_are_not_compared() -> None:
    a, b = results([1, 0], [1.0, 2.0]), results([1, 0], [1.0, 2.0, 3.0])
    with pytest.raises(NotComparableError, match="number of windows"):
        vs.compare("intent", a, b, 0.05)
    with pytest.raises(NotComparableError, match="items differ"):
        vs.compare("intent", a, results([1, 0, 1], [1.0, 2.0]), 0.05)
    bare = TextResult("text", 11, (TextWindow(10, 30.0),))
    with pytest.raises(SystemExit, match="no KL"):
        vs.compare_kl(bare, bare)


# --- the file --------------------------------------------------------------------------------


def test_a_row_is_done_when_its_scores_are_there(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    document = {"rows": {"intent: traffic": {}}}
    assert not vs.done(document, "intent", "traffic", output)
    target = vs.scores(output, "intent", "traffic")
    assert target == tmp_path / "out.scores" / "intent.traffic.json"
    target.parent.mkdir()
    results([1], [1.0]).save(target)
    assert vs.done(document, "intent", "traffic", output)
    assert not vs.done({"rows": {}}, "intent", "traffic", output)


def test_the_report_says_what_was_found() -> None:
    ours, theirs = results([1] * 30, [1.0, 2.0]), results([0] * 30, [3.0, 5.0])
    cost = {"seconds": 12.0, "peak_rss_bytes": 2e9, "bits": 4.25, "verdict": "PASS"}
    rows = {
        "intent: original": vs.summary(Results({}, ours.tasks, ours.text), "intent"),
        "intent: traffic": cost | vs.summary(ours, "intent"),
        "intent: C4": cost | vs.summary(theirs, "intent"),
    }
    document = {
        "recipe": {"name": "w4a16-gptq"},
        "seed": 0,
        "suites": {
            "intent": {
                "items": 30,
                "calibration": {"samples": 8, "seq_len": 128},
                "held_out": {"seq_len": 11},
            }
        },
        "rows": rows,
        "comparisons": {"intent": vs.compare("intent", ours, theirs, 0.05)},
    }
    lines = vs.report(document).splitlines()
    assert lines[0].startswith("intent, w4a16-gptq, seed 0: 8 × 128 tokens of each; 30 items")
    assert lines[3].split()[:5] == ["traffic", "12", "2.00", "4.25", "100.0%"]
    assert "+100.0 points" in lines[5]
    assert lines[5].endswith("30 gains, 0 losses): better")
    assert "traffic within 5 points of C4: PASS; C4 within 5 points of traffic: FAIL" in lines[6]
    assert lines[7].startswith("KL of traffic − C4: -0.2500 ± ")
