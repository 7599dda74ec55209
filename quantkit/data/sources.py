"""Where calibration text comes from: a `Source`, and the stream of its documents.

==========================  ====================================================================
path                        read as
==========================  ====================================================================
``*.jsonl``, ``*.json``     one object a line, or one array of objects (the first character tells)
``*.txt``, ``*.md``         raw text, cut into documents at blank lines; nothing is lost
``*.csv``                   a header and rows; every cell is text
``*.parquet``               a table
a folder                    a dataset written by `save_to_disk`, or each of the files in it
``hf:owner/name[:split[:field]]``  a dataset of the Hugging Face hub, streamed
==========================  ====================================================================

Files are streamed, more than once if need be: memory holds one row at a time. Only a JSON array
and a hub dataset are held whole, and each has a limit that says so.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from quantkit.data.readers import READERS, Rows
from quantkit.data.rows import Document, to_document
from quantkit.errors import QuantkitError, UsageError

HUB_ROWS = 10_000  # a hub dataset may hold terabytes; this many rows calibrate any recipe

HUB = "hf:"
DATASET_MARKERS = ("dataset_info.json", "dataset_dict.json")


@dataclass(frozen=True)
class Source:
    """One place that calibration text comes from.

    Attributes:
        path: a file, a folder, or ``hf:owner/name[:split[:field]]``.
        weight: share of the calibration tokens, relative to the other sources; > 0.
        split: split of a dataset; by default its only one, else ``train``.
        field: key that holds the text or the messages; detected by default.
        config: configuration name of a hub dataset.
        revision: commit, tag or branch of a hub dataset.
        limit: read only this many rows; all by default, 10,000 from the hub.

    Raises:
        UsageError: a weight or limit that is not positive, or an option the path cannot have.
    """

    path: str
    weight: float = 1.0
    split: str | None = None
    field: str | None = None
    config: str | None = None
    revision: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.fspath(self.path))
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise UsageError(
                f"{self.path}: weight {self.weight} is not a positive number",
                remedy="remove the source to leave it out",
            )
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"{self.path}: limit {self.limit} is below 1")
        if not self.path.startswith(HUB):
            for name in ("config", "revision"):
                if getattr(self, name) is not None:
                    raise UsageError(
                        f"{self.path}: `{name}` applies to hub datasets only",
                        remedy=f"remove it, or write the path as {HUB}owner/name",
                    )

    @property
    def name(self) -> str:
        """The file's or folder's own name, or a hub dataset's id: nothing of this machine."""
        if self.path.startswith(HUB):
            return self.path.removeprefix(HUB).split(":")[0]
        # A name that is not UTF-8 on disk holds surrogates, which no text file can.
        return os.path.basename(os.path.abspath(self.path)).encode(errors="replace").decode()


class Corpus:
    """The documents of one source, as a stream that can be read again.

    Attributes:
        source: what was opened.
        sha256: of the file's bytes; of the sorted digests of a folder's files; of the rows of a
            dataset. Names of files do not enter.
        sizes: UTF-8 bytes of each document, in stream order.
        skipped: rows that hold no words.
    """

    def __init__(self, source: Source) -> None:
        """Read the source once: every row is checked, so errors do not depend on the seed.

        Raises:
            UsageError: the source is missing or empty, or a row is malformed (with file:line).
        """
        self.source = source
        self.sha256, self._rows = _open(source)
        self.sizes = array("Q")
        self.skipped = 0
        for document in self._stream():
            if document is None:
                self.skipped += 1
            else:
                self.sizes.append(_utf8_size(document))
        if not self.sizes:
            if self.skipped:
                found = f"{self.skipped} rows, all of them empty"
            else:
                found = "no rows at all"
            raise UsageError(
                f"{source.path}: holds no text: {found}", remedy="give a file that has some"
            )

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.sizes)

    def __iter__(self) -> Iterator[Document]:
        """Documents in stream order."""
        return (document for document in self._stream() if document is not None)

    def pick(self, indices: Iterable[int]) -> list[Document]:
        """Documents at `indices`, in that order, found in one pass over the stream.

        Raises:
            QuantkitError: the source changed since it was opened.
        """
        order = list(indices)
        wanted = set(order)
        last = max(wanted, default=-1)
        found = {i: doc for i, doc in enumerate(islice(self, last + 1)) if i in wanted}
        for i in order:
            if i not in found or _utf8_size(found[i]) != self.sizes[i]:
                raise QuantkitError(
                    f"{self.source.path}: changed while it was being read",
                    remedy="calibrate on a copy of a file that is still being written",
                )
        return [found[i] for i in order]

    def _stream(self) -> Iterator[Document | None]:
        _, field = _split_and_field(self.source)
        for where, row in islice(self._rows(), self.source.limit):
            yield to_document(row, where, field=field)


def iter_documents(source: Source) -> Iterator[Document]:
    """Documents of `source` in stream order; rows without words are left out."""
    return iter(Corpus(source))


def iter_texts(source: Source) -> Iterator[str]:
    """Plain text of each document, without templates: what a contamination check compares."""
    return (document.plain() for document in iter_documents(source))


