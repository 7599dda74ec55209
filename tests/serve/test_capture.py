"""Captured traffic: what is redacted, what calibrate reads, and what a full disk does."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from serve_helpers import wait_until

from quantkit.data.rows import to_document
from quantkit.errors import UsageError
from quantkit.serve import capture as module
from quantkit.serve.capture import Capture, CaptureConfig
from quantkit.serve.redaction import PATTERNS, read_patterns, redact


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to jane.doe+x@mail.example.co.uk.", "write to <email>."),
        ("call +49 (0)30 1234567 now", "call <phone> now"),
        ("call (030) 123-4567", "call <phone>"),
        ("or 555-123-4567", "or <phone>"),
        ("card 4111 1111 1111 1111,", "card <number>,"),
        ("account 12345678", "account <number>"),
        ("IBAN DE89370400440532013000.", "IBAN <number>."),
        ("NO93 8601 1117 947 and MT84 MALT 0110 0001 2345 MTLC AST0 01S", "<number> and <number>"),
        ("1" * 100 + ", " + "2 " * 50, "<number>, <number> "),
        ("OPENAI=sk-abcdefghijklmnop123456", "OPENAI=<key>"),
        ("token ghp_abcdefghijklmnopqrstuvwxyz", "token <key>"),
        ("id AKIAIOSFODNN7EXAMPLE", "id <key>"),
        ("Authorization: Bearer abc.def-ghi_jkl", "Authorization: <key>"),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSMeKKF2QT4", "<key>"),
        ("hash 5e884898da28047151d0e56f8dc6292773603d0d6aabbdd6", "hash <key>"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "<key>"),
        ("-----BEGIN PRIVATE KEY-----\nMIIEv+/=\n-----END PRIVATE KEY-----.", "<key>."),
        (
            "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n"
            "DEK-Info: AES-128-CBC,3F17\n\nqwerty/+asdf\n-----END RSA PRIVATE KEY-----\nafter it",
            "<key>\nafter it",
        ),
        (
            "-----BEGIN PGP PRIVATE KEY BLOCK-----\nComment: GPG-made\n\nlQdGBF\n=aB3d\n"
            "-----END PGP PRIVATE KEY BLOCK-----",
            "<key>",
        ),
        ("cut off: -----BEGIN EC PRIVATE KEY-----\nMHcCAQEE", "cut off: <key>"),
        ("-----BEGIN PUBLIC KEY-----\nMFkw\n-----END PUBLIC KEY-----", None),
        ("in 2024 we sold 1,234,567 of 3.14159265 at 10:30", None),
        ("version 1.2.3 and Donaudampfschifffahrtsgesellschaftskapitaen", None),
        ("Größe 東京 🙂 a@b", None),
    ],
)
def test_redaction(text: str, expected: str | None) -> None:
    assert redact(text, PATTERNS) == (text if expected is None else expected)


@pytest.mark.parametrize(
    "piece",
    [
        *("-eyJ", "a", "1 ", "a.", "sk-", "bearer ", "9", "1-", "AB12", "AB12 ", "12345678 1a "),
        *("-----BEGIN ", "-----BEGIN A PRIVATE KEY-----", "-----BEGIN PRIVATE KEY-----a-b"),
    ],
)
def test_no_text_is_slow_to_redact(piece: str) -> None:
    """Quadratic time would run into the timeout of the test."""
    redact((piece * 100_000)[:300_000] + "a", PATTERNS)


def test_own_patterns(tmp_path: Path) -> None:
    path = tmp_path / "patterns.yaml"
    path.write_text("ticket: 'TCK-\\d+'\nnumber: '\\bx\\d+'\n")
    own = read_patterns(path)
    assert list(own)[:2] == ["ticket", "number"]
    assert redact("TCK-12 x99 12345678 a@b.de", own) == "<ticket> <number> 12345678 <email>"
    for text, message in (
        ("bad: '('\n", r":1 bad: not a regular"),
        ("ok: 'a'\nempty: 'a*'\n", r":2 empty: .*empty text"),
        ("'A B': 'a'\n", r":1 .*not a name"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_patterns(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": Path("x.json")}, "jsonl"),
        ({"path": Path("/does/not/exist/x.jsonl")}, "no folder"),
        ({"rate": 0.0}, "not above 0"),
        ({"rate": float("nan")}, "not above 0"),
        ({"rate": 1.5}, "not above 0"),
    ],
)
def test_refusals(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CaptureConfig(**{"path": tmp_path / "x.jsonl", **options})


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before the model is loaded. Root may write anywhere, so the answer is faked."""
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    with pytest.raises(UsageError, match="is not a file"):
        CaptureConfig(folder)
    path = tmp_path / "t.jsonl"
    path.touch()
    for closed in (path, tmp_path):
        faked = {name: getattr(os, name) for name in dir(os)}
        faked["access"] = lambda place, mode, closed=closed: place != closed
        monkeypatch.setattr(module, "os", SimpleNamespace(**faked))
        with pytest.raises(UsageError, match=f"{closed} cannot be written to"):
            CaptureConfig(path)


