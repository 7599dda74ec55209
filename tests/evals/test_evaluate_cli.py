"""`evaluate` and ``quantkit eval``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from eval_builders import CHOICE, choice_rows
from typer.testing import CliRunner, Result

from quantkit.cli import eval as eval_cli
from quantkit.data.render import render
from quantkit.data.rows import Document
from quantkit.errors import UsageError
from quantkit.evals.divergence import cut_windows, hash_windows
from quantkit.evals.evaluate import evaluate
from quantkit.evals.suites import load_suites
from quantkit.models.runtime import Runtime
from quantkit.results import COMPARABLE_KEYS, Results

Write = Callable[..., Path]
TEXT = "The order is late and the invoice never came. " * 20


@pytest.fixture
def invoke(
    runtime: Runtime, other: Runtime, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Run the command with ``base`` and ``quant`` as models; usage errors are re-raised."""
    models = {"base": runtime, "quant": other}
    monkeypatch.setattr(eval_cli, "_load", lambda source, *how: models[source])
    app = typer.Typer()
    app.command()(eval_cli.command)

    def run(*args: Any) -> Result:
        return CliRunner().invoke(app, [str(a) for a in args])

    return run


def test_everything_is_in_the_results(runtime: Runtime, other: Runtime, suite_path: Write) -> None:
    suites = load_suites([suite_path(CHOICE, choice_rows())])
    results = evaluate(other, reference=runtime, suites=suites, text=TEXT, seq_len=32, seed=4)
    assert results.tasks["tiny_choice"].n == 12
    assert results.text is not None
    assert results.text.kl_mean is not None
    assert results.cost == {
        "size_bytes": 1000,
        "bits_per_weight": 32.0,
        "reference_size_bytes": 1000,
    }
    assert {*COMPARABLE_KEYS, "model", "torch", "transformers"} <= set(results.fingerprint)
    assert results.fingerprint["seed"] == 4
    assert results.fingerprint["host"]["threads"] >= 1


def test_nothing_to_score_is_a_usage_error(runtime: Runtime, suite_path: Write) -> None:
    with pytest.raises(UsageError, match="nothing to score"):
        evaluate(runtime)
    suites = load_suites([suite_path(CHOICE, choice_rows())])
    with pytest.raises(UsageError, match="a reference is compared on text"):
        evaluate(runtime, reference=runtime, suites=suites)


def test_the_command_writes_and_prints(
    invoke: Callable[..., Result], suite_path: Write, tmp_path: Path
) -> None:
    suite = suite_path(CHOICE, choice_rows())
    text = tmp_path / "held_out.txt"
    text.write_text(TEXT)
    out = tmp_path / "results.json"
    args = ("quant", "--suite", suite, "--text", text, "--reference", "base", "--seq-len", 32)
    result = invoke(*args, "-o", out)
    assert result.exit_code == 0, result.output
    for word in ("perplexity", "kl_mean", "top1_agreement", "tiny_choice.acc", "12 items", "size"):
        assert word in result.stdout
    saved = Results.load(out)
    assert saved.tasks["tiny_choice"].n == 12

    document = json.loads(invoke(*args, "--json").stdout)
    assert document["tasks"]["tiny_choice"]["acc"] == saved.tasks["tiny_choice"].value
    assert "rows" not in document["tasks"]["tiny_choice"]
    assert document["kl_mean"] == pytest.approx(saved.text.kl_mean if saved.text else None)


def test_a_full_disk_does_not_hide_the_results(
    invoke: Callable[..., Result],
    suite_path: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(path: Path, doc: object) -> None:
        raise UsageError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr("quantkit.results.write_json", full)
    suite = suite_path(CHOICE, choice_rows())
    for option, shown in ((), "tiny_choice.acc"), (("--json",), '"tiny_choice"'):
        result = invoke("base", "--suite", suite, "-o", tmp_path / "out.json", *option)
        assert "No space left" in str(result.exception)
        assert shown in result.stdout
        assert "wrote" not in result.stdout


def test_a_subset_is_scored(invoke: Callable[..., Result], suite_path: Write) -> None:
    suite = suite_path(CHOICE, choice_rows())
    result = invoke("base", "--suite", suite, "--max-items", 5, "--json")
    assert json.loads(result.stdout)["tasks"]["tiny_choice"]["n"] == 5


def test_json_lines_are_read_as_text(invoke: Callable[..., Result], tmp_path: Path) -> None:
    rows = tmp_path / "held_out.jsonl"
    rows.write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(2)))
    result = invoke("base", "--text", rows, "--seq-len", 64, "--json")
    assert json.loads(result.stdout)["perplexity"] > 1


def test_conversations_are_read_as_the_model_would_see_them(
    invoke: Callable[..., Result], runtime: Runtime, tmp_path: Path
) -> None:
    turn = {"role": "user", "content": "Where is my parcel?"}
    rows = tmp_path / "held_out.jsonl"
    rows.write_text((json.dumps({"messages": [turn]}) + "\n") * 20)
    result = invoke("base", "--text", rows, "--seq-len", 64, "--json")
    template = runtime.tokenizer.chat_template is not None
    one = render(Document("", messages=(turn,)), runtime.tokenizer, chat_template=template)
    windows = cut_windows(runtime.tokenizer, "\n".join([one] * 20), 64)
    assert one != turn["content"]
    assert json.loads(result.stdout)["text"]["hash"] == hash_windows(windows)


def test_validate_needs_no_checkpoint(invoke: Callable[..., Result], suite_path: Write) -> None:
    suite = suite_path(CHOICE, choice_rows())
    result = invoke("--validate", "--suite", suite)
    assert result.exit_code == 0
    assert "tiny_choice  12     acc     multiple_choice  2" in result.stdout
    document = json.loads(invoke("--validate", "--suite", suite, "--json").stdout)
    assert document["suites"][0]["items"] == 12


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "no CKPT"),
        (("base",), "nothing to score"),
        (("base", "--suite", "nowhere.yaml"), "no such suite"),
        (("base", "--text", "missing.txt"), "missing.txt: no such file"),
    ],
)
def test_usage_errors(invoke: Callable[..., Result], args: tuple[str, ...], message: str) -> None:
    result = invoke(*args)
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)


def test_a_reference_needs_text(invoke: Callable[..., Result], suite_path: Write) -> None:
    result = invoke("quant", "--suite", suite_path(CHOICE, choice_rows()), "--reference", "base")
    assert isinstance(result.exception, UsageError)


def test_importing_the_command_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, quantkit.cli.eval; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
