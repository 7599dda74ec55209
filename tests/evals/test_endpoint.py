"""`quantkit eval --endpoint` against a server that keeps to the API, and against liars."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from eval_builders import CHOICE, GENERATE, choice_rows
from fake_server import Json, Lie, Reply, fake_server
from typer.testing import CliRunner

from quantkit.cli.main import run
from quantkit.errors import UsageError
from quantkit.evals.endpoint import EndpointConfig, _pause, connect, read_key
from quantkit.evals.endpoint_model import EndpointLM
from quantkit.results import Results
from tests.conftest import byte_tokenizer

TEXT = "Please send the parcel before the end of the month, the bus was late. " * 4


def decode(token: int) -> str:
    return str(TOKENIZER.decode([token]))


TOKENIZER = byte_tokenizer()


@pytest.fixture
def ask(tiny: Path, tmp_path: Path) -> Callable[..., int]:
    """``ask(url, *options)`` → exit code of `quantkit eval --endpoint` on a short text."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    def call(url: str, *options: str, canary: bool = False) -> int:
        base = ["eval", str(tiny), "--endpoint", url, "--text", str(text), "--seq-len", "64"]
        return run([*base, *options, "--canary" if canary else "--no-canary"])

    return call


def test_an_honest_server_is_scored(ask: Callable[..., int], tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    with fake_server(decode) as url:
        assert ask(url + "/v1/", "-o", str(out), canary=True) == 0
    results = Results.load(out)
    assert results.fingerprint["server"] == "fake 1.2"
    assert results.fingerprint["served_model"] == "fake"
    assert "model" not in results.fingerprint
    assert results.text is not None
    assert 0.5 < results.text.mean_nll < 3


def test_suites_are_asked(
    tiny: Path, suite_path: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = suite_path(CHOICE, choice_rows(4)).parent
    generate = suite_path(GENERATE, [{"word": "late"}, {"word": "lat"}])
    with fake_server(decode) as url:
        base = ["eval", str(tiny), "--endpoint", url, "--json", "--no-canary"]
        assert run([*base, "--suite", str(folder), "--suite", str(generate)]) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert tasks["tiny_choice"]["n"] == 4
    # "late" is cut at the stop string "e", whichever of them the server was sent.
    assert tasks["tiny_generate"]["value"] == 0.5


def test_a_tie_with_the_most_likely_token_is_greedy() -> None:
    def flat(n: int, answer: Json, body: Json) -> Json:
        logprobs = answer["choices"][0]["logprobs"]
        logprobs["top_logprobs"] = [
            None if v is None else {"token_id:7": v} for v in logprobs["token_logprobs"]
        ]
        return answer

    ids = [ord(c) for c in "the bus"]
    for lie, greedy in ((flat, True), (lambda n, answer, body: answer, False)):
        with fake_server(decode, lie) as url:
            lm = EndpointLM(connect(EndpointConfig(url)), TOKENIZER)
            assert lm.score([(ids[:1], ids[1:])])[0][1] is greedy


def edited(change: Callable[[Json, Json], None]) -> Lie:
    """The honest answer with something changed in (its logprobs, itself)."""

    def lie(n: int, answer: Json, body: Json) -> Json:
        change(answer["choices"][0]["logprobs"], answer)
        return answer

    return lie


def no_echo(logprobs: Json, answer: Json) -> None:
    for key in ("tokens", "token_logprobs", "top_logprobs"):
        logprobs[key] = logprobs[key][-1:]


def one_token_more(logprobs: Json, answer: Json) -> None:
    for key in ("tokens", "token_logprobs", "top_logprobs"):
        logprobs[key] = [logprobs[key][0], *logprobs[key], logprobs[key][-1]]


def counts_another_prompt(logprobs: Json, answer: Json) -> None:
    answer["usage"]["prompt_tokens"] += 1


def echoes_another_prompt(logprobs: Json, answer: Json) -> None:
    logprobs["tokens"][3] = "token_id:9"


def constant(logprobs: Json, answer: Json) -> None:
    logprobs["token_logprobs"][1:] = [-1.5] * (len(logprobs["tokens"]) - 1)


def set_value(value: Any) -> Callable[[Json, Json], None]:
    def change(logprobs: Json, answer: Json) -> None:
        logprobs["token_logprobs"][2] = value

    return change


def no_alternatives(logprobs: Json, answer: Json) -> None:
    logprobs["top_logprobs"] = [None] * len(logprobs["tokens"])


def no_logprobs(logprobs: Json, answer: Json) -> None:
    answer["choices"][0]["logprobs"] = None


def set_key(key: str, value: Any) -> Callable[[Json, Json], None]:
    def change(logprobs: Json, answer: Json) -> None:
        (answer if key in answer else answer["choices"][0])[key] = value

    return change


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        (edited(no_echo), "1 tokens echoed (1 log-probabilities) where 64 were sent"),
        (edited(one_token_more), "67 tokens echoed"),
        (edited(counts_another_prompt), "65 prompt tokens counted where 64 were sent"),
        (edited(echoes_another_prompt), "other token ids echoed than were sent"),
        (edited(constant), "63 log-probabilities that are all -1.5"),
        (edited(set_value(None)), "None where a log-probability belongs"),
        (edited(set_value(math.nan)), "nan where a log-probability belongs"),
        (edited(set_value(0.5)), "0.5 where a log-probability belongs"),
        (edited(no_alternatives), "without its most likely alternative"),
        (edited(no_logprobs), "without log-probabilities"),
        (edited(set_key("logprobs", [1])), "without log-probabilities"),
        (edited(set_key("usage", [1])), "None prompt tokens counted where 64 were sent"),
        (lambda n, a, b: {"choices": []}, "without exactly one choice"),
        (lambda n, a, b: Reply({"error": {"message": "out of pages"}}, 500), "500: out of pages"),
        (lambda n, a, b: Reply("<html>", 502), "status 502: <html>"),
        (lambda n, a, b: Reply({"detail": "no key"}, 401), "--endpoint-key-file"),
        (lambda n, a, b: Reply("", 302, {"location": "/elsewhere"}), "status 302"),
        (lambda n, a, b: Reply("not json"), "is not JSON"),
        (lambda n, a, b: Reply("[]"), "is not a JSON object"),
        (lambda n, a, b: Reply("", 503, {"retry-after": "0"}), "still busy (status 503) after 8"),
        (lambda n, a, b: Reply("", 429, {"retry-after": "900"}), "wants a pause of 900 s"),
    ],
)
def test_liars_end_with_4(
    ask: Callable[..., int], capsys: pytest.CaptureFixture[str], lie: Lie, says: str
) -> None:
    with fake_server(decode, lie) as url:
        assert ask(url) == 4
    assert says in capsys.readouterr().err


