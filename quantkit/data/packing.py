"""Documents of several feeds → full windows of tokens, in the shares that were asked for.

Every document is closed by one end-of-text token, and the stream is cut every ``seq_len`` tokens:
a short document shares its window, a long one spans several, and none is dropped or padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Marks = npt.NDArray[np.bool_]

#: A token of a document on its way into a window, and whether it is of an answer.
TOKEN = np.dtype([("id", np.int64), ("answer", np.bool_)])
Tokens = npt.NDArray[np.void]


def tokens_of(ids: npt.ArrayLike, answers: npt.ArrayLike = False) -> Tokens:
    """A document as `pack` takes it: ids ``[tokens]`` and which of them are of an answer."""
    ids = np.asarray(ids, dtype=np.int64)
    tokens = np.empty(len(ids), dtype=TOKEN)
    tokens["id"], tokens["answer"] = ids, answers
    return tokens


@dataclass(frozen=True)
class Use:
    """What one feed gave.

    Attributes:
        wanted: tokens that its weight asked for.
        used: tokens in the windows.
        read: tokens drawn from the feed, separators included; all it has when `exhausted`.
        documents: documents with at least one token in the windows.
        exhausted: the feed ran out before its share was met.
    """

    wanted: int
    used: int
    read: int
    documents: int
    exhausted: bool


@dataclass(frozen=True)
class Packed:
    """Full windows, int64 ``[windows, seq_len]``, where documents begin in them and what is of an
    answer, bool of the same shape, and what each feed gave to them."""

    ids: Ids
    starts: Marks
    answers: Marks
    uses: tuple[Use, ...]


def pack(
    feeds: Sequence[Iterator[Tokens]],
    weights: Sequence[float],
    *,
    samples: int,
    seq_len: int,
    eos: int,
) -> Packed:
    """Fill `samples` windows of `seq_len` tokens from weighted feeds.

    Each feed gives its share of the tokens exactly. When one runs out it is not repeated: the
    others fill its part, in proportion to their weights. When all run out there are fewer windows,
    possibly none, and less than one window of tokens stays unused.

    Args:
        feeds: documents as `tokens_of` makes them; consumed only as far as they are needed.
        weights: positive, one a feed.
        samples: windows wanted.
        seq_len: tokens a window.
        eos: id that closes each document; one that already ends with it gets no second.
    """
    taps = [_Tap(feed, eos) for feed in feeds]
    wanted = split(samples * seq_len, weights)
    left = samples * seq_len
    open_taps = list(range(len(taps)))
    # A round either meets the budget or finds a feed dry, so there are at most len(feeds) rounds.
    while left and open_taps:
        quotas = split(left, [weights[i] for i in open_taps])
        for i, quota in zip(open_taps, quotas, strict=True):
            left -= taps[i].draw(quota)
        open_taps = [i for i in open_taps if not taps[i].dry]
    stream, owners = _interleave(taps, eos)
    windows = len(stream) // seq_len
    kept = windows * seq_len
    uses = []
    for i, (tap, want) in enumerate(zip(taps, wanted, strict=True)):
        spans = [(begin, end) for owner, begin, end in owners if owner == i and begin < kept]
        uses.append(
            Use(
                wanted=want,
                used=sum(min(end, kept) - begin for begin, end in spans),
                read=tap.read,
                documents=len(spans),
                exhausted=tap.dry,
            )
        )
    starts = np.zeros(kept, dtype=np.bool_)
    starts[[begin for _, begin, _ in owners if begin < kept]] = True
    shape = windows, seq_len
    tokens = stream[:kept].reshape(shape)
    return Packed(
        ids=np.ascontiguousarray(tokens["id"]),
        starts=starts.reshape(shape),
        answers=np.ascontiguousarray(tokens["answer"]),
        uses=tuple(uses),
    )


def split(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole parts proportional to `weights` (largest remainder); they sum to it."""
    scale = max(weights, default=1.0)  # keeps the sum finite for any finite weights
    parts = [weight / scale for weight in weights]
    exact = [total * part / sum(parts) for part in parts]
    shares = [int(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares


class _Tap:
    """A feed from which an exact number of tokens can be drawn, document after document."""

    def __init__(self, feed: Iterator[Tokens], eos: int) -> None:
        self._feed = feed
        self._eos = eos
        self.pieces: list[Tokens] = []  # closed documents, except perhaps the last
        self._taken = 0  # tokens of the last document that count as drawn
        self.total = 0
        self.read = 0
        self.dry = False

    def draw(self, want: int) -> int:
        """Draw `want` tokens, or all that is left; returns how many."""
        drawn = 0
        while drawn < want:
            if not self.pieces or self._taken == len(self.pieces[-1]):
                document = next(self._feed, None)
                if document is None:
                    self.dry = True
                    break
                if not len(document):
                    continue
                if document["id"][-1] != self._eos:
                    document = np.concatenate([document, tokens_of([self._eos])])
                self.pieces.append(document)
                self._taken = 0
                self.read += len(document)
            step = min(want - drawn, len(self.pieces[-1]) - self._taken)
            self._taken += step
            drawn += step
        self.total += drawn
        return drawn

    def cut(self) -> list[Tokens]:
        """The drawn documents; the last one ends where the quota did."""
        return [*self.pieces[:-1], self.pieces[-1][: self._taken]] if self.pieces else []


def _interleave(taps: Sequence[_Tap], eos: int) -> tuple[Tokens, list[tuple[int, int, int]]]:
    """One stream ``[tokens]`` in which each feed is spread evenly, and (feed, begin, end) spans."""
    queue = []
    for i, tap in enumerate(taps):
        before = 0
        for piece in tap.cut():
            queue.append(((before + len(piece) / 2) / tap.total, i, piece))
            before += len(piece)
    queue.sort(key=lambda entry: entry[:2])
    pieces, owners, at = [], [], 0
    for n, (_, i, piece) in enumerate(queue, 1):
        if piece["id"][-1] != eos and n < len(queue):
            # Cut by its quota and followed by another document: the border must still be visible.
            piece = np.concatenate([piece[:-1], tokens_of([eos])])
        pieces.append(piece)
        owners.append((i, at, at + len(piece)))
        at += len(piece)
    return np.concatenate([tokens_of([]), *pieces]), owners
