"""A large suite of intents, and the text and recipes that go with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import router_suite
from quantkit.data.contamination import overlap
from quantkit.evals.suites import load_suites
from quantkit.recipe import installed_recipes, load_recipe

INTENTS = ["play_music", "book_hotel", "gas", "order_status", "tell_joke"]
TWICE = "please book a quiet room by the wide sea"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    clinc = tmp_path / "clinc.json"
    training = [[f"message {i} of those to train on", INTENTS[i % 5]] for i in range(60)]
    test = [[f"number {i} is for the exam", INTENTS[i % 5]] for i in range(20)]
    clinc.write_text(
        json.dumps(
            {"train": [*training, [TWICE, INTENTS[1]]], "test": [*test, [TWICE, INTENTS[1]]]}
        )
    )
    out = tmp_path / "router"
    argv = ["x", str(clinc), "-o", str(out), "--recipe", "w4a16-gptq"]
    monkeypatch.setattr(sys, "argv", argv)
    assert router_suite.main() == 0
    return out


def test_items_ask_for_the_right_intent_among_others(folder: Path) -> None:
    [suite] = load_suites([str(folder / "router.yaml")])
    assert suite.n == 20, "the one that training has, too, is left out"
    positions = set()
    for row in suite.rows:
        assert len(set(row["choices"])) == router_suite.CHOICES
        assert row["choices"][row["label"]] == row["slice"]
        assert set(row["choices"]) <= {name.replace("_", " ") for name in INTENTS}
        positions.add(row["label"])
    assert len(positions) > 1, "the right one does not stand in one place"


def test_calibration_text_has_the_form_of_requests_and_no_item(folder: Path) -> None:
    [suite] = load_suites([str(folder / "router.yaml")])
    training, held = rows_of(folder / "requests.jsonl"), rows_of(folder / "held.jsonl")
    for row in training + held:
        assert row["prompt"].startswith('A user said: "')
        assert row["prompt"].endswith('"\nThe user asked about')
        assert row["completion"].strip().replace(" ", "_") in INTENTS
    prompts = [row["prompt"] for row in training]
    assert {prompts.count(prompt) for prompt in prompts} == {2}, "--repeat"
    assert not set(prompts) & {row["prompt"] for row in held}
    assert len(set(prompts)) + len(held) == 61
    assert not overlap(prompts, [f"{row['message']}\n{row['slice']}" for row in suite.rows])


def test_recipes_ask_of_this_suite_what_they_asked_of_theirs(folder: Path) -> None:
    found = load_recipe(folder / "w4a16-gptq.yaml")
    theirs = load_recipe(installed_recipes()["w4a16-gptq"])
    assert found.suites == (str((folder / "router.yaml").resolve()),)
    assert found.calibrate.apart == theirs.calibrate.apart
    assert {key.split(".")[0] for key in found.gate} == {"kl", "router", "size"}
    assert len(found.gate) == len(theirs.gate)


def test_a_recipe_without_a_suite_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["x", str(tmp_path / "clinc.json"), "-o", str(folder), "--recipe", "no-such"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="--recipe no-such: is no recipe of one suite"):
        router_suite.main()
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "none"), "-o", str(folder)])
    with pytest.raises(SystemExit, match=r"is not data_full\.json of clinc150"):
        router_suite.main()
