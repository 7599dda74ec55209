"""Guessing the next tokens of an answer, so that one pass through the model checks several.

Prompt lookup (Saxena 2023; Leviathan et al. 2023 for the check): the last few tokens stood in the
text before, and what followed them then may follow now. A guess is kept while it equals the token
that the model draws by itself, from the request's own random stream. So guesses change neither
greedy nor sampled answers by a token, and need no acceptance rule of their own.

A guess is not free: it is one row more in the pass. Steps are timed, guesses are counted, and a
request whose guesses cost more than they save makes a pause.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantkit.errors import UsageError
from quantkit.serve.counters import Counters

if TYPE_CHECKING:
    from quantkit.serve.request import Sequence

MAX_SPECULATIVE_TOKENS = 16
#: Of a step's time, a row's share while no measurement can tell.
UNKNOWN_SHARE = 0.25
#: Weight that an old measurement keeps at each new one.
FADE = 0.95
FIRST_PAUSE, LONGEST_PAUSE = 16, 512


@dataclass(frozen=True)
class SpeculativeConfig:
    """Named as in vLLM's ``speculative_config``.

    Attributes:
        method: "ngram" looks the last tokens up in prompt and answer.
        num_speculative_tokens: guesses a step and request at most.
        prompt_lookup_max: longest run of last tokens that is looked up; longer ones first.
        prompt_lookup_min: the shortest.

    Raises:
        UsageError: a value is out of range.
    """

    method: str = "ngram"
    num_speculative_tokens: int = 4
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2

    def __post_init__(self) -> None:
        if self.method != "ngram":
            raise UsageError(f"speculative method {self.method!r} is not known; use ngram")
        if not 1 <= self.num_speculative_tokens <= MAX_SPECULATIVE_TOKENS:
            raise UsageError(
                f"num_speculative_tokens {self.num_speculative_tokens} is not between 1 and "
                f"{MAX_SPECULATIVE_TOKENS}"
            )
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max:
            raise UsageError(
                f"prompt_lookup_min {self.prompt_lookup_min} is not between 1 and "
                f"prompt_lookup_max, {self.prompt_lookup_max}"
            )


class PromptLookup:
    """Where each run of tokens of one text stood last."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._ends: dict[int, dict[tuple[int, ...], int]] = {
            n: {} for n in range(longest, shortest - 1, -1)
        }
        self._known = 0

    def __call__(self, tokens: Items[int], count: int) -> list[int]:
        """What followed the last tokens at their last occurrence, ``count`` of it, or nothing.

        ``tokens`` is the text of the last call with more at its end.
        """
        # The run at the very end is what is looked up: it must not find itself.
        for end in range(self._known + 1, len(tokens)):
            for n, ends in self._ends.items():
                if end >= n:
                    ends[tuple(tokens[end - n : end])] = end
        self._known = max(self._known, len(tokens) - 1)
        for n, ends in self._ends.items():
            end = ends.get(tuple(tokens[-n:]), 0)
            if end:
                return _continue(tokens, end, count)
        return []


def _continue(tokens: Items[int], start: int, count: int) -> list[int]:
    """``tokens`` from ``start`` on; past their end, what was guessed goes on by itself: a loop."""
    guesses: list[int] = []
    for place in range(start, start + count):
        known = place < len(tokens)
        guesses.append(tokens[place] if known else guesses[place - len(tokens)])
    return guesses


class StepCost:
    """Seconds of a decoding step as ``a + b · rows``: least squares in which old steps fade."""

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._square = self._product = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        """A step took so long for so many rows."""
        self._weight = self._weight * FADE + 1
        self._rows = self._rows * FADE + rows
        self._seconds = self._seconds * FADE + seconds
        self._square = self._square * FADE + rows * rows
        self._product = self._product * FADE + rows * seconds

    def break_even(self, sequences: int) -> float:
        """Share of guesses that must be right to pay.

        A guess costs ``b``. One that is right saves what a token costs without any: the step of
        ``n`` sequences divided by its tokens, ``(a + b n) / n``.
        """
        share = self._row_share()
        # In units of a step at the mean number of rows, where b is share / mean.
        mean = self._rows / self._weight if self._weight else 1.0
        row = share / mean
        return row * sequences / (1 - share + row * sequences)

    def _row_share(self) -> float:
        """b · mean rows, in units of the mean step; between 0 and 1."""
        if not self._weight:
            return UNKNOWN_SHARE
        rows, seconds = self._rows / self._weight, self._seconds / self._weight
        variance = self._square / self._weight - rows * rows
        if variance < 0.1 or seconds <= 0:
            return UNKNOWN_SHARE  # steps of one size say nothing about another
        slope = (self._product / self._weight - rows * seconds) / variance
        return min(max(slope * rows / seconds, 0.0), 1.0)


@dataclass
class Draft:
    """One request's guessing.

    Attributes:
        lookup: finds guesses.
        proposed: guesses made, old ones fading; begins with half a success to be found out.
        accepted: those that were right.
        resume: tokens of the answer from which on it guesses again.
        pause: how long the next pause is.
    """

    lookup: PromptLookup
    proposed: float = 4.0
    accepted: float = 2.0
    resume: int = 0
    pause: int = FIRST_PAUSE

    def verified(self, proposed: int, accepted: int) -> None:
        """So many of the last guesses were right."""
        self.proposed = self.proposed * FADE + proposed
        self.accepted = self.accepted * FADE + accepted

    def rest(self, written: int) -> None:
        """Stop guessing for a while; each time in a row for twice as long."""
        self.resume = written + self.pause
        self.pause = min(2 * self.pause, LONGEST_PAUSE)
        self.proposed, self.accepted = 1.0, 0.5


@dataclass
class Speculator:
    """Makes guesses for the sequences of an engine and learns what they are worth."""

    config: SpeculativeConfig
    counters: Counters
    cost: StepCost = field(default_factory=StepCost)
    sequences: int = 1

    def propose(self, sequence: Sequence) -> list[int]:
        """Guesses at the tokens that a decoding sequence will generate next."""
        config, written = self.config, sequence.output_tokens
        draft = sequence.draft
        if draft is None:
            lookup = PromptLookup(config.prompt_lookup_min, config.prompt_lookup_max)
            draft = sequence.draft = Draft(lookup)
        # The pass gives one token more than its right guesses.
        count = min(
            config.num_speculative_tokens, sequence.request.sampling.max_tokens - written - 1
        )
        if count < 1 or written < draft.resume:
            return []
        guesses = draft.lookup(sequence.tokens, count)
        return sequence.answer.possible(guesses) if sequence.answer else guesses

    def verified(self, sequence: Sequence, proposed: int, accepted: int) -> None:
        """The model was asked about guesses, and so many were right."""
        self.counters.draft_tokens += proposed
        self.counters.accepted_tokens += accepted
        draft = sequence.draft
        if draft is None:
            return
        draft.verified(proposed, accepted)
        if draft.accepted < self.cost.break_even(self.sequences) * draft.proposed:
            draft.rest(sequence.output_tokens)
        elif accepted == proposed:
            draft.pause = FIRST_PAUSE

    def observe(self, sequences: int, rows: int, seconds: float) -> None:
        """A step of decoding alone took so long."""
        self.sequences = sequences
        self.cost.observe(rows, seconds)
