"""Which sequences run next. Pure bookkeeping: no tensors, no clocks, no threads.

Rules:

1. The policy orders who waits; its first is admitted when fewer than ``max_sequences`` run and
   there is memory for what is known of it. Until then nobody behind it is.
2. Every decoding sequence gets one token per step, or several if some were guessed. Guesses get
   what memory is left by all others, and stop nobody; beside prompts there are none, because what
   they cost is measured in steps of decoding alone.
3. Beside that, a step reads at most ``prefill_chunk`` tokens of prompts, in the policy's order,
   so that a long prompt slows running answers down by one chunk and never by its whole length.
4. A decoding sequence that lacks memory makes the policy name one that is stopped: its tokens are
   kept, its keys and values are not. It waits again and reads its tokens anew, the answer's too.
5. Nobody is stopped more than `MAX_BARREN` times in a row without a new token between, whatever
   the policy says: so every request ends, however little memory there is.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

from quantkit.serve.counters import Counters
from quantkit.serve.memory import Memory
from quantkit.serve.policy.order import Entry, FirstCome, Policy
from quantkit.serve.request import Sequence

MAX_BARREN = 2

#: From a step's decoding sequences to the tokens that each may generate next: guesses, never too
#: many.
Propose = Callable[[Items[Sequence]], list[list[int]]]


def no_guesses(sequences: Items[Sequence]) -> list[list[int]]:
    """The proposer of an engine that does not speculate."""
    return [[] for _ in sequences]


@dataclass(frozen=True)
class Chunk:
    """Known tokens ``[start, end)`` of one sequence, and guesses at what follows them."""

    sequence: Sequence
    start: int
    end: int
    guesses: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Tokens that the model computes."""
        return self.end - self.start + len(self.guesses)

    @property
    def token_ids(self) -> list[int]:
        return [*self.sequence.tokens[self.start : self.end], *self.guesses]


@dataclass(frozen=True)
class Step:
    """Work for one turn of the engine."""

    decodes: tuple[Chunk, ...]
    prefills: tuple[Chunk, ...]

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return self.decodes + self.prefills

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)


