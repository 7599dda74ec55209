"""Do calibration texts hold eval items? Exact and near-duplicate matches on normalised words.

A model that is calibrated on its exam is judged too kindly. Texts are compared as sequences of
words, case-folded, without punctuation or spacing; characters of scripts that do not separate
words count as words. An eval item overlaps a calibration text when

- the words of both are equal (``exact``), or those of one line of the text are and there are at
  least four (``line``): a question that was one turn of a logged conversation; or
- at least `share` of the item's n-grams occur in the text (``ngram``). Items of fewer than n words
  are compared by 8-grams; below that only the exact forms apply.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from quantkit.errors import UsageError

LINE_WORDS = 4  # shorter lines ("yes", "thank you") are alike by chance
SHORT_N = 8

_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Overlap:
    """One eval item that a calibration text holds.

    Attributes:
        eval_index: position of the item.
        calibration_index: position of the text that holds most of it; the first of equals.
        kind: strongest form of match found.
        share: part of the item's n-grams in that text; 1.0 for ``exact`` and ``line``.
    """

    eval_index: int
    calibration_index: int
    kind: Literal["exact", "line", "ngram"]
    share: float


def words(text: str) -> list[str]:
    """Words of `text` as they are compared: NFKC, case-folded, punctuation dropped."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def overlap(
    calibration_texts: Iterable[str],
    eval_texts: Iterable[str],
    n: int = 13,
    *,
    share: float = 0.5,
) -> list[Overlap]:
    """Eval items that overlap some calibration text, in eval order.

    Calibration texts are streamed: memory grows with the eval items only.

    Args:
        calibration_texts: documents, as `quantkit.data.iter_texts` gives them.
        eval_texts: one text an item; items without words never match.
        n: words in an n-gram.
        share: part of an item's n-grams that makes a near-duplicate, in (0, 1].

    Raises:
        UsageError: `n` is below 1 or `share` is outside (0, 1].
    """
    if n < 1:
        raise UsageError(f"contamination n {n} is below 1")
    if not 0 < share <= 1:
        raise UsageError(f"contamination share {share} is outside (0, 1]")
    items = [words(text) for text in eval_texts]
    exact: dict[tuple[str, ...], list[int]] = {}
    for i, item in enumerate(items):
        if item:
            exact.setdefault(tuple(item), []).append(i)
    vocabulary: dict[str, int] = {}
    indices = [
        _NgramIndex(items, size, vocabulary, shorter_than) for size, shorter_than in _sizes(n)
    ]
    best: dict[int, Overlap] = {}
    for j, text in enumerate(calibration_texts):
        found: list[Overlap] = []
        turns = [words(line) for line in text.splitlines()]
        document = [word for turn in turns for word in turn]
        found += [Overlap(i, j, "exact", 1.0) for i in exact.get(tuple(document), ())]
        for turn in turns:
            if len(turn) >= LINE_WORDS:
                found += [Overlap(i, j, "line", 1.0) for i in exact.get(tuple(turn), ())]
        ids = np.array([vocabulary.get(word, 0) for word in document], dtype=np.uint64)
        for index in indices:
            found += [
                Overlap(i, j, "ngram", part) for i, part in index.shares(ids) if part >= share
            ]
        for hit in found:
            if hit.eval_index not in best or _rank(hit) > _rank(best[hit.eval_index]):
                best[hit.eval_index] = hit
    return [best[i] for i in sorted(best)]


def _rank(hit: Overlap) -> tuple[int, float]:
    return ("ngram", "line", "exact").index(hit.kind), hit.share


def _sizes(n: int) -> list[tuple[int, int | None]]:
    """(n-gram size, items of this many words or more belong to a longer size)."""
    return [(n, None)] if n <= SHORT_N else [(n, None), (SHORT_N, n)]


class _NgramIndex:
    """Hashes of all n-grams of the eval items of one length class.

    An n-gram hash is ``sum(id[k] * odd[k]) mod 2**64`` with fixed random multipliers, computed for
    all positions of a text at once; a collision among a million n-grams has probability 1e-7.
    """

    def __init__(
        self,
        items: Sequence[Sequence[str]],
        n: int,
        vocabulary: dict[str, int],
        shorter_than: int | None,
    ) -> None:
        rng = np.random.default_rng(n)
        self._odd: _Hashes = rng.integers(0, 1 << 63, n, dtype=np.uint64) * np.uint64(
            2
        ) + np.uint64(1)
        grams, owners = [], []
        self._counts: dict[int, int] = {}
        for i, item in enumerate(items):
            if len(item) < n or (shorter_than is not None and len(item) >= shorter_than):
                continue
            # Id 0 is kept for words that no eval item holds.
            ids = [vocabulary.setdefault(word, len(vocabulary) + 1) for word in item]
            unique = np.unique(self._hash(np.array(ids, dtype=np.uint64)))
            self._counts[i] = len(unique)
            grams.append(unique)
            owners.append(np.full(len(unique), i, dtype=np.int64))
        flat = np.concatenate([np.empty(0, np.uint64), *grams])
        order = np.argsort(flat, kind="stable")
        self._owners = np.concatenate([np.empty(0, np.int64), *owners])[order]
        self._unique, self._starts = np.unique(flat[order], return_index=True)
        self._ends = np.append(self._starts[1:], len(flat))

    def shares(self, ids: _Hashes) -> list[tuple[int, float]]:
        """(item, part of its n-grams in the text of word `ids` uint64 ``[words]``), hits only."""
        if len(ids) < len(self._odd) or not len(self._unique):
            return []
        grams = np.unique(self._hash(ids))
        at = np.searchsorted(self._unique, grams)
        at[at == len(self._unique)] = 0
        hits = at[self._unique[at] == grams]
        if not len(hits):
            return []
        owners = np.concatenate([self._owners[self._starts[h] : self._ends[h]] for h in hits])
        found, counts = np.unique(owners, return_counts=True)
        return [
            (int(i), int(count) / self._counts[int(i)])
            for i, count in zip(found, counts, strict=True)
        ]

    def _hash(self, ids: _Hashes) -> _Hashes:
        """uint64 ``[words]`` → uint64 ``[words - n + 1]``; overflow wraps, as it should."""
        length = len(ids) - len(self._odd) + 1
        total = np.zeros(length, dtype=np.uint64)
        for k, odd in enumerate(self._odd):
            total += ids[k : k + length] * odd
        return total
