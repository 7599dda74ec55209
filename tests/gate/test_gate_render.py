"""Renderings: text that a terminal, a pull request and a CI server can each take."""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree

import pytest
from gate_builders import pair_of_results, results, task

from quantkit import gate
from quantkit.errors import NotComparableError
from quantkit.results import GateCheck, Outcome, Verdict

HOSTILE = "a|b\n<img src=x>`@team` \x1b[2J\x00 \ud800 [x](http://y) & ::error::"


def check(name: str, outcome: Outcome, reason: str = "because") -> GateCheck:
    return GateCheck(name, outcome, 0.5, 0.4, 0.6, 0.55, reason, {"n": 3})


def verdict(*outcomes: Outcome, reason: str = "because", warnings: tuple[str, ...] = ()) -> Verdict:
    checks = tuple(check(f"gate{i}.acc", o, reason) for i, o in enumerate(outcomes))
    worst = next(o for o in (Outcome.FAIL, Outcome.INCONCLUSIVE, Outcome.PASS) if o in outcomes)
    return Verdict(worst, checks, warnings)


P, F, U = Outcome.PASS, Outcome.FAIL, Outcome.INCONCLUSIVE


@pytest.mark.parametrize(
    ("outcomes", "line"),
    [
        ((P,), "PASS: the gate passed"),
        ((P, P), "PASS: all 2 gates passed"),
        ((P, F, U, P), "FAIL: 1 of 4 gates failed, 1 inconclusive"),
        ((U, P), "INCONCLUSIVE: 1 of 2 gates inconclusive"),
        ((F,), "FAIL: 1 of 1 gate failed"),
    ],
)
def test_summary(outcomes: tuple[Outcome, ...], line: str) -> None:
    assert gate.summary(verdict(*outcomes)) == line


def test_table_is_aligned_and_plain() -> None:
    text = gate.table(verdict(P, U, warnings=("look out",)))
    assert text == (
        "gate       verdict       measured\n"
        "gate0.acc  PASS          because\n"
        "gate1.acc  INCONCLUSIVE  because\n"
        "warning: look out\n"
        "INCONCLUSIVE: 1 of 2 gates inconclusive\n"
    )


def test_table_holds_no_control_characters() -> None:
    text = gate.table(verdict(F, reason=HOSTILE, warnings=(HOSTILE,)))
    assert "\x1b" not in text
    assert len(text.splitlines()) == 4
    text.encode()


def test_markdown_escapes_what_comes_from_outside() -> None:
    row = (
        task([1.0])
        .rows[0]
        .__class__(id="1", score=1.0, hash="h", prompt=HOSTILE, prediction=HOSTILE, target=HOSTILE)
    )
    lost = row.__class__(id="1", score=0.0, hash="h", prediction=HOSTILE)
    base = results({"t": task([]).__class__("acc", (row,), "h")})
    quant = results({"t": task([]).__class__("acc", (lost,), "h")})
    flipped = gate.flips(quant, base, gate.parse_policy({"t.acc": {"margin": 0.1}}))
    assert len(flipped) == 1
    text = gate.markdown(verdict(F, reason=HOSTILE, warnings=(HOSTILE,)), flipped)
    text.encode()
    assert "<img" not in text
    assert "\x1b" not in text
    rows = [line for line in text.splitlines() if line.startswith("| t |")]
    assert len(rows) == 1
    assert rows[0].replace("\\|", "").count("|") == 9


def test_markdown_is_truncated_below_its_limit() -> None:
    many = verdict(*[F] * 3000, reason="é" * 500)
    text = gate.markdown(many)
    assert 900_000 < len(text.encode()) <= gate.MARKDOWN_BYTES
    assert text.endswith("*truncated: the rest does not fit into a step summary*\n")
    assert "truncated" not in gate.markdown(verdict(F))
    small = gate.markdown(many, limit=200)
    assert 0 < len(small.encode()) <= 200
    assert gate.markdown(many, limit=0) == ""


