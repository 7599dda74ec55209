"""`benchmarks/vs_servers.py`: what it sends, how it computes, a whole run on one tiny server."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from serve_helpers import Live

from benchmarks import vs_servers as vs
from quantkit.engines.artifact import Artifact
from quantkit.loadtest.answer import Answer
from quantkit.loadtest.ask import Ask
from quantkit.loadtest.row import Row, make_row
from quantkit.models.runtime import Runtime
from quantkit.schemes import SCHEMES

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
    peer = vs.Peer("a", "", None, "m", "w4a16-g64", "version: 7", {("off", 1): [row(1)]})
    args = vs.parse(["model", "--text", "t", "--concurrency", "1"])
    [told] = vs.document(args, {"off": [peer]})["phases"]["off"]
    assert (told["schemes"], told["version"]) == ("w4a16-g64", "version: 7")


def test_options_that_belong_together() -> None:
    for options in (["--llama-server", "x"], ["--vllm-python", "x"], ["--output-tokens", "1"]):
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
