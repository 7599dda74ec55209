"""Sources → `TokenBatches`: the windows that calibration runs on, and where they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from quantkit.data.card import UNKNOWN, read_card
from quantkit.data.packing import Tokens, Use, pack, tokens_of
from quantkit.data.render import encode, encode_answers
from quantkit.data.rows import Document
from quantkit.data.sources import Corpus, Source
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTES_PER_TOKEN = 8  # more than text has, so that one pass over a source nearly always suffices
DOCUMENT_BYTES = 64  # what a document costs in memory beside its text


@dataclass(frozen=True)
class SourceReport:
    """What one source gave.

    Attributes:
        path: as it was written.
        name: see `quantkit.data.sources.Source`.
        sha256: of its content; see `quantkit.data.sources.Corpus`.
        license: as its card says, or ``unknown``.
        documents: documents it holds.
        documents_used: documents with at least one token in the windows.
        skipped: rows without words.
        tokens_read: tokens that were rendered, separators included; all it has when `exhausted`.
        tokens_used: tokens in the windows.
        share: `tokens_used` over the tokens of all sources.
        wanted_share: what its weight asked for.
        shortfall: tokens that its weight asked for and it did not have.
        exhausted: it ran out; the other sources filled its part.
    """

    path: str
    name: str
    sha256: str
    documents: int
    documents_used: int
    skipped: int
    tokens_read: int
    tokens_used: int
    share: float
    wanted_share: float
    shortfall: int
    exhausted: bool
    license: str = UNKNOWN


@dataclass(frozen=True)
class TokenBatches:
    """Windows of tokens.

    Attributes:
        ids: int64 ``[samples, seq_len]``, every position a real token.
        hash: sha256 of the shape and the ids; names of files do not enter.
        report: one entry a source, in the order given.
        starts: bool ``[samples, seq_len]``, true where a document begins; None of what is no text.
        answers: bool ``[samples, seq_len]``, true where a token is of an answer; None unless asked.
        shortfall: windows that were asked for and the sources could not fill.
        warnings: what a person should know before relying on the windows.
    """

    ids: torch.Tensor = field(compare=False)  # the hash compares, and in one word
    hash: str
    report: tuple[SourceReport, ...]
    shortfall: int = 0
    warnings: tuple[str, ...] = ()
    starts: torch.Tensor | None = field(default=None, compare=False)
    answers: torch.Tensor | None = field(default=None, compare=False)


def load_tokens(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seq_len: int,
    seed: int = 0,
    chat_template: bool = True,
    answers: bool = False,
) -> TokenBatches:
    """Read, shuffle, render, mix and pack.

    The result depends on the content and weight of the sources, the tokenizer and the arguments;
    not on the order or the names of the sources, nor on any global random state.

    Args:
        sources: at least one.
        tokenizer: a transformers tokenizer with an end-of-text or separator token.
        samples: windows wanted.
        seq_len: tokens a window.
        seed: of the shuffle within each source.
        chat_template: False renders conversations as plain ``role: content`` lines.
        answers: also find out which tokens are of an answer.

    Returns:
        `samples` windows; fewer, with a `shortfall` and a warning, when the sources hold too few
        tokens.

    Raises:
        UsageError: a malformed source, or too few tokens for a single window.
    """
    if not sources:
        raise UsageError("no calibration data", remedy="give `calibrate.data` or --data FILE")
    for name, value in (("samples", samples), ("seq_len", seq_len)):
        if value < 1:
            raise UsageError(f"calibrate.{name} {value} is below 1")
    # An encoder's texts end with a separator.
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if end is None:
        raise UsageError(
            "the tokenizer has no end-of-text token, so documents cannot be told apart",
            remedy="set eos_token in its tokenizer_config.json",
        )
    corpora = [Corpus(source) for source in sources]
    order = sorted(range(len(corpora)), key=lambda i: (corpora[i].sha256, corpora[i].source.weight))
    encoded = _Encoder(tokenizer, chat_template=chat_template, answers=answers)
    packed = pack(
        [_feed(corpora[i], encoded, seed, samples * seq_len) for i in order],
        [corpora[i].source.weight for i in order],
        samples=samples,
        seq_len=seq_len,
        eos=end,
    )
    if not len(packed.ids):
        held = sum(use.read for use in packed.uses)
        documents = sum(len(corpus) for corpus in corpora)
        raise UsageError(
            f"calibration data: {held} tokens in {documents} documents do not fill one window of "
            f"{seq_len}",
            remedy="add data or lower calibrate.seq_len",
        )
    uses = dict(zip(order, packed.uses, strict=True))
    report = tuple(
        _report(corpus, uses[i], packed.ids.size, samples * seq_len)
        for i, corpus in enumerate(corpora)
    )
    shortfall = samples - len(packed.ids)
    return TokenBatches(
        ids=torch.from_numpy(packed.ids.copy()),
        hash=content_hash(packed.ids),
        report=report,
        shortfall=shortfall,
        warnings=_warnings(report, samples, seq_len, shortfall),
        starts=torch.from_numpy(packed.starts.copy()),
        answers=torch.from_numpy(packed.answers) if answers else None,
    )


def content_hash(ids: npt.NDArray[np.int64]) -> str:
    """sha256 of the shape and the little-endian int64 ids of ``[samples, seq_len]``."""
    digest = hashlib.sha256(f"int64 {ids.shape[0]} {ids.shape[1]}\n".encode())
    digest.update(np.ascontiguousarray(ids, dtype="<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Encoder:
    """Makes tokens of documents; ``answers``: and looks which of them are of one."""

    tokenizer: PreTrainedTokenizerBase
    chat_template: bool
    answers: bool

    def __call__(self, document: Document) -> Tokens:
        if self.answers:
            return tokens_of(
                *encode_answers(document, self.tokenizer, chat_template=self.chat_template)
            )
        return tokens_of(encode(document, self.tokenizer, chat_template=self.chat_template))


def _feed(
    corpus: Corpus, encoded: Callable[[Document], Tokens], seed: int, budget: int
) -> Iterator[Tokens]:
    """Tokens of each document in a shuffled order, a bounded batch of documents at a time."""
    # Seeded by content, so that a source is shuffled alike whatever stands beside it.
    key = hashlib.sha256(f"{seed} {corpus.sha256}".encode()).digest()
    shuffled = np.random.default_rng(int.from_bytes(key, "big")).permutation(len(corpus))
    batch: list[int] = []
    held = 0
    for index in map(int, shuffled):
        batch.append(index)
        held += corpus.sizes[index] + DOCUMENT_BYTES
        if held >= budget * BYTES_PER_TOKEN:
            yield from map(encoded, corpus.pick(batch))
            batch, held = [], 0
    yield from map(encoded, corpus.pick(batch))


def _report(corpus: Corpus, use: Use, total: int, budget: int) -> SourceReport:
    return SourceReport(
        path=corpus.source.path,
        name=corpus.source.name,
        sha256=corpus.sha256,
        documents=len(corpus),
        documents_used=use.documents,
        skipped=corpus.skipped,
        tokens_read=use.read,
        tokens_used=use.used,
        share=use.used / total,
        wanted_share=use.wanted / budget,
        shortfall=max(0, use.wanted - use.used),
        exhausted=use.exhausted,
        license=read_card(Path(corpus.source.path)).license,
    )


def _warnings(
    report: Sequence[SourceReport], samples: int, seq_len: int, shortfall: int
) -> tuple[str, ...]:
    lines = [
        f"{source.path}: ran out after {source.tokens_read} tokens; its share is "
        f"{source.share:.1%} instead of {source.wanted_share:.1%}"
        for source in report
        if source.exhausted and len(report) > 1
    ]
    lines += [
        f"{source.path}: {source.skipped} of {source.documents + source.skipped} rows hold no "
        "words and were left out"
        for source in report
        if source.skipped
    ]
    if shortfall:
        lines.append(
            f"the sources fill {samples - shortfall} of {samples} windows of {seq_len} tokens; "
            "add data, or lower calibrate.samples"
        )
    return tuple(lines)