def test_rows_are_what_calibrate_reads(tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    capture = Capture(CaptureConfig(path))
    said = [{"role": "user", "content": "I am a@b.de"}, {"role": "assistant", "content": "Hi"}]
    capture.offer({"messages": said})
    capture.offer({"prompt": "2 + 2", "completion": " = 4"})
    capture.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    chat, raw = (to_document(row, f"{path}:{i}") for i, row in enumerate(rows, 1))
    assert chat.messages[0]["content"] == "I am <email>"
    assert chat.messages[1]["role"] == "assistant"
    assert raw.text == "2 + 2 = 4"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert capture.written == 2


def test_files_are_put_aside_by_size(tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    capture = Capture(CaptureConfig(path, max_bytes=130, keep=2))
    for i in range(12):
        capture.offer({"prompt": f"row {i} " + "x" * 20, "completion": ""})
    capture.close()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["traffic.1.jsonl", "traffic.2.jsonl", "traffic.jsonl"]
    assert all(p.stat().st_size <= 130 for p in tmp_path.iterdir())
    assert "row 11" in path.read_text()
    assert "row 9" in (tmp_path / "traffic.1.jsonl").read_text()


def test_the_sample_is_a_share(tmp_path: Path) -> None:
    draws = iter([0.0, 0.09, 0.1, 0.5])
    capture = Capture(CaptureConfig(tmp_path / "t.jsonl", rate=0.1), chance=lambda: next(draws))
    assert [capture.wants() for _ in range(4)] == [True, True, False, False]
    capture.close()


def test_a_full_disk_loses_rows_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "t.jsonl"
    full = threading.Event()
    write = os.write

    def writes(handle: int, data: bytes) -> int:
        if full.is_set():
            write(handle, bytes(data[:5]))  # some of it fits, as on a real disk
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data)

    faked = {name: getattr(os, name) for name in dir(os)} | {"write": writes}
    monkeypatch.setattr(module, "os", SimpleNamespace(**faked))
    capture = Capture(CaptureConfig(path))

    with caplog.at_level(logging.WARNING, logger="quantkit.serve.capture"):
        capture.offer({"prompt": "before", "completion": ""})
        _settle(capture, 1)
        full.set()
        for _ in range(5):
            capture.offer({"prompt": "lost", "completion": ""})
        _settle(capture, 6)
        full.clear()
        capture.offer({"prompt": "after", "completion": ""})
        capture.close()
    assert (capture.written, capture.failed) == (2, 5)
    found = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    assert found == ["before", "after"], "no half line is left"
    assert len(caplog.records) == 2, "one warning when it begins, one when it ends"


def _settle(capture: Capture, rows: int) -> None:
    """Until so many rows were tried."""
    wait_until(lambda: capture.written + capture.failed + capture.dropped == rows)


def test_a_disk_that_hangs_drops_rows_and_blocks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    capture = Capture(CaptureConfig(tmp_path / "t.jsonl"))
    append = capture._append
    monkeypatch.setattr(capture, "_append", lambda line: (go_on.wait(30), append(line)))
    for _ in range(module.QUEUE_ROWS + 50):
        capture.offer({"prompt": "x", "completion": ""})
    assert capture.dropped >= 49
    go_on.set()
    capture.close()
    assert capture.written + capture.dropped == module.QUEUE_ROWS + 50


@pytest.mark.parametrize("rows", [3, module.QUEUE_ROWS + 1])
def test_a_disk_that_hangs_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rows: int
) -> None:
    """Whether the queue is full or not."""
    hangs, go_on = threading.Event(), threading.Event()
    capture = Capture(CaptureConfig(tmp_path / "t.jsonl"))
    monkeypatch.setattr(capture, "_append", lambda data: (hangs.set(), go_on.wait(60)))
    capture.offer({"prompt": "x", "completion": ""})
    assert hangs.wait(30)
    for _ in range(rows - 1):
        capture.offer({"prompt": "x", "completion": ""})
    with caplog.at_level(logging.WARNING, logger="quantkit.serve.capture"):
        capture.close(timeout=0.05)
    assert f"{rows} rows are lost" in caplog.text
    go_on.set()
    capture._thread.join(1.0)  # it ends if the end found a place in the queue; a daemon, if not


@pytest.mark.parametrize("letter", ["x", "ü"])
def test_rows_too_long_are_dropped(tmp_path: Path, letter: str) -> None:
    capture = Capture(CaptureConfig(tmp_path / "t.jsonl"))
    size = len(letter.encode())
    for length in (module.MAX_ROW_BYTES // size, module.MAX_ROW_BYTES // size - 100):
        capture.offer({"prompt": letter * length, "completion": ""})
    capture.close(timeout=60)
    assert (capture.written, capture.dropped) == (1, 1)
