"""What a load test leaves when it cannot be written down, or ends early."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantkit.cli.load_record import record
from quantkit.errors import QuantkitError
from quantkit.loadtest.answer import Answer
from quantkit.loadtest.ask import Ask
from quantkit.loadtest.row import Row, make_row
from quantkit.loadtest.tiers import LoadTier, Slo

TIER = LoadTier("all", 1.0, Slo())
ABOUT = {"model": "tiny", "server": "a server", "client": {"cpu": "a CPU"}}


def row(clients: int) -> Row:
    answer = Answer(Ask(0.0, TIER.name, (1, 2, 3), 2), 0.0, 0.0, [0.5, 1.0])
    return make_row("closed", clients, [answer], [TIER], price_per_hour=None)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_full_disk_hides_nothing(
    as_json: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(path: Path, document: object) -> None:
        raise QuantkitError(f"{path}: the disk is full")

    monkeypatch.setattr("quantkit.results.write_json", full)
    with pytest.raises(QuantkitError, match="the disk is full"):
        record(iter([row(4)]), ABOUT, tmp_path / "load.json", as_json, None)
    out = capsys.readouterr().out
    if as_json:
        (measured,) = json.loads(out)["rows"]
        assert (measured["load"], measured["total"]["done"]) == (4, 1)
    else:
        assert "4 clients" in out


def test_a_server_that_dies_first_replaces_no_file(tmp_path: Path) -> None:
    def dead() -> Iterator[Row]:
        raise QuantkitError("no answer")
        yield

    path = tmp_path / "load.json"
    record(iter([row(1), row(2)]), ABOUT, path, True, None)
    before = path.read_text()
    assert [r["load"] for r in json.loads(before)["rows"]] == [1, 2]
    with pytest.raises(QuantkitError, match="no answer"):
        record(dead(), ABOUT, path, True, None)
    assert path.read_text() == before
