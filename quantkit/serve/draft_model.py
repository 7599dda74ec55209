"""A small model that guesses what a larger one will say (Leviathan et al. 2023, section 2.1).

It keeps keys and values of its own, in pages of its own. What it has read of an answer that went
another way is cut off again, so each token is read once. Its guesses are its likeliest tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantkit.errors import UsageError
from quantkit.models.paged import PagedRunner, PagedSequence, Work, pages_for
from quantkit.ops.argmax import argmax
from quantkit.serve.goodput import PassCost

if TYPE_CHECKING:
    from quantkit.models.decoder import Decoder
    from quantkit.models.runtime import Runtime
    from quantkit.serve.request import Sequence


def make_draft_model(
    runtime: Runtime,
    draft: Runtime | None,
    *,
    max_context: int,
    kv_tokens: int,
    read_tokens: int = 256,
) -> DraftModel | None:
    """The draft model of an engine, or None if it only looks guesses up.

    Args:
        runtime: the model that is served.
        draft: the one that guesses.
        max_context: longest text.
        kv_tokens, read_tokens: as in `DraftModel`.

    Raises:
        UsageError: one of them does not run in the native decoder, their tokens differ, or the
            draft cannot read texts as long as the model.
    """
    for what, one in (("this model", runtime), ("the draft model", draft)):
        if one is not None and one.decoder is None:
            raise UsageError(
                f"speculation needs the native decoder, which does not run {what}: "
                f"{one.fallback or 'it was not asked for'}",
                remedy="serve without speculation",
            )
    if draft is None:
        return None
    assert draft.decoder is not None
    assert runtime.decoder is not None
    hashes = [one.fingerprint.get("tokenizer") for one in (draft, runtime)]
    if hashes[0] != hashes[1]:
        raise UsageError(
            f"the draft {draft.name} has another tokenizer than {runtime.name} (sha256 "
            f"{str(hashes[0])[:12]}…, not {str(hashes[1])[:12]}…), so its guesses are other tokens",
            remedy="take a draft of the same family",
        )
    sizes = [decoder.shape.vocab for decoder in (draft.decoder, runtime.decoder)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"the draft {draft.name} has {sizes[0]} logits where {runtime.name} has {sizes[1]}",
            remedy="take a draft of the same family",
        )
    # What it was trained for: its decoder's tables may go on beyond that.
    longest = int(draft.model.config.get_text_config().max_position_embeddings)
    if longest < max_context:
        raise UsageError(
            f"the draft {draft.name} reads {longest} tokens, the context holds {max_context}",
            remedy=f"give --max-context {longest}",
        )
    share = draft.decoder.native.weight_nbytes / runtime.decoder.native.weight_nbytes
    return DraftModel(draft.decoder, kv_tokens, share=share, read_tokens=read_tokens)


@dataclass
class _Reading:
    """What it has read of one text: the tokens in its pages, ``sound`` of them no guesses."""

    cache: PagedSequence = field(default_factory=PagedSequence)
    tokens: list[int] = field(default_factory=list)
    sound: int = 0


class DraftModel:
    """Guesses for several answers side by side. Only the engine thread calls it.

    Args:
        decoder: of the draft checkpoint.
        kv_tokens: tokens that there is room for; who was guessed for least lately makes room.
        share: bytes of its weights over those of the model: what a pass of few rows is expected to
            cost beside one of the model's.
        read_tokens: of texts it has yet to read, what it reads in one pass at most.
        clock: seconds.

    Attributes:
        cost: seconds of its passes.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv_tokens: int,
        *,
        share: float = 1.0,
        read_tokens: int = 256,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.cost = PassCost()
        self.share = share
        self.read_tokens = read_tokens
        self._paged = PagedRunner(decoder, pages_for(kv_tokens))
        self.clock = clock
        self._readings: dict[Sequence, _Reading] = {}  # the least recently used first

    @property
    def used_pages(self) -> int:
        """Pages of texts that it remembers."""
        return self._paged.pool.used

    def behind(self, sequence: Sequence) -> int:
        """Tokens of a text that it has not read, at least the last."""
        reading = self._readings.get(sequence)
        return len(sequence.tokens) - (0 if reading is None else _agreed(reading, sequence))

    def read(self, sequence: Sequence) -> int:
        """Read on in a text, without its last token, as far as one pass may.

        Returns:
            Tokens read; 0 if there is no room.
        """
        reading = self._catch_up(sequence)
        start = len(reading.tokens)
        chunk = sequence.tokens[start : min(start + self.read_tokens, len(sequence.tokens) - 1)]
        if not chunk or not self._make_room([(reading, len(chunk))], [sequence]):
            return 0
        self._pass([(reading, chunk)])
        return len(chunk)

    def guess(self, sequences: Items[Sequence], counts: Items[int]) -> list[list[int]]:
        """The likeliest next tokens, ``counts`` of them; none for all if there is no room."""
        readings = [self._catch_up(sequence) for sequence in sequences]
        news = [
            (reading, sequence.tokens[len(reading.tokens) :])
            for reading, sequence in zip(readings, sequences, strict=True)
        ]
        guesses: list[list[int]] = [[] for _ in sequences]
        needs = [
            (reading, len(new) + count - 1)
            for (reading, new), count in zip(news, counts, strict=True)
        ]
        if not self._make_room(needs, sequences):
            return guesses
        asked = [i for i, count in enumerate(counts) if count]
        while asked:
            tokens = self._pass([news[i] for i in asked])
            for i, token in zip(asked, tokens, strict=True):
                guesses[i].append(token)
                news[i] = (readings[i], [token])
            asked = [i for i in asked if len(guesses[i]) < counts[i]]
        return guesses

    def forget(self, sequence: Sequence) -> None:
        """Give back what it holds of a text; one that it never read is ignored."""
        reading = self._readings.pop(sequence, None)
        if reading is not None:
            self._paged.release(reading.cache)

    def _catch_up(self, sequence: Sequence) -> _Reading:
        """Its reading of a text, without what the text has become other than it guessed."""
        reading = self._readings.pop(sequence, None) or _Reading()
        self._readings[sequence] = reading  # the most recently used
        agreed = _agreed(reading, sequence)
        if agreed < len(reading.tokens):
            self._paged.truncate(reading.cache, agreed)
            del reading.tokens[agreed:]
        reading.sound = agreed
        return reading

    def _make_room(self, needs: Items[tuple[_Reading, int]], busy: Items[Sequence]) -> bool:
        pool = self._paged.pool
        missing = sum(
            max(0, pages_for(reading.cache.length + new) - len(reading.cache.pages))
            for reading, new in needs
        )
        for other in [other for other in self._readings if other not in busy]:
            if missing <= pool.free:
                break
            self.forget(other)
        return missing <= pool.free

    def _pass(self, news: Items[tuple[_Reading, list[int]]]) -> list[int]:
        """Read tokens; returns the likeliest one behind each."""
        started = self.clock()
        logits = self._paged.logits([Work(reading.cache, new) for reading, new in news])
        tokens, _ = argmax(logits.block)  # a row each
        for reading, new in news:
            reading.tokens += new
        self.cost.observe(sum(len(new) for _, new in news), self.clock() - started)
        return tokens


def _agreed(reading: _Reading, sequence: Sequence) -> int:
    """Tokens at the beginning that were read as they are now; never the last one, whose logits
    are asked for."""
    read, known = reading.tokens, sequence.tokens
    agreed, most = reading.sound, min(len(read), len(known) - 1)
    while agreed < most and read[agreed] == known[agreed]:
        agreed += 1
    return min(agreed, most)
