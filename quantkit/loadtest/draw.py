"""Asks drawn from a seed: random token ids of one length, as a Poisson process or at once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.loadtest.ask import Ask
from quantkit.loadtest.tiers import LoadTier


@dataclass(frozen=True)
class Shape:
    """What every request is like.

    Attributes:
        prompt_tokens, output_tokens: lengths.
        vocab_size: token ids lie below it.
        shared_tokens: of the prompt, how many are the same in all requests of a draw: what a
            prefix cache finds.
    """

    prompt_tokens: int
    output_tokens: int
    vocab_size: int
    shared_tokens: int = 0


def draw_asks(
    shape: Shape, tiers: Sequence[LoadTier], count: int, seed: str, rate: float | None
) -> list[Ask]:
    """Draw requests; the same arguments give the same ones.

    Args:
        shape: lengths and ids.
        tiers: drawn by their shares.
        count: how many.
        seed: another one gives other prompts, so that no cache of a server has seen them.
        rate: mean arrivals a second, with exponential gaps between; None leaves the time open.
    """
    rng = random.Random(seed)
    names, shares = [tier.name for tier in tiers], [tier.share for tier in tiers]
    shared = draw_ids(rng, shape.shared_tokens, shape.vocab_size)
    asks, now = [], 0.0
    for _ in range(count):
        if rate is not None:
            now += rng.expovariate(rate)
        [tier] = rng.choices(names, shares)
        own = draw_ids(rng, shape.prompt_tokens - shape.shared_tokens, shape.vocab_size)
        asks.append(Ask(now if rate else None, tier, shared + own, shape.output_tokens))
    return asks


def draw_ids(rng: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    """Token ids, each as likely as the other."""
    return tuple(rng.randrange(vocab_size) for _ in range(count))
