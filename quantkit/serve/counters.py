"""What an engine has counted since it started; metrics read it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Only the engine thread writes; whoever reads sees each number a step late at worst.

    Attributes:
        prefix_queries: prompt tokens of admitted requests, looked up in the prefix cache.
        prefix_hits: of those, tokens whose keys and values were there.
        preemptions: running requests that were stopped for others.
        drafts: how often an answer went through a pass with guesses; each time, one token more
            came out than were accepted, or as many, where a right guess ended the answer.
        draft_tokens: tokens proposed by speculation.
        accepted_tokens: of those, tokens that the model chose, too.
    """

    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def prefix_hit_rate(self) -> float:
        """Share of prompt tokens that came out of the prefix cache; 0 before the first."""
        return self.prefix_hits / self.prefix_queries if self.prefix_queries else 0.0