def test_a_server_that_hangs_ends_with_4(
    ask: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_server(decode, lambda n, a, b: Reply(a, delay=3.0)) as url:
        assert ask(url, "--endpoint-timeout", "1") == 4
    assert "no answer in 1 s" in capsys.readouterr().err


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(ask: Callable[..., int], status: int) -> None:
    def busy_at_first(n: int, answer: Json, body: Json) -> Reply | Json:
        return Reply("", status, {"retry-after": "0"}) if n < 3 else answer

    with fake_server(decode, busy_at_first) as url:
        assert ask(url, "--concurrency", "2") == 0


@pytest.mark.parametrize("asked", ["²", "Thu, 01 Jan 0001 00:00:00", "soon", "1e3"])
def test_a_pause_that_is_no_time_is_our_own(asked: str) -> None:
    answer = httpx.Response(503, headers=[(b"retry-after", asked.encode())])
    assert 0 <= _pause(answer, 0) <= 0.5


def uniform(logprobs: Json, answer: Json) -> None:
    """Chance level, with the noise that a constant would lack."""
    chance = -math.log(len(TOKENIZER))
    values = [chance + 1e-6 * i for i in range(len(logprobs["tokens"]))]
    logprobs["token_logprobs"] = [None, *values[1:]] if len(values) > 1 else [chance]
    logprobs["top_logprobs"] = [{"token_id:0": v} for v in values]


def disorder(logprobs: Json, answer: Json) -> None:
    """A server whose probabilities belong to another text."""
    values = logprobs["token_logprobs"]
    logprobs["token_logprobs"] = [None if v is None else -3.5 - v for v in values[:-1]] + values[
        -1:
    ]


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        (uniform, "canary 'uniform'"),
        (disorder, "canary 'shuffled words'"),
        (set_key("logprobs", [1]), "without log-probabilities"),
    ],
)
def test_chance_level_log_probabilities_fail_the_canaries(
    ask: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    lie: Callable[[Json, Json], None],
    says: str,
) -> None:
    with fake_server(decode, edited(lie)) as url:
        assert ask(url, canary=True) == 4
    assert says in capsys.readouterr().err


def test_nobody_listens(ask: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("http://127.0.0.1:1") == 4
    assert "check that the server runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--reference", "base"), "KL and top-1 agreement need the whole distribution"),
        (("--kernels", "reference"), "another engine chooses its own"),
        (("--endpoint-model", "b"), "does not serve 'b'; it has a, c"),
        ((), "serves 2 models: a, c; name one with --endpoint-model"),
        (("--endpoint-model", "a", "--seq-len", "4096"), "takes 511 tokens of text"),
        (("--endpoint-key-file", "/does/not/exist"), "cannot be read"),
    ],
)
def test_usage_errors_end_with_2(
    ask: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    says: str,
) -> None:
    with fake_server(decode, models=("a", "c")) as url:
        assert ask(url, *options) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://host",
        "http://user:pass@host",
        "http://host/?key=1",
        "http://",
        "http://h:99999",
    ],
)
def test_a_url_is_a_plain_address(url: str) -> None:
    with pytest.raises(UsageError, match="endpoint"):
        EndpointConfig(url)


def test_a_key_is_the_first_line_and_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("# for tests\n\nsecret-1\nsecret-2\n")
    assert read_key(path) == "secret-1"
    assert "secret" not in repr(EndpointConfig("http://host", key=read_key(path)))
    path.write_text("# nothing\n")
    with pytest.raises(UsageError, match="holds no key"):
        read_key(path)


def test_help_shows_the_options() -> None:
    import typer

    from quantkit.cli import eval as eval_cli

    app = typer.Typer()
    app.command()(eval_cli.command)
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout
    assert "--endpoint-key-file" in shown
