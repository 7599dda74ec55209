"""The engine: one thread that owns the model and every running sequence.

``step()`` is schedule → run → emit. Callers on other threads only append to an inbox
(`submit`, `cancel`); all state behind it is touched by the engine thread alone, so there are no
locks around it. Invariants, which the tests hold:

- every submitted request gets exactly one terminal event (`Finished` or `Failed`);
- an exception while a sequence runs fails that sequence and nobody else;
- when nothing is live, no KV cache is reserved and none is held.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from quantkit.errors import QuantkitError
from quantkit.models.paged import pages_for
from quantkit.ops.decoder import PAGE_TOKENS
from quantkit.serve import sampler
from quantkit.serve.detokenizer import Detokenizer
from quantkit.serve.events import (
    Event,
    Failed,
    Finished,
    FinishReason,
    PromptScored,
    TokenEvent,
    TokenLogprob,
)
from quantkit.serve.kv_cache import TokenBudget, plan_capacity
from quantkit.serve.metrics import Metrics
from quantkit.serve.request import ContextOverflowError, Request, RequestError, Sequence, Sink
from quantkit.serve.runner import Work, make_runner
from quantkit.serve.scheduler import PrefillChunk, Scheduler
from quantkit.serve.stream import EventStream

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.models.runtime import Runtime

logger = logging.getLogger(__name__)


class QueueFullError(QuantkitError):
    """Too many requests wait already."""


class StoppedError(QuantkitError):
    """The engine drains or has stopped: it takes no more requests."""


@dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine.

    Attributes:
        max_sequences: how many requests may run at once.
        max_context: longest prompt and answer together; None is what model and memory allow.
        prefill_chunk: prompt tokens a step may read, beside one token per running answer.
        max_queue: requests that may wait before new ones are refused.
        stall_seconds: work without a finished step for so long makes the engine not ready.
    """

    max_sequences: int = 16
    max_context: int | None = None
    prefill_chunk: int = 256
    max_queue: int = 1024
    stall_seconds: float = 120.0


