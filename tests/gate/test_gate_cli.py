"""``quantkit gate`` and ``quantkit baseline``: exit codes, files and what they print."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
from click.testing import Result
from gate_builders import pair_of_results, results, task
from typer.testing import CliRunner

import quantkit
from quantkit.cli import baseline as baseline_cli
from quantkit.cli import gate as gate_cli
from quantkit.errors import QuantkitError

ROOT = Path(quantkit.__file__).resolve().parent.parent
PASSING, FAILING, UNDECIDED = (245, 14, 20, 141), (215, 5, 50, 150), (60, 3, 5, 32)

app = typer.Typer()
app.command("gate")(gate_cli.command)
app.add_typer(baseline_cli.app, name="baseline")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("GITHUB_STEP_SUMMARY", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def code(result: Result) -> int:
    """The exit code as the program's own main gives it: an error carries its code."""
    if isinstance(result.exception, QuantkitError):
        return result.exception.exit_code
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code


def save(counts: tuple[int, int, int, int], **changes: Any) -> None:
    candidate, baseline = pair_of_results(*counts, **changes)
    candidate.save("int4.json")
    baseline.save("bf16.json")


GATE = ("gate", "int4.json", "--baseline", "bf16.json")


@pytest.mark.parametrize(
    ("counts", "options", "expected"),
    [
        (PASSING, (), 0),
        (FAILING, (), 1),
        (UNDECIDED, (), 3),
        (UNDECIDED, ("--on-inconclusive", "fail"), 1),
        (UNDECIDED, ("--on-inconclusive", "warn"), 0),
        (FAILING, ("--on-inconclusive", "warn"), 1),
        (PASSING, ("--on-inconclusive", "ignore"), 2),
        (PASSING, ("--policy", "absent.yaml"), 2),
    ],
)
def test_exit_codes(counts: Any, options: tuple[str, ...], expected: int) -> None:
    save(counts)
    assert code(run(*GATE, *options)) == expected


def test_table_on_stdout() -> None:
    save(FAILING)
    result = run(*GATE)
    assert result.stdout.splitlines()[-1] == "FAIL: 1 of 1 gate failed"
    assert "intent.acc  FAIL" in result.stdout


def test_json_is_one_document() -> None:
    save(PASSING)
    result = run(*GATE, "--json", "-o", "gate.json")
    doc = json.loads(result.stdout)
    assert (doc["outcome"], doc["exit_code"]) == ("PASS", 0)
    assert doc["candidate"]["source"] == "int4.json"
    written = json.loads(Path("gate.json").read_text())
    assert written == {k: v for k, v in doc.items() if k != "exit_code"}


def test_every_file_is_written() -> None:
    save(FAILING)
    Path("gate.yaml").write_text("intent.acc: {margin: 0.04}\n")
    files = {
        "--policy": "gate.yaml",
        "--junit": "junit.xml",
        "--markdown": "gate.md",
        "--flips": "flips.jsonl",
    }
    assert code(run(*GATE, *(x for pair in files.items() for x in pair))) == 1
    assert ElementTree.parse("junit.xml").getroot().get("failures") == "1"
    assert "−4.0 margin" in Path("gate.md").read_text(encoding="utf-8")
    assert len(Path("flips.jsonl").read_text().splitlines()) == 55
    assert not [p for p in Path().iterdir() if p.name.endswith(".tmp")]


def test_missing_row_is_a_runtime_error_with_junit() -> None:
    save(PASSING)
    doc = json.loads(Path("int4.json").read_text())
    doc["tasks"]["intent"]["rows"].pop()
    Path("int4.json").write_text(json.dumps(doc))
    assert code(run(*GATE, "--junit", "junit.xml")) == 4
    root = ElementTree.parse("junit.xml").getroot()
    assert (root.get("errors"), root.get("failures")) == ("1", "0")


