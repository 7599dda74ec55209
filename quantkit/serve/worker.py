"""One step of the engine: schedule → run → write. Only the engine thread is ever in here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import partial
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.serve import sampler
from quantkit.serve.answer import Answer
from quantkit.serve.events import (
    Event,
    Failed,
    FinishReason,
    PromptScored,
    TokenLogprob,
    internal_error,
)
from quantkit.serve.request import RequestError
from quantkit.serve.runner import Work

if TYPE_CHECKING:
    from quantkit.serve.memory import Memory
    from quantkit.serve.metrics import Metrics
    from quantkit.serve.request import Sequence
    from quantkit.serve.runner import Results, Runner
    from quantkit.serve.sampler import Likeliest
    from quantkit.serve.scheduler import Chunk, Scheduler
    from quantkit.serve.speculation import Speculator

logger = logging.getLogger(__name__)


class Owner(Protocol):
    """Whom a worker tells: the engine."""

    def wanted(self, sequence: Sequence) -> bool:
        """Neither over nor cancelled."""
        ...

    def emit(self, sequence: Sequence, event: Event) -> None:
        """Pass on an event that is not the last one."""
        ...

    def flush(self) -> None:
        """A pass begins: what was emitted may be read meanwhile."""
        ...

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """The sequence ends as it was asked to."""
        ...

    def fail(self, sequence: Sequence, event: Failed) -> None:
        """The sequence cannot go on."""
        ...


class Worker:
    """Runs the scheduler's steps.

    Args:
        owner: told what comes of each sequence.
        scheduler: says what to run.
        runner: runs it.
        memory: told what of it is sound.
        metrics: of the engine.
        begin: makes the `Answer` of a sequence whose prompt was read.
        speculator: whose guesses the scheduler lays out; None without any.
    """

    def __init__(
        self,
        owner: Owner,
        scheduler: Scheduler,
        runner: Runner,
        memory: Memory,
        metrics: Metrics,
        begin: Callable[[Sequence], Answer],
        speculator: Speculator | None = None,
    ) -> None:
        self.owner = owner
        self.scheduler = scheduler
        self.runner = runner
        self.memory = memory
        self.metrics = metrics
        self.begin = begin
        self.speculator = speculator
        self.clock: Callable[[], float] = time.perf_counter

    def step(self, now: float) -> bool:
        """Compute and emit what the scheduler lays out at ``now``, of the monotonic clock.

        Returns:
            False if there was nothing to do.
        """
        if self.speculator is not None and self.speculator.model is not None:
            self.owner.flush()  # a draft model's passes leave the interpreter first
        step = self.scheduler.schedule(now)
        chunks = [chunk for chunk in step.chunks if self.owner.wanted(chunk.sequence)]
        if not chunks:
            self.owner.flush()
            return False
        works = [
            Work(chunk.sequence.cache, chunk.token_ids, all_logits=_wants_all_logits(chunk))
            for chunk in chunks
        ]
        self.owner.flush()
        started = self.clock()
        results = self.runner.run(works)
        seconds = self.clock() - started
        found = sampler.likeliest(results, [_greedy_rows(chunk) for chunk in chunks])
        for i, (chunk, likeliest) in enumerate(zip(chunks, found, strict=True)):
            self._guarded(chunk.sequence, partial(self._proceed, chunk, results, i, likeliest))
        if self.speculator is not None and not step.prefills:
            self.speculator.observe(len(chunks), sum(map(len, chunks)), seconds)
        return True

    def _guarded(self, sequence: Sequence, work: Callable[[], None]) -> None:
        """Run one sequence's work; what it raises is that sequence's end and no one else's."""
        if not self.owner.wanted(sequence):
            return
        try:
            work()
        except QuantkitError as error:
            logger.error("request %s failed: %s", sequence.request.id, error)
            invalid = isinstance(error, RequestError)
            self.owner.fail(sequence, Failed(str(error), invalid=invalid))
        except Exception:
            logger.exception("request %s failed", sequence.request.id)
            self.owner.fail(sequence, internal_error())

    def _proceed(
        self, chunk: Chunk, results: Results, place: int, likeliest: Items[Likeliest]
    ) -> None:
        """What follows from a chunk's logits ``[1 or len(chunk), vocab]``, the result at
        ``place``."""
        if not likeliest and isinstance(failure := results[place], Exception):
            raise failure
        sequence = chunk.sequence
        request = sequence.request
        sequence.computed = chunk.end
        if read := _prompt_tokens(chunk):
            self.metrics.prompt_tokens.inc(read)
        if request.sampling.scores_prompt and not sequence.output_tokens:
            self._score_prompt(chunk, _logits(results, place))
        if sequence.left:
            return
        if request.sampling.max_tokens == 0:
            self.owner.finish(sequence, "length")
        else:
            self._write(chunk, results, place, likeliest)

    def _score_prompt(self, chunk: Chunk, logits: Tensor) -> None:
        """Row i of a chunk predicts prompt token ``start + i + 1``; the very last row none.

        What is read a second time, after a preemption, was scored before.
        """
        sequence, prompt = chunk.sequence, chunk.sequence.request.prompt_ids
        scored = sequence.prompt_logprobs
        if not scored:
            scored.append(TokenLogprob(prompt[0], None))
        targets = list(prompt[len(scored) : chunk.end + 1])
        first = len(scored) - chunk.start - 1
        scored += sampler.score(
            logits[first : first + len(targets)], targets, sequence.request.sampling.logprobs or 0
        )
        if chunk.end == len(prompt):
            self.owner.emit(sequence, PromptScored(tuple(scored)))

    def _write(
        self, chunk: Chunk, results: Results, place: int, likeliest: Items[Likeliest]
    ) -> None:
        """Choose the tokens behind a chunk and emit them, as many as its guesses foresaw and one.

        Of its last rows, row i is what the model says after i guesses, so it counts if it was asked
        about the tokens that were really chosen. Every token is drawn from the request's own
        stream, as it would be without guesses: they change how many passes an answer takes, and
        nothing else.
        """
        sequence = chunk.sequence
        answer = sequence.answer or self._begin(sequence)
        accepted, before = 0, len(sequence.tokens)
        first = -1 - len(chunk.guesses)
        try:
            for i, guess in enumerate((*chunk.guesses, None)):
                # A row of its own is a tensor to make, which most tokens need not.
                if likeliest and answer.plain:
                    event = answer.take(likeliest[i])
                else:
                    event = answer.choose(_logits(results, place)[first + i])
                sequence.tokens.append(event.token_id)
                self.owner.emit(sequence, event)
                accepted += event.token_id == guess
                if answer.finish_reason or event.token_id != guess:
                    break
        finally:
            written = len(sequence.tokens) - before
            self.metrics.generated_tokens.inc(written)
        sequence.computed, sequence.barren = chunk.end + accepted, 0
        self.memory.settle(sequence)
        if self.speculator is not None and chunk.guesses:
            # One comes out of any pass.
            self.speculator.verified(sequence, len(chunk.guesses), accepted, written - 1)
        if answer.finish_reason:
            self.owner.finish(sequence, answer.finish_reason)

    def _begin(self, sequence: Sequence) -> Answer:
        self.metrics.ttft.observe(time.monotonic() - sequence.request.arrival)
        sequence.answer = answer = self.begin(sequence)
        return answer


def _logits(results: Results, place: int) -> Tensor:
    result = results[place]
    if isinstance(result, Exception):
        raise result
    return result


def _greedy_rows(chunk: Chunk) -> int:
    """How many of a chunk's last rows foretell tokens that are the likeliest, if nothing else says
    otherwise about them."""
    sequence = chunk.sequence
    sampling = sequence.request.sampling
    greedy = sampling.greedy and sampling.max_tokens > 0 and chunk.end == len(sequence.tokens)
    return 1 + len(chunk.guesses) if greedy else 0


def _wants_all_logits(chunk: Chunk) -> bool:
    sequence = chunk.sequence
    scored = len(sequence.prompt_logprobs) == len(sequence.request.prompt_ids)
    return bool(chunk.guesses) or (sequence.request.sampling.scores_prompt and not scored)


def _prompt_tokens(chunk: Chunk) -> int:
    """Tokens of a chunk that belong to the prompt."""
    length = len(chunk.sequence.request.prompt_ids)
    return max(0, min(chunk.end, length) - chunk.start)
