"""Which sequences run next. Pure bookkeeping: no tensors, no clocks, no threads.

Rules:

1. First come, first served: a sequence is admitted when it is the oldest waiting one, fewer
   than ``max_sequences`` run and its worst case fits into the token budget. Nothing overtakes.
2. Every decoding sequence gets one token per step, oldest first: round-robin.
3. Beside that, a step reads at most ``prefill_chunk`` prompt tokens, so that a long prompt slows
   running answers down by one chunk and never by its whole length.
4. A sequence's chunks depend only on its own prompt, never on who else is running: the same
   request computes the same floating-point sums alone and under load.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from quantkit.serve.kv_cache import TokenBudget
from quantkit.serve.request import Sequence


@dataclass(frozen=True)
class PrefillChunk:
    """Prompt tokens ``[start, end)`` of one sequence."""

    sequence: Sequence
    start: int
    end: int


@dataclass(frozen=True)
class Step:
    """Work for one turn of the engine: a token for each of ``decodes``, then ``prefills``."""

    decodes: tuple[Sequence, ...]
    prefills: tuple[PrefillChunk, ...]

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)


class Scheduler:
    """Holds waiting and running sequences; whoever runs a step updates ``prefilled``."""

    def __init__(self, *, max_sequences: int, prefill_chunk: int, budget: TokenBudget) -> None:
        self.max_sequences = max_sequences
        self.prefill_chunk = prefill_chunk
        self.budget = budget
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind all others."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it stands, and free what it reserved."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.budget.release(sequence.request.id)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> Step:
        """Admit what fits and lay out the next step."""
        self._admit()
        decodes = tuple(sequence for sequence in self.running if sequence.decoding)
        return Step(decodes, self._prefills())

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_sequences:
            head = self.waiting[0]
            if not self.budget.reserve(head.request.id, head.request.max_length):
                return
            self.running.append(self.waiting.popleft())

    def _prefills(self) -> tuple[PrefillChunk, ...]:
        left = self.prefill_chunk
        chunks = []
        for sequence in self.running:
            if sequence.decoding:
                continue
            length = min(self.prefill_chunk, sequence.prompt_left)
            if length > left:
                break
            left -= length
            chunks.append(PrefillChunk(sequence, sequence.prefilled, sequence.prefilled + length))
        return tuple(chunks)
