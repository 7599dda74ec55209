"""Asks from a recorded trace, in the format of Mooncake's (Qin et al., FAST 2025).

Each line of the JSONL file is ``{"timestamp": ms, "input_length": tokens, "output_length": tokens,
"hash_ids": [...]}``. A hash id names a block of 512 prompt tokens together with all blocks before
it, so requests that begin with the same ids begin with the same tokens: what a prefix cache finds.
The trace holds no tokens; here each id stands for a block of random ones drawn from it.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from quantkit.errors import UsageError
from quantkit.loadtest.ask import Ask
from quantkit.loadtest.draw import draw_ids
from quantkit.loadtest.tiers import LoadTier

#: Tokens that a hash id stands for in the published traces.
BLOCK_TOKENS = 512

#: A longer request than any context holds is a broken line, and its length no number to scale.
MAX_TOKENS = 2**31


@dataclass(frozen=True)
class TraceRow:
    """A recorded request: seconds from the first one, tokens, ids of its blocks."""

    at: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def read_trace(path: Path, count: int | None = None) -> list[TraceRow]:
    """Read the first ``count`` rows of a trace, all by default.

    Raises:
        UsageError: with file and line, for what is no such row or goes back in time.
    """
    rows: list[TraceRow] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip() and (count is None or len(rows) < count):
                    rows.append(_row(line, f"{path}:{number}", rows[-1] if rows else None))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"trace {path} cannot be read: {error}") from error
    if not rows:
        raise UsageError(f"{path}: no row")
    first = rows[0].at
    return [TraceRow(r.at - first, r.input_length, r.output_length, r.hash_ids) for r in rows]


def _row(line: str, where: str, before: TraceRow | None) -> TraceRow:
    try:
        doc: Any = json.loads(line)
        at = float(doc["timestamp"]) / 1000
        lengths = doc["input_length"], doc["output_length"]
        ids = tuple(doc["hash_ids"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise UsageError(
            f"{where} is no request ({type(error).__name__}: {error})",
            remedy="it needs timestamp, input_length, output_length and hash_ids",
        ) from error
    if not math.isfinite(at):
        raise UsageError(f"{where} timestamp {at} must be a finite number")
    whole = all(type(n) is int for n in (*lengths, *ids))
    if not whole or not all(0 < n < MAX_TOKENS for n in lengths):
        raise UsageError(
            f"{where} lengths and hash ids must be whole, lengths above 0 and below {MAX_TOKENS}"
        )
    if len(ids) != -(-lengths[0] // BLOCK_TOKENS):
        raise UsageError(
            f"{where} {len(ids)} hash ids for {lengths[0]} tokens; each stands for {BLOCK_TOKENS}"
        )
    if before is not None and at < before.at:
        raise UsageError(f"{where} timestamp {at:g} s comes after {before.at:g} s; sort the trace")
    return TraceRow(at, *lengths, ids)


def replay(
    rows: Sequence[TraceRow],
    tiers: Sequence[LoadTier],
    *,
    vocab_size: int,
    seed: str,
    scale: float = 1.0,
    speed: float = 1.0,
) -> list[Ask]:
    """Asks of recorded requests.

    Args:
        rows: of `read_trace`.
        tiers: drawn by their shares; a trace knows none.
        vocab_size: token ids lie below it.
        seed: another one gives other tokens and tiers.
        scale: lengths and blocks are multiplied by it; nothing becomes shorter than one token.
        speed: arrivals come so many times as fast.
    """
    rng = random.Random(seed)
    names, shares = [tier.name for tier in tiers], [tier.share for tier in tiers]
    block_tokens = max(1, round(BLOCK_TOKENS * scale))

    @cache
    def block(hash_id: int) -> tuple[int, ...]:
        return draw_ids(random.Random(f"{seed} {hash_id}"), block_tokens, vocab_size)

    asks = []
    for row in rows:
        length = max(1, round(row.input_length * scale))
        # Rounding may ask for a few tokens more than the blocks hold: the block behind them.
        ids = [token for hash_id in row.hash_ids for token in block(hash_id)]
        ids += draw_ids(rng, max(0, length - len(ids)), vocab_size)
        [tier] = rng.choices(names, shares)
        output = max(1, round(row.output_length * scale))
        asks.append(Ask(row.at / speed, tier, tuple(ids[:length]), output))
    return asks
