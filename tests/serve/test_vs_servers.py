"""`benchmarks/vs_servers.py`: what it sends, how it computes, a whole run on one tiny server."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from serve_helpers import Live

from benchmarks import vllm_configs
from benchmarks import vs_servers as vs
from benchmarks.vllm_configs import Config, Trial, best, read_config
from quantkit.engines.artifact import Artifact
from quantkit.loadtest.answer import Answer
from quantkit.loadtest.ask import Ask
from quantkit.loadtest.row import Row, make_row
from quantkit.models.runtime import Runtime
from quantkit.schemes import SCHEMES
from tests.engines.fake_vllm import make_environment

TEXT = "The quick brown fox sleeps, and the lazy dog jumps over it. "


@pytest.fixture
def original(runtime: Runtime, tmp_path: Path) -> Path:
    runtime.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT * 60)
    return tmp_path / "model"


def row(seconds_a_token: float) -> Row:
    chunks = [seconds_a_token * (i + 1) for i in range(5)]
    return make_row("closed", 1, [Answer(Ask(None, "all", (1,), 5), 0, 0, chunks)], [vs.EVERYBODY])


def test_windows_are_used_once_and_share_what_they_should(original: Path) -> None:
    prompts = vs.Prompts(original, original.parent / "text.txt")
    off = prompts.row("off", 3, 8, 5)
    on = prompts.row("on", 3, 8, 5)
    assert {len(ask.prompt_ids) for ask in off + on} == {8}
    assert [i for ask in off for i in ask.prompt_ids] == prompts.ids[:24]
    assert {ask.prompt_ids[:6] for ask in on} == {tuple(prompts.ids[24:30])}
    assert [i for ask in on for i in ask.prompt_ids[6:]] == prompts.ids[30:36]
    with pytest.raises(SystemExit, match="too few"):
        prompts.take(len(prompts.ids))


def test_ratios_are_medians_within_rounds() -> None:
    """The machine slows down from round to round, and both with it: the ratio stays 2."""
    ours = vs.Peer("a", "", None, rows={("off", 1): [row(1), row(2), row(9)]})
    theirs = vs.Peer("b", "", None, rows={("off", 1): [row(2), row(4), row(18)]})
    assert vs.ratio(ours, theirs, "off", 1, "tok/s") == pytest.approx(2.0)
    assert vs.ratio(ours, theirs, "off", 1, "TTFT ms") == pytest.approx(0.5)
    assert vs.figure(ours, "off", 1, "TPOT ms") == pytest.approx(2000)
    lines = vs.table([ours, theirs], "off", [1])
    assert lines[3].split()[-3:] == ["2.00x", "0.50x", "0.50x"]


def test_answers_in_one_piece_have_no_time_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vs, "COLUMNS", {"TPOT ms": lambda row: row.total.tpot.p50 - 2})
    ours = vs.Peer("a", "", None, rows={("off", 1): [row(3), row(4)]})
    theirs = vs.Peer("b", "", None, rows={("off", 1): [row(2), row(6)]})
    assert vs.ratio(ours, theirs, "off", 1, "TPOT ms") == pytest.approx(0.5)
    theirs.rows["off", 1][1] = row(2)
    assert vs.ratio(ours, theirs, "off", 1, "TPOT ms") is None
    assert vs.table([ours, theirs], "off", [1])[3].split()[-1] == "-"


def test_a_server_is_known_by_its_weights_and_its_build(tmp_path: Path) -> None:
    tool = tmp_path / "llama-server"
    tool.write_text("#!/bin/sh\necho 'version: 7 (abc)' >&2\necho 'built with gcc' >&2\n")
    tool.chmod(0o755)
    assert vs.llama_version(tool) == "version: 7 (abc) built with gcc"
    mixed = [SCHEMES["w4a16-g64"], SCHEMES["w8a16-g32"]]
    about: dict = {"kv": None, "context": None, "size_bytes": 1, "bits_per_weight": None}
    for schemes, dtype, name in (
        (mixed, "bfloat16", "w4a16-g64, w8a16-g32"),
        ([], "bfloat16", "bfloat16"),
    ):
        assert vs.schemes_of(Artifact(tmp_path, tuple(schemes), dtype=dtype, **about)) == name
    peer = vs.Peer("a", "", None, "m", "w4a16-g64", "version: 7", rows={("off", 1): [row(1)]})
    args = vs.parse(["model", "--text", "t", "--concurrency", "1"])
    [told] = vs.document(args, {"off": [peer]})["phases"]["off"]
    assert (told["schemes"], told["version"]) == ("w4a16-g64", "version: 7")


def test_options_that_belong_together() -> None:
    for options in (
        *(["--llama-server", "x"], ["--vllm-python", "x"], ["--output-tokens", "1"]),
        *(["--vllm-search"], ["--vllm-config", "a=B=1"]),
        ["--vllm-python", "x", "--vllm-model", "y", "--vllm-config", "a=word"],
    ):
        with pytest.raises(SystemExit):
            vs.parse(["model", "--text", "t", *options])


def test_a_whole_run(
    server: Live, original: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    output = original.parent / "out.json"
    options = [
        *(str(original), "--text", str(original.parent / "text.txt"), "-o", str(output)),
        *("--server", f"one={server.url}", "--server", f"two={server.url}"),
        *("--prompt-tokens", "8", "--output-tokens", "4", "--concurrency", "1", "2"),
        *("--requests", "2", "--rounds", "2", "--phase", "off"),
    ]
    monkeypatch.setattr(sys, "argv", ["vs_servers", *options])
    vs.main()
    shown = capsys.readouterr().out
    assert "one over it" in shown
    said = json.loads(output.read_text())
    [one, two] = said["phases"]["off"]
    assert [len(r["rounds"]) for r in one["rows"]] == [2, 2]
    assert two["ratios"]["1"]["tok/s"] > 0
    ended = 'quantkit_requests_total{outcome="length"} 28.0'  # 2 x (2 + 2 rounds x (2 + 4))
    assert ended in server.engine.metrics.render().decode()


# --- the fastest way to start vLLM -----------------------------------------------------------

#: Stands for vLLM: streams what is asked for, as fast as ``PACE`` says, unless told to break.
STREAMING = """
import http.server, json, os, sys, time

