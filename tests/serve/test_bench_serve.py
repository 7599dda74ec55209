"""`quantkit bench serve` against the real server, and against servers that lie or break."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from serve_helpers import Live, before_forward, serving

from quantkit.cli.main import run as cli
from quantkit.errors import QuantkitError
from quantkit.loadtest.answer import Answer
from quantkit.loadtest.ask import Ask
from quantkit.loadtest.client import Client, CountError
from quantkit.loadtest.drive import open_loop
from quantkit.loadtest.session import REQUESTS
from quantkit.models.runtime import Runtime
from quantkit.serve.config import ServeConfig
from quantkit.serve.engine import EngineConfig
from quantkit.serve.keys import Key, digest
from quantkit.serve.policy.tiers import Tenant, Tier

SMALL = ("--vocab-size", "200", "--prompt-tokens", "9", "--output-tokens", "5", "--warm-up", "1")


def bench(live: Live, *options: str) -> int:
    return cli(["bench", "serve", "--endpoint", live.url, *SMALL, *options])


def read(capfd: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capfd.readouterr().out)


def test_closed_loops_count_every_token(
    server: Live, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    options = ("--concurrency", "1,3", "--requests", "6", "--price-per-hour", "2")
    assert bench(server, *options, "--json", "-o", str(path)) == 0
    said = read(capfd)
    assert json.loads(path.read_text()) == said
    assert said["complete"] is True
    assert [row["load"] for row in said["rows"]] == [1, 3]
    for row in said["rows"]:
        total = row["total"]
        assert (total["requests"], total["done"], total["met"]) == (6, 6, 6)
        assert total["met_tokens"] == 30
        assert total["itl"]["n"] == 24, "a piece for each token, whatever its text is"
        assert 0 < total["ttft"]["p50"] < total["e2e"]["p99"]
        seconds = row["seconds"]
        assert row["cost_per_million_tokens"] == pytest.approx(2 * seconds / 3600 / 30 * 1e6)
    metrics = server.engine.metrics.render().decode()
    assert 'quantkit_requests_total{outcome="length"} 14.0' in metrics, "two of them to warm up"


def test_a_sweep_ends_where_promises_break(
    server: Live, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A promise that nobody can keep: one row, and no rate is sustained."""
    options = ("--sweep", "50", "--slo-e2e", "0", "--requests", "4")
    assert bench(server, *options, "--json") == 0
    said = read(capfd)
    assert [row["total"]["attainment"] for row in said["rows"]] == [0.0]
    assert said["sustained_rate"] is None
    monkeypatch.setattr("quantkit.loadtest.session.MAX_SWEEP_ROWS", 3)
    options = ("--sweep", "50", "--growth", "2", "--slo-ttft", "60", "--requests", "4")
    assert bench(server, *options) == 0
    out = capfd.readouterr().out
    assert [line.split()[1] for line in out.splitlines()[2:5]] == ["50/s", "100/s", "200/s"]
    assert "highest rate with 90% met: 200 requests/s" in out