def test_an_unwritable_junit_does_not_hide_the_error() -> None:
    save(PASSING)
    results({"intent": task([1.0] * 420)}, tokenizer="other").save("int4.json")
    result = run(*GATE, "--junit", "absent/junit.xml")
    assert code(result) == 5
    assert "absent" in result.stderr


def test_other_tokenizer_is_not_comparable() -> None:
    save(PASSING)
    results({"intent": task([1.0] * 420)}, tokenizer="other").save("int4.json")
    result = run(*GATE)
    assert code(result) == 5
    assert "tokenizer differs" in str(result.exception)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"schema": 1}', "\x00", '{"schema": 99}'),
        *('{"schema": ' + "1" * 5000 + "}", "[" * 100_000),
    ],
)
def test_malformed_results_are_refused(text: str) -> None:
    save(PASSING)
    Path("bf16.json").write_text(text)
    assert code(run(*GATE)) == 2


def test_step_summary_is_appended_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    save(FAILING)
    summary = Path("summary.md")
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    result = run(*GATE, "--json")
    assert summary.read_text(encoding="utf-8").startswith("before\n## quantkit gate: FAIL")
    assert json.loads(result.stdout)["outcome"] == "FAIL"
    assert result.stderr.startswith("::error title=FAIL intent.acc::52.4 %25 vs")
    summary.write_text("x" * (1024 * 1024 - 10))
    assert code(run(*GATE)) == 1
    assert summary.stat().st_size <= 1024 * 1024


@pytest.mark.parametrize("option", ["--junit", "--markdown", "--flips", "-o", "--badge"])
def test_an_unwritable_file_does_not_hide_the_verdict(option: str) -> None:
    save(FAILING)
    result = run(*GATE, option, "absent/file")
    assert code(result) == 2
    assert result.stdout.splitlines()[-1] == "FAIL: 1 of 1 gate failed"
    result = run(*GATE, option, "absent/file", "--json")
    assert json.loads(result.stdout)["outcome"] == "FAIL"


# -- baselines -------------------------------------------------------------------------------


def test_record_accept_gate() -> None:
    save(PASSING)
    result = run("baseline", "record", "bf16.json", "--name", "main")
    assert code(result) == 0
    assert "main  pending" in result.stdout
    named = ("gate", "int4.json", "--baseline", "main")
    result = run(*named)
    assert code(result) == 2
    assert "quantkit baseline accept main" in str(result.exception)
    assert code(run("baseline", "accept", "main")) == 0
    assert code(run(*named)) == 0
    result = run("baseline", "show")
    assert "main  accepted" in result.stdout
    assert "intent.acc  63.1 %  420 items" in result.stdout


def test_first_run_records_and_fails() -> None:
    save(PASSING)
    for _ in range(2):
        result = run("gate", "int4.json", "--baseline", "main")
        assert code(result) == 2
        assert "accept main" in str(result.exception)
    shown = json.loads(run("baseline", "show", "main", "--json").stdout)
    assert [(b["name"], b["state"]) for b in shown] == [("main", "pending")]
    assert code(run("baseline", "accept", "main")) == 0
    assert code(run("gate", "int4.json", "--baseline", "main")) == 0


def test_a_misspelt_file_is_not_a_name() -> None:
    save(PASSING)
    result = run("gate", "int4.json", "--baseline", "bf61.json")
    assert code(result) == 2
    assert "no such file" in str(result.exception)
    assert not Path(".quantkit").exists()


def test_accepted_holds_until_the_next_is_accepted() -> None:
    save(PASSING)
    run("baseline", "record", "bf16.json", "--name", "main")
    run("baseline", "accept", "main")
    accepted = Path(".quantkit/baselines/main.json").read_bytes()
    run("baseline", "record", "int4.json", "--name", "main")
    assert Path(".quantkit/baselines/main.json").read_bytes() == accepted
    states = [b["state"] for b in json.loads(run("baseline", "show", "--json").stdout)]
    assert states == ["accepted", "pending"]
    run("baseline", "accept", "main")
    assert Path(".quantkit/baselines/main.json").read_bytes() != accepted