flags = dict(zip(sys.argv[1:], sys.argv[2:]))
if flags.get("--break") == "start":
    sys.exit("ValueError: no such kernel")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(json.dumps({"/health": {}, "/version": {"version": "0.32.0"}, "/v1/models": {
            "data": [{"id": flags["--served-model-name"], "owned_by": "vllm"}]}}[self.path]))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if flags.get("--break") == "answers":
            self.send_error(500)
            return
        time.sleep(float(os.environ.get("PACE", "0.15")))
        n = body["max_tokens"]
        events = [{"choices": [{"index": 0, "text": "x", "token_ids": [1]}]}] * n
        events.append({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": n}
        events.append({"choices": [], "usage": usage})
        self.reply("".join("data: %s\\n\\n" % json.dumps(e) for e in events) + "data: [DONE]\\n\\n")

    def reply(self, text):
        self.send_response(200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass

http.server.ThreadingHTTPServer((flags["--host"], int(flags["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    """The interpreter of an environment with a stand-in for vLLM."""
    python = make_environment(tmp_path / "vllm", version="0.32.0+cpu")
    module = tmp_path / "vllm" / "packages" / "vllm" / "entrypoints" / "openai" / "api_server.py"
    module.write_text(STREAMING)
    return python


def test_settings_are_written_as_in_a_shell() -> None:
    text = "A_1=x=y B='two words' --flag 7 --other C=3"
    found = read_config("it", text, 1)
    assert found == Config(
        "it", {"A_1": "x=y", "B": "two words"}, ("--flag", "7", "--other", "C=3")
    )
    assert read_config("plain", "", 1) == Config("plain")
    for wrong in ("word", "A=1 word", "1A=2", "A=1 'open"):
        with pytest.raises(ValueError):
            read_config("it", wrong, 1)


@pytest.mark.parametrize(
    ("mine", "threads", "told"),
    [({0, 1, 2, 3}, 2, "0-1"), ({2, 5, 7}, 3, "2,5,7"), ({4}, 8, "4"), ({3, 4}, 8, "3-4")],
)
def test_cores_are_those_that_may_be_used(
    mine: set[int], threads: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_configs.os, "sched_getaffinity", lambda pid: mine)
    assert vllm_configs.cores(threads) == told
    bound = read_config("bound", vllm_configs.CONFIGS["bound"], threads)
    assert bound.environment == {"VLLM_CPU_OMP_THREADS_BIND": told}


def test_every_named_way_can_be_read() -> None:
    ways = [read_config(name, text, 2) for name, text in vllm_configs.CONFIGS.items()]
    assert len({(str(way.environment), way.arguments) for way in ways}) == len(ways)
    assert all(name.startswith("VLLM_CPU_") for way in ways for name in way.environment)


def test_the_best_is_so_on_the_whole() -> None:
    """One that fails is never the best, however fast it had been."""
    fast_alone = Trial(Config("a"), {1: 100.0, 16: 100.0})
    on_the_whole = Trial(Config("b"), {1: 90.0, 16: 200.0})
    broken = Trial(Config("c"), {1: 1e6}, "it ended")
    assert best([fast_alone, on_the_whole, broken]).name == "b"
    with pytest.raises(SystemExit, match="c: it ended"):
        best([broken])


def test_the_fastest_way_is_measured_and_all_are_told(
    vllm: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(TEXT * 20)
    options = [
        *(str(tiny), "--text", str(text), "-o", str(output), "--phase", "off", "--rounds", "1"),
        *("--vllm-python", str(vllm), "--vllm-model", str(tiny), "--threads", "1"),
        *("--prompt-tokens", "8", "--output-tokens", "4", "--concurrency", "1", "2"),
        *(
            "--requests",
            "1",
            "--vllm-config",
            "slow=--flag 0",
            "--vllm-config",
            "fast=PACE=0.0 --flag 1",
        ),
        *("--vllm-config", "dead=--break start", "--vllm-config", "broken=--break answers"),
    ]
    monkeypatch.setattr(sys, "argv", ["vs_servers", *options])
    vs.main()
    found = json.loads(output.read_text())
    [peer] = found["phases"]["off"]
    assert (peer["name"], peer["config"]) == ("vllm", "fast")
    assert [len(row["rounds"]) for row in peer["rows"]] == [1, 1]
    slow, fast, dead, broken = found["vllm_search"]
    assert set(slow["speeds"]) == set(fast["speeds"]) == {"1", "2"}
    assert slow["failure"] is fast["failure"] is None
    assert slow["speeds"]["1"] < fast["speeds"]["1"]
    assert fast["config"]["environment"] == {"PACE": "0.0"}
    assert fast["config"]["arguments"] == ["--flag", "1"]
    assert "no such kernel" in dead["failure"]
    assert "a request was failed: status 500" in broken["failure"]
    assert "PACE" not in os.environ


def test_one_way_needs_no_search() -> None:
    given = ["model", "--text", "t", "--vllm-python", "p", "--vllm-model", "m"]
    args = vs.parse([*given, "--vllm-config", "mine=A=1"])
    assert vs.choose_vllm(args, None) == (Config("mine", {"A": "1"}), [])
    assert vs.choose_vllm(vs.parse(given), None) == (Config(), [])
    names = [way.name for way in vs.parse([*given, "--vllm-search"]).vllm_ways]
    assert names == list(vllm_configs.CONFIGS)