class Engine:
    """Runs requests on a `Runtime`. Use `start`, then `submit` or `stream`, then `stop`."""

    def __init__(self, runtime: Runtime, config: EngineConfig | None = None) -> None:
        self.runtime = runtime
        self.config = config = config or EngineConfig()
        self.capacity = plan_capacity(
            runtime.model,
            max_context=config.max_context,
            max_sequences=config.max_sequences,
            token_bytes=None if runtime.decoder is None else runtime.decoder.token_nbytes(),
        )
        granule = PAGE_TOKENS if runtime.decoder is not None else 1
        # Whole pages for each sequence: the last of a sequence's pages is rarely full.
        kv_tokens = self.capacity.kv_tokens
        if granule > 1:
            kv_tokens = max(kv_tokens // granule, pages_for(self.capacity.max_context)) * granule
        self.runner = make_runner(runtime, kv_tokens)
        self.budget = TokenBudget(kv_tokens, granule)
        self.scheduler = Scheduler(
            max_sequences=config.max_sequences,
            prefill_chunk=config.prefill_chunk,
            budget=self.budget,
        )
        self.metrics = self._make_metrics()
        self._eos = _eos_ids(runtime)
        self._vocab = int(runtime.model.config.get_text_config().vocab_size)
        # Shared with callers, guarded by the condition:
        self._wake = threading.Condition()
        self._inbox: deque[Sequence] = deque()
        self._cancelled: set[str] = set()
        self._live: dict[str, Sequence] = {}
        self._accepting = False
        self._abort: str | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._progress = time.monotonic()

    # Called from any thread ------------------------------------------------------------------

    def start(self) -> Engine:
        """Start the engine thread."""
        self._accepting = True
        # A daemon, so that a hung forward pass cannot keep the process alive after a hard stop.
        self._thread = threading.Thread(target=self._loop, name="quantkit-engine", daemon=True)
        self._thread.start()
        return self

    def check(self, request: Request) -> None:
        """Raise `RequestError` if the request can never run."""
        if not request.prompt_ids:
            raise RequestError("prompt: is empty", param="prompt")
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= self._vocab:
            raise RequestError(
                f"prompt: token ids must lie between 0 and {self._vocab - 1}", param="prompt"
            )
        length, limit = len(request.prompt_ids), self.capacity.max_context
        if request.max_length > limit:
            raise ContextOverflowError(
                f"the prompt has {length} tokens and max_tokens is "
                f"{request.sampling.max_tokens}, together {request.max_length}; the context "
                f"holds {limit} tokens",
                param="max_tokens" if length <= limit else "prompt",
                code="context_length_exceeded",
            )

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request. ``sink`` gets its events on the engine thread and must not block."""
        self.check(request)
        with self._wake:
            if not self._accepting:
                raise StoppedError("the server is shutting down")
            if request.id in self._live:
                raise RequestError(f"request id {request.id!r} is in use", param="id")
            if self.queued >= self.config.max_queue:
                raise QueueFullError(
                    f"{self.config.max_queue} requests are waiting already", remedy="retry later"
                )
            if not self._live:
                self._progress = time.monotonic()  # having had nothing to do is not a stall
            sequence = Sequence(request, sink)
            self._live[request.id] = sequence
            self._inbox.append(sequence)
            self._wake.notify_all()

    def stream(self, *requests: Request) -> EventStream:
        """Queue requests and return their events as an async iterator of (index, event)."""
        return EventStream(self, requests)

    def cancel(self, request_id: str) -> None:
        """Stop a request soon; one that is unknown or over is ignored."""
        with self._wake:
            if request_id in self._live:
                self._cancelled.add(request_id)
                self._wake.notify_all()

    def close_intake(self) -> None:
        """Refuse new requests from now on; those submitted go on."""
        with self._wake:
            self._accepting = False

    def abort(self, message: str = "the server is shutting down") -> None:
        """Refuse new requests and fail those that are live, between two steps."""
        with self._wake:
            self._accepting = False
            self._abort = message
            self._wake.notify_all()

    def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait for the live ones; False if some outlast ``timeout``."""
        self.close_intake()
        with self._wake:
            return self._wake.wait_for(lambda: not self._live, timeout)

    def stop(self, timeout: float = 10.0) -> bool:
        """Abort what is live and end the thread; False if it did not end in time."""
        self.abort()
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)
        return not self.alive

    @property
    def alive(self) -> bool:
        """The engine thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """It takes requests and, if it has work, moves forward."""
        idle = time.monotonic() - self._progress if self._live else 0.0
        return self.alive and self._accepting and idle < self.config.stall_seconds

    @property
    def live(self) -> int:
        """Requests without a terminal event."""
        return len(self._live)

    @property
    def running(self) -> int:
        return len(self.scheduler.running)

    @property
    def queued(self) -> int:
        return max(0, len(self._live) - self.running)

    # Engine thread only ----------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            while self._take_orders():
                try:
                    self.step()
                except Exception:
                    # Not one sequence's fault (those are caught closer): without knowing whose
                    # state is sound, all fail and the next request starts clean.
                    logger.exception("engine step failed")
                    self._fail_all(_internal_error())
                self._progress = time.monotonic()
        finally:
            self.close_intake()
            self._fail_all(Failed("the engine has stopped", shutdown=True))

    def _take_orders(self) -> bool:
        """Wait for work, then move what callers asked for into engine state; False to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._live or self._stopping)
            arrived, self._inbox = self._inbox, deque()
            cancelled, self._cancelled = self._cancelled, set()
            abort, self._abort = self._abort, None
            stopping = self._stopping
        for sequence in arrived:
            self.scheduler.add(sequence)
        if abort is not None:
            self._fail_all(Failed(abort, shutdown=True))
        for request_id in cancelled:
            if found := self._live.get(request_id):
                self._finish(found, "cancelled")
        return not stopping

    def step(self) -> None:
        """One turn: a token for every decoding sequence and some prompt, in one pass."""
        step = self.scheduler.schedule()
        works: list[Work] = []
        jobs: list[tuple[Sequence, Callable[[Tensor], None]]] = []
        for sequence in step.decodes:
            if self._wanted(sequence):
                works.append(Work(sequence.cache, sequence.output_ids[-1:]))
                jobs.append((sequence, partial(self._decoded, sequence)))
        for chunk in step.prefills:
            sequence = chunk.sequence
            if not self._wanted(sequence):
                continue
            if sequence.cache is None:
                sequence.cache = self.runner.new_cache()
            ids = sequence.request.prompt_ids[chunk.start : chunk.end]
            scores = sequence.request.sampling.scores_prompt
            works.append(Work(sequence.cache, ids, all_logits=scores))
            jobs.append((sequence, partial(self._prefilled, chunk)))
        if not works:
            return
        for (sequence, job), result in zip(jobs, self.runner.run(works), strict=True):
            self._guarded(sequence, partial(_proceed, job, result))

    def _wanted(self, sequence: Sequence) -> bool:
        return not sequence.done and sequence.request.id not in self._cancelled

    def _guarded(self, sequence: Sequence, work: Callable[[], None]) -> None:
        """Run one sequence's work; what it raises is that sequence's end and no one else's."""
        if not self._wanted(sequence):
            return
        try:
            work()
        except QuantkitError as error:
            logger.error("request %s failed: %s", sequence.request.id, error)
            self._end(sequence, Failed(str(error)), "error")
        except Exception:
            logger.exception("request %s failed", sequence.request.id)
            self._end(sequence, _internal_error(), "error")

    def _prefilled(self, chunk: PrefillChunk, logits: Tensor) -> None:
        sequence = chunk.sequence
        request = sequence.request
        scores = request.sampling.scores_prompt
        sequence.prefilled = chunk.end
        self.metrics.prompt_tokens.inc(chunk.end - chunk.start)
        if scores:
            self._score_prompt(chunk, logits)
        if sequence.prompt_left:
            return
        if scores:
            self._emit(sequence, PromptScored(tuple(sequence.prompt_logprobs)))
        if request.sampling.max_tokens == 0:
            self._finish(sequence, "length")
        else:
            self._choose(sequence, logits[-1])

    def _score_prompt(self, chunk: PrefillChunk, logits: Tensor) -> None:
        """Row i of a chunk predicts prompt token ``start + i + 1``; the very last row none."""
        prompt, sampling = chunk.sequence.request.prompt_ids, chunk.sequence.request.sampling
        if chunk.start == 0:
            chunk.sequence.prompt_logprobs.append(TokenLogprob(prompt[0], None))
        targets = list(prompt[chunk.start + 1 : chunk.end + 1])
        chunk.sequence.prompt_logprobs += sampler.score(
            logits[: len(targets)], targets, sampling.logprobs or 0
        )

    def _decoded(self, sequence: Sequence, logits: Tensor) -> None:
        self._choose(sequence, logits[-1])

    def _choose(self, sequence: Sequence, logits: Tensor) -> None:
        """Sample a token from ``logits`` [vocab], emit it, and end the request if it is over."""
        request, sampling = sequence.request, sequence.request.sampling
        if sequence.generator is None:
            sequence.generator = sampler.make_generator(sampling.seed, logits.device)
        if sequence.detokenizer is None:
            sequence.detokenizer = Detokenizer(
                self.runtime.tokenizer, request.prompt_ids, sampling.stop
            )
            self.metrics.ttft.observe(time.monotonic() - request.arrival)
        token = sampler.sample(logits, sampling, sequence.generator)
        logprob = None
        if sampling.logprobs is not None:
            logprob = sampler.score(logits[None], [token], sampling.logprobs)[0]
        sequence.output_ids.append(token)
        self.metrics.generated_tokens.inc()
        text = sequence.detokenizer.push(token)
        self._emit(sequence, TokenEvent(token, text, logprob))
        ended = token in self._eos and not sampling.ignore_eos
        if ended or sequence.detokenizer.stopped:
            self._finish(sequence, "stop")
        elif len(sequence.output_ids) == sampling.max_tokens:
            self._finish(sequence, "length")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        rest = sequence.detokenizer.finish() if sequence.detokenizer else ""
        event = Finished(reason, rest, sequence.prefilled, len(sequence.output_ids))
        self._end(sequence, event, reason)

    def _fail_all(self, event: Failed) -> None:
        for sequence in list(self._live.values()):
            self._end(sequence, event, "aborted" if event.shutdown else "error")

    def _end(self, sequence: Sequence, event: Finished | Failed, outcome: str) -> None:
        """The only place where a sequence ends: free everything, then say so, once."""
        if sequence.done:
            return
        sequence.done = True
        self.scheduler.remove(sequence)
        if sequence.cache is not None:
            self.runner.release(sequence.cache)
        sequence.cache = sequence.generator = sequence.detokenizer = None
        self.metrics.requests.labels(outcome).inc()
        with self._wake:
            # Under the lock, so that `drain` returns only after the last event went out.
            self._live.pop(sequence.request.id, None)
            self._emit(sequence, event)
            self._wake.notify_all()

    def _emit(self, sequence: Sequence, event: Event) -> None:
        try:
            sequence.sink(event)
        except Exception:
            # The reader is gone (its event loop has closed): nobody is left to tell.
            logger.warning("request %s: nobody reads its events", sequence.request.id)
            self.cancel(sequence.request.id)

    def _kv_bytes(self) -> float:
        caches = (sequence.cache for sequence in list(self.scheduler.running))
        return sum(self.runner.nbytes(cache) for cache in caches if cache is not None)

    def _make_metrics(self) -> Metrics:
        metrics = Metrics()
        metrics.gauge("requests_running", "Requests admitted.", lambda: self.running)
        metrics.gauge("requests_queued", "Requests waiting for admission.", lambda: self.queued)
        metrics.gauge("kv_reserved_tokens", "Cache tokens reserved.", lambda: self.budget.used)
        metrics.gauge("kv_total_tokens", "Cache tokens there are.", lambda: self.budget.total)
        metrics.gauge("kv_bytes", "Bytes of KV cache held.", self._kv_bytes)
        return metrics


def _proceed(job: Callable[[Tensor], None], result: Tensor | Exception) -> None:
    if isinstance(result, Exception):
        raise result
    job(result)


def _eos_ids(runtime: Runtime) -> frozenset[int]:
    """Every id that ends a text, as generation config and tokenizer name them."""
    config = getattr(runtime.model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(int(i) for i in (*listed, runtime.tokenizer.eos_token_id) if i is not None)


def _internal_error() -> Failed:
    """What a client may know of a bug or a lack of memory: the log has the rest."""
    return Failed("internal error while generating; the server's log has the details")
