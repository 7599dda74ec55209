"""`quantkit serve` and `quantkit bench decode`, up to the real process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest
import typer
from serve_helpers import wait_until
from typer.testing import CliRunner

from quantkit.cli import bench, serve
from quantkit.errors import UsageError
from quantkit.models.runtime import Runtime

# transformers' modules: the native decoder finishes a tiny model's longest answer at once.
OPTIONS = ("--kernels", "modules", "--port", "0", "--threads", "1", "--json")


class Process:
    """`quantkit serve` as users run it."""

    def __init__(self, checkpoint: Path, *more: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "quantkit.cli.main", "serve", str(checkpoint), *OPTIONS, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self.url = ""

    def wait(self) -> Process:
        """Until it serves."""
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if not line:
            pytest.fail(self.popen.communicate()[1])
        self.url = json.loads(line)["url"]
        return self

    def generate_slowly(self) -> tuple[threading.Thread, list[httpx.Response | Exception]]:
        """Start a long answer in the background and return when it runs."""
        answers: list[httpx.Response | Exception] = []
        body = {"prompt": "a", "max_tokens": 500, "temperature": 0, "stream": True}

        def ask() -> None:
            try:
                answers.append(httpx.post(self.url + "/v1/completions", json=body, timeout=60))
            except httpx.HTTPError as error:
                answers.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(
            lambda: "requests_running 1.0" in httpx.get(self.url + "/metrics").text, seconds=20
        )
        return thread, answers


@pytest.fixture(scope="module")
def checkpoint(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in a folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    runtime.model.save_pretrained(folder)
    runtime.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processes(checkpoint: Path) -> Iterator[list[Process]]:
    """Two servers, started side by side because importing torch takes its seconds."""
    started = [Process(checkpoint), Process(checkpoint)]
    yield started
    for process in started:
        process.popen.kill()
        process.popen.communicate()


def test_a_signal_drains_and_exits_with_0(processes: list[Process]) -> None:
    process = processes[0].wait()
    asking, answers = process.generate_slowly()
    process.popen.send_signal(signal.SIGINT)
    _, stderr = process.popen.communicate(timeout=40)
    asking.join(5)
    assert process.popen.returncode == 0, stderr
    assert "Traceback" not in stderr
    assert isinstance(answers[0], httpx.Response)
    assert answers[0].text.endswith("data: [DONE]\n\n")
    assert "error" not in answers[0].text
    assert f"at {process.url} " in stderr


def test_a_second_signal_interrupts(processes: list[Process]) -> None:
    process = processes[1].wait()
    asking, _ = process.generate_slowly()
    process.popen.send_signal(signal.SIGTERM)
    wait_until(lambda: _refuses(process.url))
    process.popen.send_signal(signal.SIGTERM)
    _, stderr = process.popen.communicate(timeout=20)
    asking.join(5)
    assert process.popen.returncode == 130, stderr


@pytest.mark.slow
def test_a_server_that_is_killed_starts_again_as_if_nothing_had_been(
    checkpoint: Path, tmp_path: Path
) -> None:
    """`kill -9` while an answer streams: its client hears no end; on the same port and files the
    next server says what the first one did."""
    captured = tmp_path / "traffic.jsonl"
    options = ("--capture", str(captured), "--capture-rate", "1")
    body = {"prompt": "The dog", "max_tokens": 20, "temperature": 0}
    started = []
    try:
        started.append(Process(checkpoint, *options))
        first = started[0].wait()
        said = httpx.post(first.url + "/v1/completions", json=body).json()["choices"]
        wait_until(lambda: captured.exists() and captured.read_text().count("\n") == 1)
        asking, answers = first.generate_slowly()
        first.popen.kill()
        first.popen.communicate()
        asking.join(20)
        assert isinstance(answers[0], httpx.HTTPError), "a broken stream that looks whole"
        port = first.url.rpartition(":")[2]
        started.append(Process(checkpoint, *options, "--port", port))
        second = started[1].wait()
        assert second.url == first.url
        assert httpx.get(second.url + "/ready").status_code == 200
        assert "requests_running 0.0" in httpx.get(second.url + "/metrics").text
        assert httpx.post(second.url + "/v1/completions", json=body).json()["choices"] == said
        wait_until(lambda: captured.read_text().count("\n") == 2)
        rows = [json.loads(line) for line in captured.read_text().splitlines()]
        assert rows[0] == rows[1] == {"prompt": "The dog", "completion": said[0]["text"]}
    finally:
        for process in started:
            process.popen.kill()
            process.popen.communicate()


def _refuses(url: str) -> bool:
    try:
        httpx.get(url + "/health")
    except httpx.TransportError:
        return True
    return False


@pytest.fixture
def cli(runtime: Runtime, monkeypatch) -> typer.Typer:
    """The two commands over a loader that returns the tiny model."""
    loader = ModuleType("quantkit.models.load")
    loader.load_runtime = lambda path, **options: runtime  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quantkit.models.load", loader)
    app = typer.Typer()
    app.command("serve")(serve.command)
    app.add_typer(bench.app, name="bench")
    return app


def test_bench_kernels(cli: typer.Typer) -> None:
    options = ["--shapes", "64x96,32x64", "--rows", "1,5", "--rounds", "1"]
    result = CliRunner().invoke(cli, ["bench", "kernels", *options, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["read_gb_s"] > 0
    assert report["int8_tops"] > 0
    kernels = {t["kernel"] for t in report["timings"]}
    assert {"torch bf16", "bf16", "w4 g64", "w4 int8 g64", "int8 int8 g32", "w8a8"} <= kernels
    assert len(report["timings"]) == 4 * len(kernels)
    assert all(t["gb_s"] > 0 and t["roof_share"] > 0 for t in report["timings"])
    fewer = ["--shapes", "32x64", "--rows", "1", "--rounds", "1"]
    plain = CliRunner().invoke(cli, ["bench", "kernels", *fewer])
    assert "w4 int8 g64" in plain.stdout


@pytest.mark.parametrize(("option", "value"), [("--shapes", "64"), ("--rows", "0")])
def test_bench_kernels_refuses_nonsense(cli: typer.Typer, option: str, value: str) -> None:
    result = CliRunner().invoke(cli, ["bench", "kernels", option, value])
    assert isinstance(result.exception, UsageError)
    assert value in str(result.exception)


def test_bench_decode(cli: typer.Typer) -> None:
    options = ["--prompt-tokens", "20", "--new-tokens", "4", "--batch", "2", "--repeats", "2"]
    result = CliRunner().invoke(cli, ["bench", "decode", "tiny", *options, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["prefill_tok_s"] > 0
    assert report["decode_tok_s"] > 0
    assert (report["batch"], report["model"]) == (2, "tiny")
    assert report["kernels"] == "reference/f32"
    assert report["weight_gb_s"] is None  # there is no native decoder
    plain = CliRunner().invoke(cli, ["bench", "decode", "tiny", *options])
    assert "decode_tok_s" in plain.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "no API keys"),
        (["--host", "example.org"], "no API keys"),
        (["--api-keys", "/does/not/exist"], "cannot be read"),
        (["--config", "/does/not/exist"], "cannot be read"),
        (["--config", "a", "--api-keys", "b"], "given both"),
        (["--capture", "traffic.json"], "does not end with .jsonl"),
        (["--engine", "vllm", "--capture", "traffic.jsonl"], "quantkit's own"),
        (["--compare-model", "a"], "of the server to compare with"),
        (["--compare-with", "http://a", "--no-web"], "--no-web leaves that out"),
        (["--compare-with", "file:///etc/passwd"], "not an http or https address"),
        (["--compare-with", "http://a", "--compare-key-file", "/does/not/exist"], "cannot be read"),
        (["--compare-with", "http://a", "--allow-unauthenticated"], "let anyone use"),
        (["--engine", "vllm", "--compare-with", "http://a"], "quantkit's own"),
        (["--tool-parser", "klingon"], "--tool-parser 'klingon' is not known"),
        (["--reasoning-parser", "klingon"], "--reasoning-parser 'klingon' is not known"),
        (["--engine", "vllm", "--tool-parser", "hermes"], "quantkit's own"),
        (["--capture-rate", "0.01"], "--capture-rate: nothing is captured"),
        (["--capture-patterns", "patterns.yaml"], "--capture-patterns: nothing is captured"),
        (["--drain-seconds", "inf"], "--drain-seconds inf is not a number"),
        (["--otlp-endpoint", "localhost:4318"], "is no http:// or https:// address"),
        (["--host", "203.0.113.1", "--allow-unauthenticated"], "cannot listen"),
        (["--port", "0", "--max-context", "100000"], "not between 2 and the model's 512"),
    ],
)
def test_refusals(cli: typer.Typer, options: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["serve", "tiny", *options])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)


def test_comparing_needs_an_operator(cli: typer.Typer, tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(
        "tiers: {a: {weight: 1}}\ntenants: {b: {tier: a, keys: ['0123456789abcdef']}}\n"
    )
    options = ["--config", str(config), "--compare-with", "http://a"]
    result = CliRunner().invoke(cli, ["serve", "tiny", *options])
    assert isinstance(result.exception, UsageError)
    assert "no tenant of" in str(result.exception)
    assert "operator: true" in str(result.exception)


@pytest.mark.parametrize(
    "options",
    [
        ["--config", "serve.yaml"],
        ["--capture", "traffic.jsonl"],
        ["--capture-rate", "0.01"],
        ["--capture-patterns", "patterns.yaml"],
        ["--otlp-endpoint", "http://localhost:4318/v1/traces"],
        ["--prefill-chunk", "256"],
        ["--stream-interval", "1"],
        ["--kv-cache-dtype", "auto"],
        ["--prefix-caching"],
        ["--no-prefix-caching"],
        ["--speculative-tokens", "0"],
        ["--threads", "1"],
        ["--kernels", "native"],
        ["--device", "cpu"],
    ],
)
def test_options_that_another_engine_lacks_are_refused(
    cli: typer.Typer, options: list[str]
) -> None:
    """The defaults as well: whoever writes them down believes that they hold."""
    result = CliRunner().invoke(cli, ["serve", "tiny", "--engine", "vllm", *options])
    assert isinstance(result.exception, UsageError)
    assert "is quantkit's own; vllm has none" in str(result.exception)


def test_a_taken_port_is_a_usage_error(cli: typer.Typer) -> None:
    from quantkit.serve.api.server import bind

    with bind("127.0.0.1", 0) as sock:
        sock.listen()
        port = sock.getsockname()[1]
        result = CliRunner().invoke(cli, ["serve", "tiny", "--port", str(port)])
    assert isinstance(result.exception, UsageError)
    assert "choose another --port" in str(result.exception)


def test_the_commands_import_no_torch() -> None:
    code = "import sys, quantkit.cli.serve, quantkit.cli.bench; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
