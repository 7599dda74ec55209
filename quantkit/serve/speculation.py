"""Guessing the next tokens of an answer, so that one pass through the model checks several.

Guesses come from the text itself (`lookup`) or from a small model (`draft_model`). A guess is kept
while it equals the token that the model draws by itself, from the request's own random stream
(Leviathan et al. 2023 accept more, at the price of other tokens). So guesses change neither greedy
nor sampled answers by a token, and need no acceptance rule of their own.

A guess is not free. Passes are timed and outcomes counted, for each answer and each kind of guess;
each pass gets the guesses that are expected to raise its goodput, and credit bounds what can be
lost where the expectation is wrong (`goodput`).
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantkit.errors import UsageError
from quantkit.serve.counters import Counters
from quantkit.serve.draft_model import DraftModel, make_draft_model
from quantkit.serve.goodput import LOSS_SHARE, OUTLIER, Credit, PassCost, Rate, allot, winnings
from quantkit.serve.lookup import PromptLookup, follow

if TYPE_CHECKING:
    from quantkit.models.runtime import Runtime
    from quantkit.serve.kv_cache import Capacity
    from quantkit.serve.request import Sequence

logger = logging.getLogger(__name__)

MAX_SPECULATIVE_TOKENS = 16
#: What a kind of guess is worth before the first outcome, and one by a single token.
FIRST_RATE, FIRST_RATE_OF_ONE = 0.5, 0.2
#: Passes' worth of credit for guesses, and for reading texts with a draft model.
GUESS_CREDIT, READ_CREDIT = 2.0, 64.0
#: An answer is expected to go on for as long as it has lasted, and at least so many tokens.
LEAST_LEFT = 32
#: Kind of a draft model's guesses; those of a lookup are `quantkit.serve.lookup.Found.kind`.
DRAFTED = 0


@dataclass(frozen=True)
class SpeculativeConfig:
    """Named as in vLLM's ``speculative_config``.

    Attributes:
        method: "ngram" looks the last tokens up in prompt and answer. An engine that has a draft
            model asks that, too, where a lookup finds nothing better.
        num_speculative_tokens: guesses a step and request at most.
        prompt_lookup_max: longest run of last tokens that is looked up; longer ones first.
        prompt_lookup_min: the shortest; a single token is guessed by only where that pays.

    Raises:
        UsageError: a value is out of range.
    """

    method: str = "ngram"
    num_speculative_tokens: int = 4
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 1

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


@dataclass
class Draft:
    """One request's guessing.

    Attributes:
        lookup: finds guesses.
        rates: how often each was right, by the sign of its kinds: lookups in the prompt, those in
            the answer, the draft model.
        kind: of the guesses that the model is asked about.
        broken: making guesses failed once: there are no more.
    """

    lookup: PromptLookup
    rates: dict[int, Rate] = field(default_factory=lambda: {1: Rate(), -1: Rate(), 0: Rate()})
    kind: int = 0
    broken: bool = False

    def rate(self, kind: int) -> Rate:
        """Of guesses like those of a kind."""
        return self.rates[(kind > 0) - (kind < 0)]


@dataclass(frozen=True)
class _Candidate:
    """An answer that may be guessed: where it stands in the step, how, and how well."""

    index: int
    sequence: Sequence
    limit: int
    kind: int
    rate: float
    end: int = 0


def make_speculator(
    config: SpeculativeConfig | None,
    runtime: Runtime,
    draft: Runtime | None,
    capacity: Capacity,
    counters: Counters,
) -> Speculator | None:
    """What guesses in an engine; None where neither a config nor a draft model is given.

    Raises:
        UsageError: a model does not run in the native decoder, or the draft does not fit.
    """
    if config is None and draft is None:
        return None
    model = make_draft_model(
        runtime,
        draft,
        max_context=capacity.max_context,
        kv_tokens=capacity.kv_tokens,
    )
    return Speculator(config or SpeculativeConfig(), counters, model)


class Speculator:
    """Makes guesses for the sequences of an engine and learns what they are worth.

    Args:
        config: how.
        counters: where guesses are counted.
        model: guesses where a lookup does not; None leaves that out.
        clock: seconds; whoever times steps uses the same.

    Attributes:
        cost: seconds of the model's passes.
        credit, reading: what may be lost to guesses, and to a draft model's reading.
    """

    def __init__(
        self,
        config: SpeculativeConfig,
        counters: Counters,
        model: DraftModel | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config = config
        self.counters = counters
        self.model = model
        self.cost = PassCost()
        share = LOSS_SHARE / (1 if model is None else 2)  # guesses and reading share it
        self.credit = Credit(GUESS_CREDIT, share)
        self.reading = Credit(READ_CREDIT, share)
        self._rates: dict[int, Rate] = defaultdict(Rate)
        self.clock = clock
        # Of the step that runs: what its guesses took to make, and how many tokens they won.
        self._making = 0.0
        self._drafted = False
        self._won = 0

    # For the scheduler -----------------------------------------------------------------------

    def propose(self, sequences: Items[Sequence]) -> list[list[int]]:
        """Guesses at the tokens that each of a step's decoding sequences will generate next."""
        self._making, self._won, self._drafted = 0.0, 0, False
        guesses: list[list[int]] = [[] for _ in sequences]
        # Now and then without any, so that it stays known how long that takes.
        if not self.credit.open or self.cost.stale(len(sequences)):
            return guesses
        started = self.clock()
        candidates = self._candidates(sequences)
        counts = self._allot(candidates, len(sequences))
        chosen = [(c, count) for c, count in zip(candidates, counts, strict=True) if count]
        for candidate, found in self._make(chosen):
            candidate.sequence.draft.kind = candidate.kind  # type: ignore[union-attr]
            guesses[candidate.index] = self._possible(candidate.sequence, found)
        self._making = self.clock() - started
        self._read(sequences)
        return guesses

    # For the engine --------------------------------------------------------------------------

    def forget(self, sequence: Sequence) -> None:
        """A request is over; one that waits again keeps what was read of it."""
        if self.model is not None:
            self.model.forget(sequence)

    # For the worker --------------------------------------------------------------------------

    def verified(self, sequence: Sequence, proposed: int, accepted: int, won: int) -> None:
        """The model was asked about guesses, and so many were right.

        Args:
            sequence: whose they are.
            proposed: guesses.
            accepted: of those, right ones.
            won: tokens beyond the one that comes without guesses: one less than ``accepted``
                where a right guess ended the answer.
        """
        self.counters.drafts += 1
        self.counters.draft_tokens += proposed
        self.counters.accepted_tokens += accepted
        self._won += won
        draft = sequence.draft
        assert draft is not None, "guesses were made for it"
        draft.rate(draft.kind).observe(proposed, accepted)
        self._rates[draft.kind].observe(proposed, accepted)

    def observe(self, sequences: int, rows: int, seconds: float) -> None:
        """A step of decoding alone took so long, and all its guesses are `verified`."""
        plain, expected = self.cost(sequences), self.cost(rows)
        self.cost.observe(rows, seconds)
        if rows == sequences:
            self.credit.book(seconds, -self._making)
            self.reading.book(seconds, 0.0)
            return
        # What another process took from this pass is not the guesses' fault.
        taken = min(seconds, OUTLIER * expected) + self._making
        rest = self.credit.book(plain, winnings(plain, taken, sequences, self._won))
        # What both were given could be lost twice: reading gets what guesses need no more.
        self.reading.book(plain, rest if self._drafted else 0.0)

    # Inside ----------------------------------------------------------------------------------

    def _candidates(self, sequences: Items[Sequence]) -> list[_Candidate]:
        found = (self._candidate(i, sequence) for i, sequence in enumerate(sequences))
        return [candidate for candidate in found if candidate is not None]

    def _candidate(self, index: int, sequence: Sequence) -> _Candidate | None:
        config = self.config
        # The pass gives one token more than its right guesses.
        left = sequence.request.sampling.max_tokens - sequence.output_tokens - 1
        limit = min(config.num_speculative_tokens, left)
        if sequence.draft is None:
            shortest, longest = config.prompt_lookup_min, config.prompt_lookup_max
            prompt = len(sequence.request.prompt_ids)
            sequence.draft = Draft(PromptLookup(shortest, longest, prompt))
        draft = sequence.draft
        if limit < 1 or draft.broken:
            return None
        rates = {f: self._rate(draft, f.kind) for f in draft.lookup.find(sequence.tokens)}
        found = max(rates, key=lambda f: rates[f], default=None)
        looked_up = 0.0 if found is None else rates[found]
        if self.model is not None and self.model.behind(sequence) <= limit + 1:
            drafted = self._rate(draft, DRAFTED)
            if drafted > looked_up:
                return _Candidate(index, sequence, limit, DRAFTED, drafted)
        if found is None:
            return None
        return _Candidate(index, sequence, limit, found.kind, looked_up, found.end)

    def _rate(self, draft: Draft, kind: int) -> float:
        first = FIRST_RATE_OF_ONE if abs(kind) == 1 else FIRST_RATE
        return draft.rate(kind).expected(self._rates[kind].expected(first))

    def _allot(self, candidates: list[_Candidate], sequences: int) -> list[int]:
        if not candidates:
            return []
        counts = allot(
            [candidate.rate for candidate in candidates],
            [candidate.limit for candidate in candidates],
            self.cost,
            sequences=sequences,
            drafted=[candidate.kind == DRAFTED for candidate in candidates],
            draft_cost=self._draft_cost,
        )
        if not any(counts) and self.credit.full:
            # What was said so far may be a bad sign for what comes: try the best one again.
            best = max(range(len(candidates)), key=lambda i: candidates[i].rate)
            counts[best] = candidates[best].limit
        return counts

    def _draft_cost(self, rows: int) -> float:
        """Seconds of a draft model's pass; before the first one, by the bytes that it reads."""
        assert self.model is not None
        cost = self.model.cost
        return cost(rows) if cost.known else self.model.share * self.cost(rows)

    def _make(self, chosen: list[tuple[_Candidate, int]]) -> list[tuple[_Candidate, list[int]]]:
        """Each answer's guesses, as many as were allotted."""
        made = []
        drafted = []
        for candidate, count in chosen:
            if candidate.kind == DRAFTED:
                drafted.append((candidate, count))
            else:
                tokens = follow(candidate.sequence.tokens, candidate.end, count)
                made.append((candidate, tokens))
        if drafted and self.model is not None:
            self._drafted = True
            sequences = [candidate.sequence for candidate, _ in drafted]
            try:
                found = self.model.guess(sequences, [count for _, count in drafted])
            except Exception:
                self._give_up()
            else:
                made += [(c, tokens) for (c, _), tokens in zip(drafted, found, strict=True)]
        return made

    def _possible(self, sequence: Sequence, guesses: list[int]) -> list[int]:
        """Of guesses those that the answer's form allows."""
        draft, answer = sequence.draft, sequence.answer
        assert draft is not None
        assert answer is not None
        try:
            return answer.possible(guesses)
        except Exception:
            # Guesses decide no token: the answer goes on without, and nobody else notices.
            logger.exception("request %s: no more guesses", sequence.request.id)
            draft.broken = True
            return []

    def _read(self, sequences: Items[Sequence]) -> None:
        """Let the draft model read on in one text, if that is expected to pay."""
        if self.model is None:
            return
        model, most = self.model, self.config.num_speculative_tokens
        for sequence in sequences:
            behind = model.behind(sequence) - 1
            if behind <= most or sequence.draft is None or sequence.draft.broken:
                continue
            passes, rest = divmod(behind, model.read_tokens)
            price = passes * self._draft_cost(model.read_tokens) + self._draft_cost(rest)
            if not self.reading.affords(price) or price > self._prospect(sequence, len(sequences)):
                continue
            started = self.clock()
            try:
                model.read(sequence)
            except Exception:
                self._give_up()
            self.reading.spend(self.clock() - started)
            return

    def _prospect(self, sequence: Sequence, sequences: int) -> float:
        """Seconds that a draft model's guesses may save this answer yet."""
        assert sequence.draft is not None
        written, sampling = sequence.output_tokens, sequence.request.sampling
        left = min(sampling.max_tokens - written, max(written, LEAST_LEFT))
        rate, plain = self._rate(sequence.draft, DRAFTED), self.cost(sequences)
        best = 0.0
        tokens, chance = 1.0, 1.0
        for count in range(1, self.config.num_speculative_tokens + 1):
            chance *= rate
            tokens += chance
            extra = self.cost(sequences + count) - plain + count * self._draft_cost(1)
            # Seconds won a pass, for each of the tokens that come out of it.
            best = max(best, ((tokens - 1) * plain / sequences - extra) / tokens)
        return best * left

    def _give_up(self) -> None:
        logger.exception("the draft model failed: there are no more guesses of it")
        self.model = None
