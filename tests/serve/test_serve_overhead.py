"""`benchmarks/serve_overhead.py`: what it asks both sides, its arithmetic, and a whole run."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serve_helpers import Live
from stub_server import answering

from benchmarks import serve_overhead as overhead
from quantkit.models.runtime import Runtime

PROMPT, TOKENS = 12, 5


class Process:
    """Stands for the server's process; it is woken before it is asked."""

    def __init__(self, server: Live) -> None:
        self.url = server.url
        self.signals: list[signal.Signals] = []

    def signal(self, number: signal.Signals) -> None:
        self.signals.append(number)


def options(*more: str, model: str = "ckpt") -> argparse.Namespace:
    return overhead.parse(
        [model, "--prompt-tokens", str(PROMPT), "--output-tokens", str(TOKENS), *more]
    )


def bench_says(speed: float, **wrong: object) -> Callable[[list[str]], str]:
    """Stands for ``quantkit bench decode``: so many tokens a second for each sequence."""

    def run(command: list[str]) -> str:
        given = dict(zip(command[6::2], command[7::2], strict=False))
        batch = int(given["--batch"])
        said = {name.removeprefix("--").replace("-", "_"): int(n) for name, n in given.items() if n}
        speeds = {"prefill_tok_s": 10 * speed, "decode_tok_s": batch * speed}
        return json.dumps({**said, **speeds, "kernels": "decoder/x", **wrong})

    return run


@pytest.fixture
def both(
    server: Live, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Process]:
    """A tiny server and its model's folder; ``bench decode`` says 100 tokens a second."""
    runtime.model.config.save_pretrained(tmp_path / "model")
    process = Process(server)
    asked: list[list[str]] = []

    @contextlib.contextmanager
    def serving(checkpoint: str, arguments: list[str]) -> Iterator[Process]:
        asked.append(arguments)
        yield process

    monkeypatch.setattr(overhead, "serving", serving)
    monkeypatch.setattr(overhead, "run", bench_says(100.0))
    yield process
    [given] = asked
    assert given[given.index("--max-sequences") + 1] == "3"
    assert given[given.index("--speculative-tokens") + 1] == "0"
    assert "--no-prefix-caching" in given


def test_a_whole_run(
    both: Process,
    server: Live,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out.json"
    given = ["--prompt-tokens", str(PROMPT), "--output-tokens", str(TOKENS), "--threads", "1"]
    given += ["--batch", "1", "3", "--rounds", "2", "--repeats", "2", "-o", str(output)]
    monkeypatch.setattr(sys, "argv", ["serve_overhead", str(tmp_path / "model"), *given])
    overhead.main()
    found = json.loads(output.read_text())
    assert [one["batch"] for one in found["rounds"]] == [1, 3, 1, 3]
    assert set(found["overheads"]) == {"1", "3"}
    assert found["hardware"]["threads"] == 1
    assert found["kernels"] == "decoder/x"
    first = found["rounds"][0]
    assert first["bench"]["whole"] == pytest.approx(PROMPT / 1000 + (TOKENS - 1) / 100)
    assert 0 < first["served"]["step"] < first["served"]["whole"]
    assert " x3 " in capsys.readouterr().out
    # It rests but in its four turns, and is awake in the end, so that it can end.
    stop, go_on = signal.SIGSTOP, signal.SIGCONT
    assert both.signals == [stop, *[go_on, stop] * 4, go_on]
    # A warm-up of 3 tokens and 2 repeats, for 1 and 3 prompts, in 2 rounds.
    ended = f'quantkit_requests_total{{outcome="length"}} {2 * (1 + 3) * 3:.1f}'
    assert ended in server.engine.metrics.render().decode()
    tokens = 2 * (1 + 3) * (3 + 2 * TOKENS)
    assert (
        f"quantkit_generated_tokens_total {tokens:.1f}" in server.engine.metrics.render().decode()
    )


def test_too_much_is_exit_code_1(
    both: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overhead, "run", bench_says(1e9))
    given = ["--prompt-tokens", "4", "--output-tokens", "3", "--batch", "3", "--rounds", "1"]
    monkeypatch.setattr(
        sys, "argv", ["serve_overhead", str(tmp_path / "model"), *given, "--limit", "0.08"]
    )
    with pytest.raises(SystemExit, match=r"is more than 8\.0%"):
        overhead.main()


def test_an_overhead_is_the_median_within_rounds() -> None:
    """The machine slows down from round to round, and both sides with it."""
    rounds = [
        overhead.Round(1, overhead.Turn(s, s), overhead.Turn(more * s, 1.5 * s))
        for s, more in ((1.0, 1.04), (4.0, 1.05), (9.0, 3.0))
    ]
    found = overhead.overheads([*rounds, overhead.Round(8, *[overhead.Turn(1, 1)] * 2)], 1)
    assert found == pytest.approx({"whole": 0.05, "step": 0.5})


def test_the_step_is_of_the_answer_that_began_last(
    server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = time.perf_counter()
    arrivals = {(1,): [1.0, 2.0, 9.0], (2,): [3.0, 4.0, 5.0]}

    async def stream(url: str, prompt: tuple[int], tokens: int) -> list[float]:
        return [begun + seconds for seconds in arrivals[prompt]]

    monkeypatch.setattr(overhead, "stream", stream)
    turn = overhead.time_served(Process(server), [(1,), (2,)], 3)
    assert turn.step == pytest.approx(1.0)
    assert turn.whole == pytest.approx(9.0, abs=0.5)


@pytest.mark.parametrize("wrong", [{"threads": 64}, {"new_tokens": TOKENS}, {"batch": None}])
def test_another_measurement_is_refused(
    wrong: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overhead, "run", bench_says(1.0, **wrong))
    with pytest.raises(SystemExit, match="asked for"):
        overhead.time_bench(options("--threads", "1"), 2)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"status": 503, "body": b"busy"}, "503.*busy"),
        ({"body": b'data: {"choices": []}\n\n'}, "the server says"),
        ({"body": b'data: {"choices": [{"token_ids": [1]}]}\n\ndata: [DONE]\n\n'}, "of 1 tokens"),
        ({"body": b'data: {"error": "broke"}\n\ndata: [DONE]\n\n'}, "broke"),
    ],
)
def test_what_is_no_whole_answer_ends_it(answer: dict, message: str) -> None:
    with answering(**answer) as stub, pytest.raises(SystemExit, match=message):
        asyncio.run(overhead.stream(stub.url, [1, 2], 2))


@pytest.mark.parametrize(
    "given",
    [
        ["--output-tokens", "2"],
        ["--batch", "0"],
        ["--batch", "2", "2"],
        ["--rounds", "0"],
        ["--repeats", "0"],
    ],
)
def test_options_that_measure_nothing(given: list[str]) -> None:
    with pytest.raises(SystemExit):
        options(*given)


@pytest.mark.slow
def test_the_real_commands(tiny: Path) -> None:
    """Both sides as child processes."""
    given = ["--batch", "2", "--rounds", "1", "--repeats", "1", "--threads", "1"]
    given += ["--output-tokens", "64"]  # so many do not come in one piece
    rounds, about = overhead.measure(options(*given, model=str(tiny)))
    assert about["kernels"].startswith("decoder/")
    [one] = rounds
    assert min(one.bench.whole, one.bench.step, one.served.whole, one.served.step) > 0
