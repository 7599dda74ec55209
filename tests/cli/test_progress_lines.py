"""Plain lines of progress: how often, and what they say is left."""

from __future__ import annotations

import pytest

from quantkit.cli import progress as module


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_line_every_ten_seconds_and_one_at_the_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    report = module._lines("work")
    for done in range(26):
        clock[0] = float(done)
        report(done, 25, "x")
    assert told(capsys) == [
        "work: 10/25 x · 10 s, about 15 s left",
        "work: 20/25 x · 20 s, about 5 s left",
        "work: 25/25 x · 25 s, done",
    ]


def test_a_slow_phase_behind_a_fast_one_is_seen(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """A thousand steps in 100 s, then 3 s a step: what is left goes at the speed of now."""
    report = module._lines("work")
    for done in range(1001):
        clock[0] = done / 10
        report(done, 1100, "fast")
    for done in range(1001, 1041):
        clock[0] += 3
        report(done, 1100, "slow")
    assert told(capsys)[-1] == "work: 1040/1100 slow · 220 s, about 180 s left"


def test_nothing_done_is_no_speed(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    report = module._lines("work")
    clock[0] = 11.0
    report(0, 5, "x")
    assert told(capsys) == ["work: 0/5 x · 11 s, nobody knows how long yet"]
