"""Documents handed to lm-eval in memory, in place of a dataset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Documents(list[dict[str, Any]]):
    """What lm-eval needs of a dataset: rows, and the names of their columns."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> None:
        super().__init__(dict(row) for row in rows)
        self.features = dict.fromkeys(columns)


def as_arrow_reads(rows: Sequence[Mapping[str, Any]]) -> Documents:
    """Rows of JSON lines: columns in order of appearance, and None where a row lacks one.

    The rows, and lm-eval's hashes of them, are then those of `lm_eval` itself.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return Documents(({c: row.get(c) for c in columns} for row in rows), columns)
