"""Files of rows: a path → a stream of (``file:line``, parsed row). One function a format.

Each reader holds one row at a time, except that of a JSON array. Raw text is given as rows that
have the key ``text``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from quantkit.errors import UsageError

ARRAY_BYTES = 1 << 30  # a JSON array has no line to resume from, so it is parsed in one piece
PARAGRAPH_CHARS = 8192  # raw text: a document ends at the first blank line after this many
DOCUMENT_CHARS = 1 << 18  # and here at the latest, for text that has no blank lines
TABLE_ROWS = 256  # rows of a parquet batch in memory

Rows = Iterator[tuple[str, object]]  # (file:line, parsed row)
T = TypeVar("T")


def _read_json(path: Path) -> Rows:
    """One object a line, or one array of objects."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        start = ""
        while not start and (block := _decoded(path, lambda: file.read(4096))):
            start = block.lstrip()
    return _read_array(path) if start.startswith("[") else _read_lines(path)


def _read_lines(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        number = 0
        while line := _decoded(path, file.readline):
            number += 1
            if line.strip():
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise _malformed(where, error) from None
                yield where, row


def _read_array(path: Path) -> Rows:
    size = path.stat().st_size
    if size > ARRAY_BYTES:
        raise UsageError(
            f"{path}: a JSON array of {size} bytes is over the limit of {ARRAY_BYTES}",
            remedy="write one object a line (.jsonl), which is streamed",
        )
    text = _decoded(path, lambda: path.read_text(encoding="utf-8-sig"))
    decoder = json.JSONDecoder()
    at, line, closed = _skip_space(text, text.index("[") + 1), 1, False
    counted = 0
    if text[at : at + 1] == "]":
        at, closed = at + 1, True
    while not closed:
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _malformed(f"{path}:{error.lineno}", error) from None
        except (ValueError, RecursionError) as error:
            raise _malformed(f"{path}:{line}", error) from None
        yield f"{path}:{line}", row
        at = _skip_space(text, at)
        mark = text[at : at + 1]
        if mark not in (",", "]") or not mark:
            here = f"{path}:{text.count(chr(10), 0, at) + 1}"
            raise _malformed(here, "expected ',' or ']' after an array item")
        closed = mark == "]"
        at = at + 1 if closed else _skip_space(text, at + 1)
    if text[at:].strip():
        here = f"{path}:{text.count(chr(10), 0, _skip_space(text, at)) + 1}"
        raise _malformed(here, "text after the end of the array")


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\n", "\r"):
        at += 1
    return at


def _read_text(path: Path) -> Rows:
    """Documents whose concatenation is the file; only blanks at the very ends are in doubt.

    A document ends at a blank line, so paragraphs stay whole. One document a file would make the
    shuffle pointless, and one a paragraph would be mostly end-of-text tokens.
    """
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        lines: list[str] = []
        size, number, first = 0, 1, 1
        finished: tuple[str, str] | None = None
        # readline(limit) bounds memory for a file that is one line.
        while line := _decoded(path, lambda: file.readline(DOCUMENT_CHARS)):
            lines.append(line)
            size += len(line)
            number += line.endswith("\n")
            at_break = size >= PARAGRAPH_CHARS and not line.strip()
            if (at_break or size >= DOCUMENT_CHARS) and any(map(str.strip, lines)):
                if finished:
                    yield _text_row(finished)
                finished = (f"{path}:{first}", "".join(lines))
                lines, size, first = [], 0, number
        rest = "".join(lines)
        if finished and not rest.strip():
            finished, rest = (finished[0], finished[1] + rest), ""
        if finished:
            yield _text_row(finished)
        if rest:
            yield _text_row((f"{path}:{first}", rest))


def _text_row(located: tuple[str, str]) -> tuple[str, object]:
    where, text = located
    return where, {"text": text}


def _read_csv(path: Path) -> Rows:
    """Rows under a header. The standard reader, because table readers turn ``NA`` into null."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        while True:
            first = 1
            try:
                _decoded(path, lambda: reader.fieldnames)  # reads the header, the first time
                first = reader.line_num + 1
                row: dict[Any, Any] = _decoded(path, lambda: next(reader))
            except StopIteration:
                return
            except csv.Error as error:
                raise UsageError(
                    f"{path}:{first} malformed CSV: {error}",
                    remedy="correct the row, or convert the file to JSONL",
                ) from None
            if None in row:
                raise UsageError(
                    f"{path}:{first} has more cells than the header",
                    remedy="quote cells that hold commas",
                )
            yield f"{path}:{first}", row


def _read_parquet(path: Path) -> Rows:
    import pyarrow  # heavy, and needed for this format only
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=TABLE_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except pyarrow.ArrowException as error:
        raise UsageError(
            f"{path}: not a readable parquet file: {error}", remedy="write it again"
        ) from error


def _decoded(path: Path, read: Callable[[], T]) -> T:
    """`read()`, with an undecodable byte reported by line."""
    try:
        return read()
    except UnicodeDecodeError:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise UsageError(
                        f"{path}:{number} byte 0x{line[error.start]:02x} is not UTF-8",
                        remedy="convert the file, for example with iconv -t UTF-8",
                    ) from None
        raise


def _malformed(where: str, reason: object) -> UsageError:
    return UsageError(
        f"{where} malformed JSON: {reason}",
        remedy="write one object a line, or one array of objects",
    )


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".txt": _read_text,
    ".md": _read_text,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
