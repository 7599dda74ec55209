"""Rows after rows of a server that is no server: how many are sent, and what its end does."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from functools import partial

import pytest

from quantkit.engines import process
from quantkit.engines.process import EngineProcess
from quantkit.errors import QuantkitError
from quantkit.loadtest import server
from quantkit.loadtest.answer import Answer
from quantkit.loadtest.ask import Ask
from quantkit.loadtest.client import Client
from quantkit.loadtest.draw import Shape
from quantkit.loadtest.row import Row
from quantkit.loadtest.session import REQUESTS, Rows, Session
from quantkit.loadtest.tiers import LoadTier, Slo

SHAPE = Shape(prompt_tokens=2, output_tokens=2, vocab_size=50)
EVERYBODY = LoadTier("all", 1.0, Slo(ttft=1.0))


class Scripted(Client):
    """Answers at once, by number of the request: ``fates`` holds what is not done."""

    def __init__(self, sent: list[Ask], fates: dict[int, str]) -> None:
        super().__init__("http://127.0.0.1:1", "m")
        self.sent, self.fates = sent, fates

    async def send(self, ask: Ask, due: float) -> Answer:
        self.sent.append(ask)
        fate = self.fates.get(len(self.sent), "done")
        chunks = [due, due] if fate == "done" else []
        return Answer(ask, due, due, chunks, due, fate, "" if fate == "done" else "gone")  # type: ignore[arg-type]


def session(*failed: int, fate: str = "failed", warm_up: int = 1) -> tuple[Session, list[Ask]]:
    sent: list[Ask] = []
    connect = partial(Scripted, sent, dict.fromkeys(failed, fate))
    return Session(connect, [EVERYBODY], warm_up), sent


def measured(rows: Rows) -> tuple[list[Row], str]:
    """The rows until the end, and the error that it was."""
    found: list[Row] = []
    try:
        found.extend(rows)
    except QuantkitError as error:
        return found, error.message
    return found, ""


def test_no_client_is_idle_from_the_start() -> None:
    test, sent = session(warm_up=0)
    rows, _ = measured(test.closed(SHAPE, None, [1, 64]))
    assert [row.total.requests for row in rows] == [REQUESTS, 128]
    assert len(sent) == REQUESTS + 128
    rows, _ = measured(test.closed(SHAPE, 64, [64]))
    assert [row.total.requests for row in rows] == [64]


def test_a_server_that_answers_no_warm_up_is_not_measured() -> None:
    test, sent = session(5, 6)
    assert [row.total.done for row in measured(test.closed(SHAPE, 3, [1]))[0]] == [3]
    rows, error = measured(test.closed(SHAPE, 3, [1, 2]))
    assert (rows, error) == ([], "1 clients: no request that warms up was answered: gone")
    assert len(sent) == 5
    # One of two may fail, and a busy server is one that runs.
    for answered in (session(1, warm_up=2), session(1, fate="shed")):
        rows, error = measured(answered[0].closed(SHAPE, 3, [1]))
        assert (len(rows), error) == (1, "")


def test_a_sweep_has_no_highest_rate_where_the_server_ended() -> None:
    """The second row of four and its warm-up: requests 6 to 10; whoever asks after it is 11."""
    test, _ = session(*range(8, 12))
    rows, error = measured(test.sweep(SHAPE, 4, 1000.0, 2.0, 0.9))
    assert [row.total.failed for row in rows] == [0, 3]
    assert error == "poisson 2000: requests failed, and so does one after them: gone"


@pytest.mark.parametrize("failed", [(4,), (2, 3, 4, 5)])
def test_requests_that_a_server_outlives_are_misses(failed: tuple[int, ...]) -> None:
    """All of a row, too: a server that is too slow for its load is a finding."""
    test, sent = session(*failed)
    rows, error = measured(test.sweep(SHAPE, 4, 1000.0, 2.0, 0.9))
    assert ([row.total.failed for row in rows], error) == ([len(failed)], "")
    assert len(sent) == 6


@pytest.mark.parametrize("ended", [True, False])
def test_a_started_server_that_ended_says_why(ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that still runs has nothing to do with the error."""
    code = f"import time; print('out of memory'); time.sleep({0 if ended else 60})"

    def start(command: list[str], url: str) -> AbstractContextManager[EngineProcess]:
        return process.start([sys.executable, "-S", "-c", code], url)

    def measure() -> None:
        with server.serving("x") as running:
            if ended:
                running.popen.wait()
            raise QuantkitError("no answer")

    monkeypatch.setattr(server, "start", start)
    monkeypatch.setattr(EngineProcess, "wait_ready", lambda self, seconds: None)
    with pytest.raises(QuantkitError) as error:
        measure()
    if ended:
        assert "ended while it was measured" in error.value.message
        assert "out of memory" in error.value.message
    else:
        assert error.value.message == "no answer"