def test_markdown_shows_fifty_flips() -> None:
    pair = pair_of_results(0, 30, 60, 0)
    flipped = gate.flips(*pair, gate.parse_policy({"intent.acc": {"margin": 0.1}}))
    text = gate.markdown(verdict(F), flipped)
    assert "Flipped items: 60 lost, 30 gained" in text
    assert text.count("| intent |") == 50
    assert "40 more are in flips.jsonl" in text


def test_junit_counts_and_marks() -> None:
    root = ElementTree.fromstring(gate.junit(verdict(P, F, U)).encode())
    suite = root.find("testsuite")
    assert suite is not None
    assert root.tag == "testsuites"
    assert {k: suite.get(k) for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": "3",
        "failures": "1",
        "errors": "0",
        "skipped": "1",
    }
    cases = suite.findall("testcase")
    assert [c.get("name") for c in cases] == ["gate0.acc", "gate1.acc", "gate2.acc"]
    assert cases[0].find("failure") is None
    failure, skipped = cases[1].find("failure"), cases[2].find("skipped")
    assert failure is not None
    assert failure.get("message") == "because"
    assert skipped is not None


def test_junit_fails_the_inconclusive_on_request() -> None:
    root = ElementTree.fromstring(gate.junit(verdict(U), inconclusive_fails=True).encode())
    assert root.get("failures") == "1"
    assert root.find(".//skipped") is None


def test_junit_error_is_infrastructure() -> None:
    root = ElementTree.fromstring(gate.junit_error(NotComparableError("seed differs")).encode())
    error = root.find(".//error")
    assert root.get("errors") == "1"
    assert error is not None
    assert (error.get("type"), error.get("message")) == ("NotComparableError", "seed differs")


def test_junit_survives_any_character() -> None:
    text = gate.junit(verdict(F, reason=HOSTILE, warnings=(HOSTILE,)))
    root = ElementTree.fromstring(text.encode())
    failure = root.find(".//failure")
    assert failure is not None
    assert "<img src=x>" in (failure.get("message") or "")


def test_annotations_are_ten_with_failures_first() -> None:
    lines = gate.github_annotations(verdict(U, P, *[F] * 12, warnings=("w",)))
    assert len(lines) == 10
    assert all(line.startswith("::error title=FAIL gate") for line in lines)
    lines = gate.github_annotations(
        verdict(U, P, F, reason="61 % | a\n::error::b", warnings=("w",))
    )
    assert lines == [
        "::error title=FAIL gate2.acc::61 %25 | a ::error::b",
        "::warning title=INCONCLUSIVE gate0.acc::61 %25 | a ::error::b",
        "::warning title=quantkit gate::w",
    ]


def test_flips_jsonl() -> None:
    pair = pair_of_results(5, 1, 1, 2, slice=["s"] * 9)
    text = gate.flips_jsonl(gate.flips(*pair, gate.parse_policy({"intent.acc": {"margin": 0.1}})))
    first, second = (json.loads(line) for line in text.splitlines())
    assert first == {
        "task": "intent",
        "id": "item-0006",
        "direction": "loss",
        "slice": "s",
        "prompt": "prompt 6",
        "target": "yes",
        "baseline_prediction": "yes",
        "candidate_prediction": "no",
        "baseline_score": 1.0,
        "candidate_score": 0.0,
        "must_not_flip": False,
    }
    assert second["direction"] == "gain"
    assert gate.flips_jsonl([]) == ""


def test_document_names_where_everything_came_from(tmp_path: Any) -> None:
    candidate, baseline = pair_of_results(245, 14, 20, 141)
    path = tmp_path / "int4.json"
    candidate.save(path)
    held = gate.parse_policy({"intent.acc": {"margin": 0.05}}, source="gate.yaml")
    doc = gate.document(
        gate.judge(candidate, baseline, held),
        held,
        gate.provenance(path, candidate),
        gate.provenance("in memory", baseline),
    )
    again = json.loads(json.dumps(doc, allow_nan=False))
    assert (again["schema"], again["outcome"]) == (1, "PASS")
    assert again["policy"] == {"source": "gate.yaml", "gates": held.to_json()}
    assert len(again["candidate"]["sha256"]) == 64
    assert again["baseline"]["fingerprint"]["tokenizer"] == "tok"
    assert "sha256" not in again["baseline"]
    assert again["checks"][0]["details"]["losses"] == 20