class Scheduler:
    """Holds waiting and running sequences; whoever runs a step updates ``computed``.

    Args:
        max_sequences: how many may run at once.
        prefill_chunk: prompt tokens a step may read.
        memory: asked for room before anything runs.
        policy: who comes first; the one who came first unless told otherwise.
        counters: where preemptions are counted.
        propose: guesses the next tokens of the decoding sequences; by default nothing.
    """

    def __init__(
        self,
        *,
        max_sequences: int,
        prefill_chunk: int,
        memory: Memory,
        policy: Policy | None = None,
        counters: Counters | None = None,
        propose: Propose = no_guesses,
    ) -> None:
        self.max_sequences = max_sequences
        self.prefill_chunk = prefill_chunk
        self.memory = memory
        self.policy: Policy = policy or FirstCome()
        self.propose = propose
        self._counters = counters or Counters()
        # What a policy sees of a sequence does not change while it waits.
        self._waiting: dict[Sequence, Entry] = {}
        self.running: list[Sequence] = []
        # The policy knows that nothing waits and no prompt is being read.
        self._quiet = False

    @property
    def waiting(self) -> list[Sequence]:
        return list(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._waiting[sequence] = entry(sequence)

    def remove(self, sequence: Sequence, *, sound: bool = True) -> None:
        """Forget a sequence, wherever it stands, and free what it holds."""
        self._waiting.pop(sequence, None)
        if sequence in self.running:
            self.running.remove(sequence)
        self.memory.release(sequence, sound=sound)

    def schedule(self, now: float) -> Step:
        """Admit what fits and lay out the next step; ``now`` is the monotonic clock."""
        quiet = not self._waiting and all(sequence.decoding for sequence in self.running)
        if not (quiet and self._quiet):
            self._admit(now)
        self._quiet = quiet
        decodes, prefills = self._decodes(now), self._prefills(now)
        step = Step(decodes if prefills else self._guess(decodes), prefills)
        for chunk in step.chunks:
            self.policy.served(entry(chunk.sequence), len(chunk))
        return step

    def _admit(self, now: float) -> None:
        waiting = list(self._waiting)
        entries = list(self._waiting.values())
        for i in self.policy.waiting_order(entries, self._entries(), now):
            if not self._make_room(waiting[i], now):
                return
            del self._waiting[waiting[i]]
            self.running.append(waiting[i])

    def _make_room(self, candidate: Sequence, now: float) -> bool:
        # A page for each that runs: with less, the next steps would stop somebody at once.
        while len(self.running) >= self.max_sequences or not self.memory.admit(
            candidate, spare=len(self.running)
        ):
            victim = self._victim(candidate, now)
            if victim is None:
                return False
            self._preempt(victim)
        return True

    def _decodes(self, now: float) -> tuple[Chunk, ...]:
        chunks: dict[Sequence, Chunk] = {}
        for sequence in [s for s in self.running if s.decoding]:
            while sequence.cache is not None and not self.memory.grow(sequence, 1):
                victim = self._victim(None, now)
                if victim is None:
                    raise RuntimeError("the policy stops nobody, and nobody can run on")
                self._preempt(victim)
                chunks.pop(victim, None)
            if sequence.cache is not None:  # nobody has stopped it, not even itself
                chunks[sequence] = Chunk(sequence, sequence.computed, sequence.computed + 1)
        return tuple(chunks.values())

    def _guess(self, decodes: tuple[Chunk, ...]) -> tuple[Chunk, ...]:
        """The same with guesses, now that all have the room that they need without."""
        if not decodes:
            return ()
        proposals = self.propose([chunk.sequence for chunk in decodes])
        return tuple(
            replace(chunk, guesses=tuple(guesses))
            if guesses and self.memory.grow(chunk.sequence, 1 + len(guesses))
            else chunk
            for chunk, guesses in zip(decodes, proposals, strict=True)
        )

    def _prefills(self, now: float) -> tuple[Chunk, ...]:
        if all(sequence.decoding for sequence in self.running):
            return ()
        left = self.prefill_chunk
        chunks = []
        for i in self.policy.prefill_order(self._entries(), now):
            sequence = self.running[i]
            if sequence.decoding:
                continue
            self.memory.reuse(sequence)
            length = min(self.prefill_chunk, sequence.left)
            if self.memory.growing:
                length = min(length, left)
            # Elsewhere a prompt is cut at the same places whoever else runs: cuts show in sums.
            if length > left or length == 0:
                break
            left -= length
            chunks.append(Chunk(sequence, sequence.computed, sequence.computed + length))
        return tuple(chunks)

    def _victim(self, candidate: Sequence | None, now: float) -> Sequence | None:
        """Whom the policy stops, of those who may be stopped."""
        if not self.memory.growing:
            return None
        running = [s for s in self.running if s.barren < MAX_BARREN]
        if not running:
            return None
        rival = None if candidate is None else entry(candidate)
        found = self.policy.victim([entry(s) for s in running], rival, now)
        return None if found is None else running[found]

    def _preempt(self, sequence: Sequence) -> None:
        self._counters.preemptions += 1
        self.running.remove(sequence)
        self.memory.release(sequence)
        sequence.computed = 0
        sequence.preempted = True
        sequence.barren += 1
        self.add(sequence)

    def _entries(self) -> list[Entry]:
        return [entry(sequence) for sequence in self.running]


def entry(sequence: Sequence) -> Entry:
    """A sequence as a policy sees it. What must be read again counts as prompt."""
    request = sequence.request
    prompt_tokens = len(request.prompt_ids)
    return Entry(
        id=request.id,
        arrival=request.arrival,
        prompt_tokens=prompt_tokens,
        prompt_left=0 if sequence.decoding else sequence.left,
        output_tokens=len(sequence.tokens) - prompt_tokens,
        max_tokens=request.sampling.max_tokens,
        tenant=request.tenant,
        tier=request.tier,
        deadline=request.deadline,
    )
