"""Guesses from the text itself: what followed the last tokens when they stood there before.

Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023): answers that quote, edit or extract repeat
long runs of their prompt, and nothing has to be computed to guess them.

Prompt and answer are looked up apart. What stood last is mostly the answer's own, whose last
punctuation says little about what comes, while the clause that is quoted stands in the prompt; an
answer that goes in circles is the other way round. Whoever asks knows how often each was right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Found:
    """A run of last tokens that stood before.

    Attributes:
        length: of the run.
        end: where it ended then.
        quoted: that, and the token behind it, is in the prompt.
    """

    length: int
    end: int
    quoted: bool

    @property
    def kind(self) -> int:
        """The length; below 0 if it is the answer's own."""
        return self.length if self.quoted else -self.length


class PromptLookup:
    """Where each run of tokens of one text stood last.

    Args:
        shortest, longest: lengths of the runs that are looked up; longer ones first.
        prompt: tokens of the text that are not the answer's.
    """

    def __init__(self, shortest: int, longest: int, prompt: int) -> None:
        self._prompt = prompt
        self._ends: dict[bool, dict[int, dict[tuple[int, ...], int]]] = {
            quoted: {n: {} for n in range(longest, shortest - 1, -1)} for quoted in (True, False)
        }
        self._known = 0

    def find(self, tokens: Sequence[int]) -> list[Found]:
        """The longest run of last tokens that stood before in the prompt, and in the answer.

        ``tokens`` is the text of the last call with more at its end.
        """
        # The run at the very end is what is looked up: it must not find itself.
        for end in range(self._known + 1, len(tokens)):
            for n, ends in self._ends[end < self._prompt].items():
                if end >= n:
                    ends[tuple(tokens[end - n : end])] = end
        self._known = max(self._known, len(tokens) - 1)
        found = []
        for quoted, lengths in self._ends.items():
            for n, ends in lengths.items():
                if end := ends.get(tuple(tokens[-n:]), 0):
                    found.append(Found(n, end, quoted))
                    break
        return found


def follow(tokens: Sequence[int], start: int, count: int) -> list[int]:
    """``count`` of ``tokens`` from ``start`` on; past their end, what was guessed goes on by
    itself: a loop."""
    guesses: list[int] = []
    for place in range(start, start + count):
        known = place < len(tokens)
        guesses.append(tokens[place] if known else guesses[place - len(tokens)])
    return guesses
