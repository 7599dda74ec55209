"""Text in the form of a suite's requests."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import product_requests
from quantkit.evals.suites import load_suites


def texts_of(path: Path) -> list[str]:
    """Each request with the answer behind it."""
    rows = map(json.loads, path.read_text().splitlines())
    return [row["prompt"] + row["completion"] for row in rows]


def test_requests_have_the_suites_form_and_none_of_its_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [suite] = load_suites(["support_intent"])
    clinc, out = tmp_path / "clinc.json", tmp_path / "requests.jsonl"
    clinc.write_text(json.dumps({"train": [[f"what is {i}", "x"] for i in range(30)]}))
    argv = ["x", str(clinc), "-o", str(out), "--messages", "20", "--repeat", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    assert product_requests.main() == 0
    texts = texts_of(out)
    turns = product_requests.first_turns(suite)
    assert len(texts) == 2 * len(turns) + 20
    answers = {choice for row in suite.rows for choice in row["choices"]}
    asked = []
    for text in texts:
        assert text.startswith("Customer message: ")
        message, _, answer = text[18:].rpartition("\nThis message is about ")
        assert answer in answers
        asked.append(message)
    assert sorted(asked).count(turns[0]) == 2
    assert sum(message.startswith("What is ") for message in asked) == 20
    assert not set(asked) & {row["message"] for row in suite.rows}
    held = tmp_path / "held.jsonl"
    monkeypatch.setattr(sys, "argv", [*argv, "--held", str(held)])
    product_requests.main()
    kept = [text.rpartition("\n")[0] for text in texts_of(held)]
    rest = [text.rpartition("\n")[0] for text in texts_of(out)]
    assert len(kept) == len(set(kept)) == -(-len(set(asked)) // product_requests.HELD)
    assert not set(kept) & set(rest)
    assert set(kept) | set(rest) == {f"Customer message: {message}" for message in asked}
    for wrong, match in ((out, "is -o, too"), (tmp_path / "no" / "held.jsonl", "No such file")):
        monkeypatch.setattr(sys, "argv", [*argv, "--held", str(wrong)])
        with pytest.raises(SystemExit, match=match):
            product_requests.main()
    monkeypatch.setattr(sys, "argv", argv)
    product_requests.main()
    assert texts == texts_of(out)


def test_a_suite_that_asks_otherwise_is_refused() -> None:
    [suite] = load_suites(["grounded_qa"])
    with pytest.raises(SystemExit, match="grounded_qa: asks nothing of a"):
        product_requests.asked_by(suite)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"train": [1]}', '{"test": []}'])
def test_another_file_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "clinc.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=r"is not data_full\.json of clinc150"):
        product_requests.intents(path, "train")