def document_hashes(source: Source) -> list[str]:
    """sha256 of the plain text of each document, in stream order."""
    return [hashlib.sha256(text.encode()).hexdigest() for text in iter_texts(source)]


def _utf8_size(document: Document) -> int:
    try:
        return len(document.plain().encode())
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{document.where} holds the unpaired surrogate {error.object[error.start]!a}",
            remedy="the row was cut inside a character; correct or remove it",
        ) from None


# ---------------------------------------------------------------------------------------------
# Opening


def _open(source: Source) -> tuple[str, Callable[[], Rows]]:
    """(sha256, a function that starts the stream of rows)."""
    split, _ = _split_and_field(source)
    if source.path.startswith(HUB):
        return _open_hub(source, split)
    path = Path(source.path)
    if not path.exists():
        raise UsageError(
            f"{source.path}: no such file or folder",
            remedy=f"check the path; a hub dataset is written {HUB}owner/name",
        )
    if path.is_dir() and any((path / marker).exists() for marker in DATASET_MARKERS):
        return _open_saved(path, split)
    if split is not None:
        raise UsageError(
            f"{source.path}: `split` applies to datasets only", remedy="remove `split`"
        )
    files = _files(path)
    # Sorted by content, so that neither the hash nor the shuffle depends on a file's name.
    digests = sorted((_sha256(file), str(file)) for file in files)
    sha256 = digests[0][0]
    if path.is_dir():
        sha256 = hashlib.sha256("".join(digest for digest, _ in digests).encode()).hexdigest()
    ordered = [Path(name) for _, name in digests]
    return sha256, lambda: (row for file in ordered for row in READERS[file.suffix.lower()](file))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not files:
            raise UsageError(f"{path}: the folder holds no files")
    else:
        files = [path]
    for file in files:
        if file.suffix.lower() not in READERS:
            raise UsageError(
                f"{file}: unknown kind of file '{file.suffix or file.name}'",
                remedy=f"use one of {', '.join(READERS)}",
            )
        if file.stat().st_size == 0:
            raise UsageError(f"{file}: the file is empty", remedy="give a file that has text")
    return files


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split_and_field(source: Source) -> tuple[str | None, str | None]:
    """`split` and `field` from the options or from the tail of an ``hf:`` path."""
    options = {"split": source.split, "field": source.field}
    if source.path.startswith(HUB):
        name, *tail = source.path.removeprefix(HUB).split(":")
        if not name or len(tail) > 2 or not all(tail):
            raise UsageError(
                f"{source.path}: not a dataset path", remedy=f"write {HUB}owner/name:split:field"
            )
        for key, value in zip(options, tail, strict=False):
            if options[key] not in (None, value):
                raise UsageError(
                    f"{source.path}: the path says {key} '{value}', the option '{options[key]}'",
                    remedy="give one of the two",
                )
            options[key] = value
    return options["split"], options["field"]


def _choose_split(splits: Iterable[str], split: str | None, where: str) -> str:
    names = list(splits)
    chosen = split or (names[0] if len(names) == 1 else "train")
    if chosen not in names:
        raise UsageError(
            f"{where}: has no split '{chosen}'", remedy=f"set `split` to one of {', '.join(names)}"
        )
    return chosen


def _open_saved(path: Path, split: str | None) -> tuple[str, Callable[[], Rows]]:
    import datasets  # two seconds of import that plain files do not pay

    try:
        dataset: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # a damaged folder raises from arrow, json, fsspec, …
        raise UsageError(
            f"{path}: not a readable dataset: {error}", remedy="write it again with save_to_disk"
        ) from error
    if isinstance(dataset, dict):
        dataset = dataset[_choose_split(dataset, split, str(path))]
    elif split not in (None, str(dataset.split or "")):
        raise UsageError(f"{path}: has no split '{split}'", remedy="remove `split`")

    def rows() -> Rows:
        return ((f"{path}:{i}", row) for i, row in enumerate(dataset, 1))

    return _sha256_rows(rows()), rows


def _open_hub(source: Source, split: str | None) -> tuple[str, Callable[[], Rows]]:
    import datasets

    name = source.path.removeprefix(HUB).split(":")[0]
    try:
        dataset: Any = datasets.load_dataset(
            name, name=source.config, revision=source.revision, streaming=True
        )
        dataset = dataset[_choose_split(dataset, split, source.path)]
        # Held in memory: every pass over a stream would be another download.
        held = list(islice(dataset, source.limit or HUB_ROWS))
    except UsageError:
        raise
    except Exception as error:  # network, authentication, name, configuration: hub decides
        raise UsageError(
            f"{source.path}: cannot be loaded: {error}",
            remedy="check the name, `config` and the network, or give a folder from save_to_disk",
        ) from error

    def rows() -> Rows:
        return ((f"{source.path}:{i}", row) for i, row in enumerate(held, 1))

    return _sha256_rows(rows()), rows


def _sha256_rows(rows: Rows) -> str:
    digest = hashlib.sha256()
    for _, row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