def test_edited_baselines_are_refused() -> None:
    save(PASSING)
    run("baseline", "record", "bf16.json", "--name", "main")
    run("baseline", "accept", "main")
    path = Path(".quantkit/baselines/main.json")
    doc = json.loads(path.read_text())
    doc["results"]["tasks"]["intent"]["rows"][0]["score"] = 0.0
    path.write_text(json.dumps(doc))
    result = run("gate", "int4.json", "--baseline", "main")
    assert code(result) == 4
    assert "its rows are not those that its manifest names" in str(result.exception)
    path.write_text("{}")
    assert code(run("baseline", "show", "main")) == 2


def test_what_is_shown_is_what_the_rows_say() -> None:
    """Only the rows are hashed: an edited manifest is no claim, and a missing one no traceback."""
    save(PASSING)
    run("baseline", "record", "bf16.json", "--name", "main")
    path = Path(".quantkit/baselines/main.pending.json")
    doc = json.loads(path.read_text())
    before = run("baseline", "show").stdout
    for tasks in ({"intent": {**doc["manifest"]["tasks"]["intent"], "value": 0.99}}, None, []):
        doc["manifest"] |= {"tasks": tasks, "fingerprint": {"model": "another"}}
        path.write_text(json.dumps(doc))
        assert run("baseline", "show").stdout == before
        shown = json.loads(run("baseline", "show", "--json").stdout)[0]["manifest"]
        assert shown["tasks"]["intent"]["value"] == pytest.approx(265 / 420)
        assert shown["fingerprint"]["tokenizer"] == "tok"


def test_other_files_in_the_folder_are_no_baselines() -> None:
    save(PASSING)
    run("baseline", "record", "bf16.json", "--name", "main")
    folder = Path(".quantkit/baselines")
    before = run("baseline", "show").stdout
    for name in ("notes.old.json", ".hidden.json", "main.pending.bak.json", "a b.json"):
        (folder / name).write_text("{}")
    (folder / "dir.json").mkdir()
    result = run("baseline", "show")
    assert (code(result), result.stdout) == (0, before)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "x" * 65, "a.pending"])
def test_names_cannot_leave_their_folder(name: str) -> None:
    save(PASSING)
    assert code(run("baseline", "record", "bf16.json", "--name", name)) == 2
    assert code(run("baseline", "accept", name)) == 2


def test_nothing_stored() -> None:
    assert run("baseline", "show").stdout == "no baselines in .quantkit/baselines\n"
    assert code(run("baseline", "show", "main")) == 2
    result = run("baseline", "accept", "main")
    assert code(result) == 2
    assert "nothing pending" in str(result.exception)


def test_other_folder() -> None:
    save(PASSING)
    assert code(run("baseline", "record", "bf16.json", "--name", "m", "--dir", "kept")) == 0
    assert code(run("baseline", "accept", "m", "--dir", "kept")) == 0
    assert code(run("gate", "int4.json", "--baseline", "m", "--baseline-dir", "kept")) == 0


def test_the_gate_imports_no_torch() -> None:
    program = (
        "import sys, quantkit.gate, quantkit.gate.baselines\n"
        "loaded = {m for m in sys.modules if m.startswith('quantkit.')}\n"
        "assert 'torch' not in sys.modules\n"
        "below = {'quantkit.' + m for m in ('errors', 'results', 'noise', 'timings')}\n"
        "assert all(m.startswith('quantkit.gate') or m in below for m in loaded), loaded\n"
        "import quantkit.cli.gate, quantkit.cli.baseline\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_the_commands_import_nothing_heavy() -> None:
    program = (
        "import sys, quantkit.cli.gate, quantkit.cli.baseline\n"
        "heavy = {'numpy', 'scipy', 'yaml', 'torch', 'quantkit.gate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