def test_a_trace_finds_its_shared_prefixes(
    native: Runtime, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two requests of three blocks, of which two are the same: two pages of 64 are found."""
    rows = [
        {"timestamp": at, "input_length": 1536, "output_length": 24, "hash_ids": ids}
        for at, ids in ((0, [1, 2, 3]), (4000, [1, 2, 4]))
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)))
    with serving(native) as live:
        options = ["--trace", str(trace), "--length-scale", "0.125", "--speed", "8", "--json"]
        command = ["bench", "serve", "--endpoint", live.url, "--vocab-size", "200"]
        assert cli([*command, "--warm-up", "0", *options]) == 0
        assert live.engine.counters.prefix_hits == 128
    [row] = read(capfd)["rows"]
    assert (row["kind"], row["total"]["done"], row["total"]["met_tokens"]) == ("trace", 2, 6)


def test_tiers_are_keys(live, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One may send nothing now: all of its requests are shed, and the other one's are not."""
    tenants = (Tenant("paid", "only"), Tenant("free", "only", requests_per_second=1e-6))
    keys = tuple(Key(digest(tenant.name), tenant.name) for tenant in tenants)
    server = live(access=ServeConfig((Tier("only"),), tenants, keys, frozenset()))
    for name in ("paid", "free"):
        (tmp_path / f"{name}.key").write_text(name)
    tiers = tmp_path / "tiers.yaml"
    tiers.write_text(
        "paid: {share: 0.5, key_file: paid.key, ttft: 60}\nfree: {share: 0.5, key_file: free.key}"
    )
    options = ("--rate", "100", "--requests", "20", "--warm-up", "4", "--tiers", str(tiers))
    assert bench(server, *options, "--json") == 0
    [row] = read(capfd)["rows"]
    paid, free = row["tiers"]["paid"], row["tiers"]["free"]
    assert paid["requests"] + free["requests"] == 20
    assert paid["attainment"] == 1.0
    assert free["shed"] == free["requests"] > 0
    assert free["attainment"] == 0.0
    assert row["total"]["shed"] == free["shed"]
    assert all(reason.startswith("status 429") for reason in row["reasons"])


def test_time_counts_from_when_a_request_was_due(live, monkeypatch) -> None:
    """One slot that is held: the second ask waits, and its wait is in its time."""
    server = live(EngineConfig(max_sequences=1))
    go_on = threading.Event()
    before_forward(monkeypatch, server.engine.runner, lambda token_ids: go_on.wait(20))

    async def measure() -> list[Answer]:
        async with Client(server.url, "tiny") as client:
            asyncio.get_running_loop().call_later(0.5, go_on.set)
            return await open_loop(client, [Ask(0.0, "", (1, 2), 3), Ask(0.1, "", (3,), 90)])

    answers = asyncio.run(measure())
    assert [answer.due for answer in answers] == [0.0, 0.1]
    assert answers[0].ttft > 0.4
    assert answers[1].ttft > 0.3
    assert answers[1].e2e > answers[1].ttft


def test_an_interrupt_keeps_the_rows_so_far(
    server: Live, tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path, pressed = tmp_path / "rows.json", []

    def interrupt(token_ids: list[int]) -> None:
        if path.exists() and not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)  # as Ctrl-C does, in the second row

    before_forward(monkeypatch, server.engine.runner, interrupt)
    options = ("--concurrency", "1,1,1", "--requests", "2", "-o", str(path), "--json")
    assert bench(server, *options) == 130
    said = read(capfd)
    assert len(said["rows"]) == 1
    assert said["complete"] is False
    assert json.loads(path.read_text()) == said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "1", "--concurrency", "2"], "exclude each other"),
        (["--rate", "0"], "above 0"),
        (["--concurrency", "1.5"], "whole numbers above 0"),
        (["--rate", ""], "--rate '': numbers above 0"),
        (["--concurrency", ""], "--concurrency '': whole numbers above 0"),
        (["--concurrency", "2,64", "--requests", "63"], "64 clients have one under way each"),
        (["--requests", "8"], "16 clients have one under way each"),
        (["--sweep", "1", "--slo-ttft", "inf"], "--slo-ttft inf: must be a finite number"),
        (["--price-per-hour", "inf"], "--price-per-hour inf: must be a finite number"),
        (["--growth", "2"], "belongs to a sweep"),
        (["--speed", "2"], "belongs to a trace"),
        (["--shared-tokens", "10"], "above --prompt-tokens"),
        (["--serve-arg", "x"], "belongs to a server that is started"),
        (["--trace", "none.jsonl"], "the trace has its own"),
        (["--output-tokens", "600"], "more than the server's context of 512"),
        (["--endpoint-model", "other"], "does not serve 'other'"),
    ],
)
def test_refusals(
    server: Live, options: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert bench(server, *options) == 2
    assert message in capfd.readouterr().err


def test_a_server_must_be_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli(["bench", "serve"]) == 2
    assert "nothing to measure" in capfd.readouterr().err
    assert cli(["bench", "serve", "--endpoint", "http://127.0.0.1:1"]) == 2
    assert "token ids" in capfd.readouterr().err


def test_a_sweep_without_promises_is_refused_before_a_server_is_asked(
    capfd: pytest.CaptureFixture[str],
) -> None:
    nobody = ["bench", "serve", "--endpoint", "http://127.0.0.1:1", *SMALL]
    assert cli([*nobody, "--sweep", "1"]) == 2
    assert "there are none" in capfd.readouterr().err


def test_the_help_names_the_number_of_requests(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli(["bench", "serve", "--help"]) == 0
    assert f"Default: {REQUESTS}," in capfd.readouterr().out


def test_a_server_that_ends_is_not_measured(
    server: Live, tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In its second row: the first one stands, and nothing says that this was all."""
    path, send, sent = tmp_path / "rows.json", Client.send, []

    async def until_the_sixth(client: Client, ask: Ask, due: float) -> Answer:
        sent.append(ask)
        if len(sent) > 6:
            client._http.base_url = "http://127.0.0.1:1"
        return await send(client, ask, due)

    monkeypatch.setattr(Client, "send", until_the_sixth)
    options = ("--sweep", "50", "--slo-ttft", "60", "--requests", "3", "-o", str(path))
    assert bench(server, *options) == 4
    shown = capfd.readouterr()
    assert "so does one after them: ConnectError" in shown.err
    assert "highest rate" not in shown.out
    said = json.loads(path.read_text())
    assert [row["total"]["failed"] for row in said["rows"]] == [0, 2]
    assert said["complete"] is False
    assert "sustained_rate" not in said


@pytest.mark.slow
def test_a_checkpoints_own_server_is_started_and_ended(
    runtime: Runtime, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runtime.model.save_pretrained(tmp_path / "tiny")
    runtime.tokenizer.save_pretrained(tmp_path / "tiny")
    command = ["bench", "serve", str(tmp_path / "tiny"), "--serve-arg=--threads", "--serve-arg=1"]
    load = ["--concurrency", "2", "--requests", "3", "--output-tokens", "4", "--json"]
    assert cli([*command, *load]) == 0
    said = read(capfd)
    assert said["model"] == "tiny"
    assert said["shape"]["vocab_size"] == len(runtime.tokenizer)
    assert said["rows"][0]["total"]["done"] == 3
    assert not [child for child in psutil.Process().children() if "serve" in child.cmdline()]


# --- servers that lie or break -------------------------------------------------------------------


@contextmanager
def scripted(status: int, events: list[object]) -> Iterator[str]:
    """A server that gives everybody one answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            for event in events:
                data = event if isinstance(event, str) else json.dumps(event)
                self.wfile.write(f"data: {data}\n\n".encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def ask_once(status: int, events: list[object]) -> Answer:
    async def send(base: str) -> Answer:
        async with Client(base, "m", timeout=5) as client:
            [answer] = await open_loop(client, [Ask(0.0, "", (1, 2), 2)])
            return answer

    with scripted(status, events) as base:
        return asyncio.run(send(base))


def piece(text: str, finish: str | None = None) -> dict:
    return {"choices": [{"text": text, "finish_reason": finish}]}


def counts(prompt: int, answer: int) -> dict:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": answer}}


def test_an_honest_server() -> None:
    answer = ask_once(200, [piece("a"), piece("b"), piece("", "length"), counts(2, 2), "[DONE]"])
    assert (answer.fate, len(answer.chunks)) == ("done", 2)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([piece("a", "length"), counts(3, 2)], "read 3 and wrote 2 tokens where 2 and 2"),
        ([piece("a", "stop"), counts(2, 1)], "read 2 and wrote 1 tokens where 2 and 2"),
        ([piece("a", "length")], "told no token counts"),
    ],
)
def test_wrong_counts_are_refused(events: list[object], message: str) -> None:
    with pytest.raises(CountError, match=message):
        ask_once(200, events)


DEEP = 100_000 * "["


@pytest.mark.parametrize(
    "data",
    ["{", "5", DEEP, '{"choices": [1]}', '{"choices": 5}', '{"choices": {"a": 1}}'],
)
def test_what_is_no_event_is_refused(data: str) -> None:
    with pytest.raises(QuantkitError, match="which is not"):
        ask_once(200, [data])


def test_what_is_no_usage_is_refused() -> None:
    with pytest.raises(QuantkitError, match=r"sent usage \[1\], which is not an object"):
        ask_once(200, [piece("a", "length"), {"choices": [], "usage": [1]}])


@pytest.mark.parametrize(
    ("status", "events", "fate", "reason"),
    [
        (503, [], "shed", "status 503"),
        (429, [], "shed", "status 429"),
        (500, [], "failed", "status 500"),
        (200, [piece("a"), {"error": {"message": "broke"}}], "failed", "broke"),
        (200, [piece("a"), "[DONE]"], "failed", "the stream ended"),
        (200, [], "failed", "the stream ended"),
    ],
)
def test_what_is_no_answer_is_a_miss(
    status: int, events: list[object], fate: str, reason: str
) -> None:
    answer = ask_once(status, events)
    assert answer.fate == fate
    assert reason in answer.reason
    assert answer.over >= answer.sent > 0


def test_a_request_that_is_wrong_ends_the_run() -> None:
    with pytest.raises(QuantkitError, match="refuses a request as such: status 400"):
        ask_once(400, [])


def test_nobody_there_is_a_failure() -> None:
    async def send() -> Answer:
        async with Client("http://127.0.0.1:1", "m", timeout=5) as client:
            return await client.send(Ask(None, "", (1,), 1), 0.0)

    answer = asyncio.run(send())
    assert answer.fate == "failed"
    assert "ConnectError" in answer.reason


def test_token_ids_come_with_each_piece(post: Callable) -> None:
    body = {"prompt": [5, 6], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    whole = post("/v1/completions", body | {"return_token_ids": True}).json()["choices"][0]
    assert whole["prompt_token_ids"] == [5, 6]
    assert len(whole["token_ids"]) == 4
    text = post("/v1/completions", body | {"return_token_ids": True, "stream": True}).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    told = [c for event in events for c in event["choices"] if "token_ids" in c]
    assert [c["token_ids"] for c in told] == [[i] for i in whole["token_ids"]]
    assert [c["prompt_token_ids"] for c in told] == [[5, 6], None, None, None]
    plain = post("/v1/completions", body).json()["choices"][0]
    assert "token_ids" not in plain
