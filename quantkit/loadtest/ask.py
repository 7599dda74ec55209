"""A request of a load test: decided before the test begins, so that a seed repeats it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ask:
    """What to send, and when.

    Attributes:
        at: seconds after the start when it is due; None is as soon as a client is free.
        tier: whose it is, see `tiers.LoadTier`.
        prompt_ids: token ids of the prompt.
        output_tokens: length of the answer, to the token.
    """

    at: float | None
    tier: str
    prompt_ids: tuple[int, ...]
    output_tokens: int
