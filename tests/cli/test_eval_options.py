"""Options that would be ignored beside others are refused, before anything is loaded."""

from __future__ import annotations

import inspect

import pytest

from quantkit.cli import engine as engines
from quantkit.cli import eval as eval_cli
from quantkit.cli import eval_options
from quantkit.cli.main import run

SUITE = ["--suite", "support_intent"]
PLAN = ["eval", "--plan", *SUITE]
SCORE = ["eval", "nowhere", *SUITE]


def test_the_tables_name_parameters() -> None:
    known = set(inspect.signature(eval_cli.command).parameters)
    tables = eval_options.SCORING, eval_options.LOADING, eval_options.SERVER, eval_options.ASKING
    for table in (*tables, engines.OPTIONS):
        assert set(table) <= known


@pytest.mark.parametrize(
    "option",
    [
        ["--text", "a.txt"],
        ["--reference", "m"],
        ["-o", "a.json"],
        ["--seq-len", "8"],
        ["--canary"],
        ["--no-canary"],
        ["--noise-floor", "modules"],
        ["--stop-early", "a.json"],
        ["--endpoint", "http://x"],
        ["--engine", "vllm"],
        ["--concurrency", "2"],
        ["--engine-timeout", "9"],
    ],
    ids=lambda option: option[0],
)
def test_a_plan_scores_nothing(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for checkpoint in ([], ["nowhere"]):
        assert run([*PLAN, *checkpoint, *option]) == 2
        assert "--plan scores nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        ["--threads", "1"],
        ["--kernels", "modules"],
        ["--kv-cache-dtype", "int8"],
        ["--key", "public.pem"],
        ["--allow-code"],
        ["--judge", "http://x"],
    ],
    ids=lambda option: option[0],
)
def test_a_plan_without_a_checkpoint(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*PLAN, *option]) == 2
    assert f"{option[0]}: --plan without a CKPT runs no model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--flip-rate", "0.1"], "--flip-rate: is what --plan plans for"),
        (["--endpoint-model", "m"], "--endpoint-model: there is no --endpoint"),
        (["--engine", "vllm", "--endpoint-model", "m"], "there is no --endpoint"),
        (["--engine", "vllm", "--endpoint-key-file", "k"], "there is no --endpoint"),
        (["--endpoint-timeout", "300"], "--endpoint-timeout: CKPT is loaded here"),
        (["--concurrency", "8"], "--concurrency: CKPT is loaded here"),
        (["--engine-timeout", "900"], "--engine-timeout: belongs to another engine"),
        (["--endpoint", "http://x", "--engine-timeout", "9"], "belongs to another engine"),
        (["--endpoint", "http://x", "--engine", "vllm"], "give one of them"),
        (["--endpoint", "http://x", "--key", "k"], "serve them with `quantkit serve --key`"),
        (["--endpoint", "http://x", "--kv-cache-dtype", "int8"], "--kv-cache-dtype int8: another"),
        (["-o", "absent/results.json"], "absent: no folder to write results.json in"),
    ],
)
def test_scoring(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SCORE, *options]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "does"), [("--list", "prints names"), ("--validate", "checks suites")]
)
def test_a_listing_reads_nothing_else(
    flag: str, does: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for given, name in ((["nowhere"], "CKPT"), (["--text", "a.txt"], "--text")):
        assert run(["eval", flag, *given]) == 2
        assert f"{name}: {flag} {does} and nothing else" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--engine-timeout", "--tensor-parallel", "--engine-python"])
def test_serving_without_another_engine(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "nowhere", option, "9"]) == 2
    assert f"{option}: belongs to another engine; add --engine vllm" in capsys.readouterr().err


def test_a_flip_rate_is_a_share(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("nan", "inf", "-1", "1.5"):
        assert run([*PLAN, "--flip-rate", wrong]) == 2
        assert "is not between 0 and 1" in capsys.readouterr().err
