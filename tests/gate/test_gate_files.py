"""Files for others' tools: gate.json against its schema, the badge, the CI examples."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from gate_builders import pair_of_results, results, text
from jsonschema import Draft202012Validator, ValidationError
from typer.main import get_command

import quantkit
from quantkit import gate
from quantkit.results import Outcome, Verdict

ROOT = Path(quantkit.__file__).resolve().parent.parent
SCHEMA = json.loads((ROOT / "docs/schemas/gate.schema.json").read_text())
NLL = [3.0 + 0.01 * i for i in range(24)]

COUNTS = {
    Outcome.PASS: (245, 14, 20, 141),
    Outcome.FAIL: (215, 5, 50, 150),
    Outcome.INCONCLUSIVE: (60, 3, 5, 32),
}


def document(outcome: Outcome) -> dict[str, Any]:
    candidate, baseline = pair_of_results(*COUNTS[outcome])
    held = gate.parse_policy({"intent.acc": {"margin": 0.05}})
    doc: dict[str, Any] = gate.document(
        gate.judge(candidate, baseline, held),
        held,
        gate.provenance("a.json", candidate),
        gate.provenance("b.json", baseline),
    )
    return doc


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("outcome", list(Outcome))
def test_verdicts_keep_to_the_schema(outcome: Outcome) -> None:
    doc = document(outcome)
    assert doc["outcome"] == outcome
    Draft202012Validator(SCHEMA).validate(json.loads(json.dumps(doc, allow_nan=False)))


def test_limits_keep_to_the_schema() -> None:
    cost = {"size_bytes": 45, "reference_size_bytes": 100, "bits_per_weight": 4.5}
    candidate = results(text=text(NLL, kl=[0.01] * 24, top1=[990] * 24, p99=0.2), cost=cost)
    baseline = results(text=text(NLL))
    limits = {"kl.mean": {"max": 0.05}, "top1": {"min": 0.9}, "size.ratio": {"max": 0.5}}
    held = gate.parse_policy(limits)
    verdict = gate.judge(candidate, baseline, held)
    sides = gate.provenance("a", candidate), gate.provenance("b", baseline)
    doc = gate.document(verdict, held, *sides)
    Draft202012Validator(SCHEMA).validate(json.loads(json.dumps(doc)))


@pytest.mark.parametrize(
    "change",
    [
        {"outcome": "MAYBE"},
        {"schema": 2},
        {"checks": []},
        {"extra": 1},
        {"warnings": None},
        {"policy": {"source": "x", "gates": {}}},
        {"candidate": {"source": "x"}},
    ],
)
def test_the_schema_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Draft202012Validator(SCHEMA).validate({**document(Outcome.PASS), **change})


@pytest.mark.parametrize("name", ["outcome", "value", "lower", "reason"])
def test_the_schema_misses_every_key_of_a_check(name: str) -> None:
    doc = document(Outcome.PASS)
    del doc["checks"][0][name]
    with pytest.raises(ValidationError):
        Draft202012Validator(SCHEMA).validate(doc)


@pytest.mark.parametrize(
    ("outcome", "colour"),
    [
        (Outcome.PASS, "brightgreen"),
        (Outcome.FAIL, "red"),
        (Outcome.INCONCLUSIVE, "yellow"),
    ],
)
def test_badge(outcome: Outcome, colour: str) -> None:
    candidate, baseline = pair_of_results(*COUNTS[outcome])
    verdict: Verdict = gate.judge(candidate, baseline)
    assert gate.badge(verdict) == {
        "schemaVersion": 1,
        "label": "quantkit gate",
        "message": gate.summary(verdict),
        "color": colour,
    }


# -- examples/ci -----------------------------------------------------------------------------

GITHUB = yaml.safe_load((ROOT / "examples/ci/github.yml").read_text())
GITLAB = yaml.safe_load((ROOT / "examples/ci/gitlab.yml").read_text())


def commands() -> list[list[str]]:
    """Every ``quantkit …`` line of both examples, as words."""
    lines = [step["run"] for step in GITHUB["jobs"]["gate"]["steps"] if "run" in step]
    lines += [*GITLAB["quantize"]["script"], *GITLAB["quantize"]["after_script"]]
    parts = [part for line in lines for part in re.split(r"&&|\|\|", line)]
    return [shlex.split(part) for part in parts if part.strip().startswith("quantkit ")]


def test_ci_examples_use_options_that_exist() -> None:
    from quantkit.cli.main import app

    known = get_command(app).commands
    found = commands()
    assert len(found) == 8
    for _, name, *words in found:
        options = {o for p in known[name].params for o in p.opts}
        for word in words:
            assert not word.startswith("-") or word in options, (name, word)


def test_ci_examples_reuse_the_baseline() -> None:
    steps = GITHUB["jobs"]["gate"]["steps"]
    cache, save = (s for s in steps if s.get("uses", "").startswith("actions/cache/"))
    scored = next(s for s in steps if "-o baseline.json" in s.get("run", ""))
    # Kept before the gate may end the job: actions/cache alone keeps what succeeded.
    judged = next(s for s in steps if "quantkit calibrate" in s.get("run", ""))
    assert steps.index(scored) < steps.index(save) < steps.index(judged)
    assert (save["if"], save["with"]["path"]) == (scored["if"], "baseline.json")
    assert save["with"]["key"] == f"${{{{ steps.{cache['id']}.outputs.cache-primary-key }}}}"
    assert GITLAB["quantize"]["cache"]["when"] == "always"
    assert cache["with"]["path"] == "baseline.json"
    assert scored["if"] == f"steps.{cache['id']}.outputs.cache-hit != 'true'"
    assert any("--baseline baseline.json" in s.get("run", "") for s in steps)
    assert GITLAB["quantize"]["cache"]["paths"] == ["baseline.json"]
    # Another model or suite is another baseline.
    key = cache["with"]["key"]
    assert all(part in key for part in ("env.MODEL", "env.SUITE", "evals/**", "constraints.txt"))
    suite = f"evals/data/{GITLAB['variables']['SUITE']}.eval.jsonl"
    assert (ROOT / suite).is_file()
    assert GITLAB["quantize"]["cache"]["key"]["files"] == [suite, ".gitlab-ci.yml"]
    assert GITLAB["quantize"]["allow_failure"] == {"exit_codes": [3]}


def test_ci_examples_have_what_their_services_need() -> None:
    # YAML 1.1 reads the key `on` as a boolean; GitHub does not.
    assert GITHUB[True]["pull_request"]["paths"]
    job = GITHUB["jobs"]["gate"]
    assert job["runs-on"]
    # What scored a baseline scores the candidate: lm-eval's version is part of the comparison.
    install = "pip install . -c constraints.txt"
    assert install in [step.get("run") for step in job["steps"]]
    assert install in GITLAB["quantize"]["script"]
    assert all(("uses" in step) != ("run" in step) for step in job["steps"])
    assert GITLAB["quantize"]["artifacts"]["reports"] == {"junit": "junit.xml"}


def test_ci_policy_is_the_recipes() -> None:
    held = gate.load_policy(ROOT / "examples/ci/gate.yaml")
    recipe = yaml.safe_load(
        (ROOT / "recipes" / f"{GITLAB['variables']['RECIPE']}.yaml").read_text()
    )
    assert held.to_json() == recipe["gate"]
    assert GITLAB["variables"] == GITHUB["env"]
