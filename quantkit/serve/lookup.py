"""Guesses from the text itself: what followed the last tokens when they stood there before.

Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023): answers that quote, edit or extract repeat
long runs of their prompt, and nothing has to be computed to guess them.
"""

from __future__ import annotations

from collections.abc import Sequence


class PromptLookup:
    """Where each run of tokens of one text stood last.

    Args:
        shortest, longest: lengths of the runs that are looked up; longer ones first.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self._ends: dict[int, dict[tuple[int, ...], int]] = {
            n: {} for n in range(longest, shortest - 1, -1)
        }
        self._known = 0

    def find(self, tokens: Sequence[int]) -> tuple[int, int]:
        """``(length, end)`` of the longest run of last tokens that stood before, and where it ended
        then; ``(0, 0)`` if none did.

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
                return n, end
        return 0, 0


def follow(tokens: Sequence[int], start: int, count: int) -> list[int]:
    """``count`` of ``tokens`` from ``start`` on; past their end, what was guessed goes on by
    itself: a loop."""
    guesses: list[int] = []
    for place in range(start, start + count):
        known = place < len(tokens)
        guesses.append(tokens[place] if known else guesses[place - len(tokens)])
    return guesses
