"""`benchmarks/soak.py`, short: every fault once, and it notices what it looks for."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from benchmarks import soak
from benchmarks.soak_faults import nothing
from benchmarks.soak_server import (
    SPARE_FILES,
    SPARE_MEMORY,
    SPARE_THREADS,
    BrokenError,
    Footprint,
    Soak,
)
from quantkit.models.runtime import Runtime
from quantkit.serve.detokenizer import Detokenizer
from quantkit.serve.engine import Engine
from quantkit.serve.events import Event, Failed
from quantkit.serve.memory import PageMemory
from quantkit.serve.request import Sequence


@pytest.mark.slow
def test_every_fault_once(native: Runtime) -> None:
    rounds: list[str] = []
    answers = soak.run(native, seconds=0, clients=4, seed=0, told=rounds.append)
    assert len(rounds) == len(soak.FAULTS)
    assert answers["right"] >= 4 * len(soak.FAULTS) / 2
    assert answers["failed"] >= 1, "the engine was broken, and nobody noticed"


def leave_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first sequence that ends keeps what it holds."""
    release, left = PageMemory.release, []

    def forgetful(self: PageMemory, sequence: Sequence, *, sound: bool = True) -> None:
        if sequence.cache is not None and not left:
            left.append(sequence.cache)
            sequence.cache = None
        release(self, sequence, sound=sound)

    monkeypatch.setattr(PageMemory, "release", forgetful)


def end_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    end = Engine._end

    def twice(self: Engine, sequence: Sequence, event: Event, outcome: str) -> None:
        end(self, sequence, event, outcome)
        sequence.sink(Failed("again"))

    monkeypatch.setattr(Engine, "_end", twice)


def say_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same question gets another answer each time."""
    letters = itertools.cycle("abcdefghijklmnopqrstuvwxyz")
    monkeypatch.setattr(Detokenizer, "push", lambda self, token_id: next(letters))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (leave_a_page, "tokens held when quiet"),
        (end_twice, "after the terminal one"),
        (say_something_else, "got another answer"),
    ],
)
def test_it_notices(
    native: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[pytest.MonkeyPatch], None],
    message: str,
) -> None:
    monkeypatch.setattr(soak, "FAULTS", {"nothing": nothing})
    harm(monkeypatch)
    with pytest.raises(BrokenError, match=message):
        soak.run(native, seconds=0, clients=2, seed=0)


@pytest.mark.slow
def test_it_notices_what_grows(native: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round keeps more than it may; the second one ends the run."""
    kept: list[bytearray] = []

    async def leak(soak: Soak) -> None:
        kept.append(bytearray(b"x" * 2 * SPARE_MEMORY))

    monkeypatch.setattr(soak, "FAULTS", {"leak": leak})
    with pytest.raises(BrokenError, match="quiet after 2 rounds: memory grew"):
        soak.run(native, seconds=60, clients=1, seed=0)


@pytest.mark.parametrize(
    ("grown", "message"),
    [
        (Footprint(SPARE_MEMORY, SPARE_THREADS, SPARE_FILES), None),
        (Footprint(SPARE_MEMORY + 1, 0, 0), "memory"),
        (Footprint(0, SPARE_THREADS + 1, 0), "threads"),
        (Footprint(0, 0, SPARE_FILES + 1), "open files"),
    ],
)
def test_each_kind_of_growth_is_told(grown: Footprint, message: str | None) -> None:
    told = grown.exceeds(Footprint(0, 0, 0))
    assert (told is None) == (message is None)
    assert message is None or message in str(told)


def test_its_own_footprint_is_one() -> None:
    found = Footprint.now()
    assert found.memory > 2**20
    assert found.threads >= 1
    assert found.files >= 3
