"""The engine: one thread that owns the model and every running sequence.

``step()`` is schedule → run → emit. Callers on other threads only append to an inbox
(`submit`, `cancel`); all state behind it is touched by the engine thread alone, so there are no
locks around it. Invariants, which the tests hold:

- every submitted request gets exactly one terminal event (`Finished` or `Failed`);
- an exception while a sequence runs fails that sequence and nobody else;
- when nothing is live, no KV cache is reserved and none is held.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from quantkit.errors import QuantkitError
from quantkit.models.kv_dtype import with_kv_dtype
from quantkit.models.page_pool import pages_for
from quantkit.ops.page_store import PAGE_TOKENS
from quantkit.serve.answer import Answer
from quantkit.serve.counters import Counters
from quantkit.serve.events import Event, Failed, Finished, FinishReason, internal_error
from quantkit.serve.kv_cache import Capacity, plan_capacity, token_bytes
from quantkit.serve.memory import make_memory
from quantkit.serve.metrics import watch
from quantkit.serve.outbox import Outbox
from quantkit.serve.policy.order import Policy
from quantkit.serve.request import ContextOverflowError, Request, RequestError, Sequence, Sink
from quantkit.serve.runner import make_runner
from quantkit.serve.scheduler import Scheduler, no_guesses
from quantkit.serve.speculation import SpeculativeConfig, make_speculator
from quantkit.serve.stream import EventStream
from quantkit.serve.structured import GrammarCompiler
from quantkit.serve.transcript import Transcript
from quantkit.serve.worker import Worker

if TYPE_CHECKING:
    from quantkit.models.runtime import Runtime

logger = logging.getLogger(__name__)

IDLE_SECONDS = 0.005


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
        kv_cache_dtype: "auto", "fp32", "bf16", "fp8" or "int8"; all but the first only in the
            native decoder. The 8-bit types give each token a scale of its own.
        kv_cache_tokens: tokens of all requests together; None is what memory allows and
            ``max_sequences`` requests can use.
        enable_prefix_caching: texts that begin alike share keys and values; only in the native
            decoder, where that changes no bit of any answer.
        speculative_config: guess tokens and check several at once; None does not, unless there
            is a draft model. Only in the native decoder, where that changes no token of any answer.
    """

    max_sequences: int = 16
    max_context: int | None = None
    prefill_chunk: int = 256
    max_queue: int = 1024
    stall_seconds: float = 120.0
    kv_cache_dtype: str = "auto"
    kv_cache_tokens: int | None = None
    enable_prefix_caching: bool = True
    speculative_config: SpeculativeConfig | None = None


class Engine:
    """Runs requests on a `Runtime`. Use `start`, then `submit` or `stream`, then `stop`.

    Args:
        runtime: the model.
        config: limits.
        policy: who comes first; by default who came first.
        draft: a smaller model with the same tokenizer, which guesses what the model will say.

    Raises:
        UsageError: the limits do not fit the model, the memory or each other, or the draft does
            not fit the model.
    """

    def __init__(
        self,
        runtime: Runtime,
        config: EngineConfig | None = None,
        policy: Policy | None = None,
        draft: Runtime | None = None,
    ) -> None:
        self.config = config = config or EngineConfig()
        self.runtime = runtime = with_kv_dtype(runtime, config.kv_cache_dtype)
        if draft is not None:
            draft = with_kv_dtype(draft, config.kv_cache_dtype)
        self.counters = Counters()
        self.capacity = plan_capacity(
            runtime.model,
            max_context=config.max_context,
            max_sequences=config.max_sequences,
            token_bytes=token_bytes([runtime, *([draft] if draft else [])]),
            kv_tokens=config.kv_cache_tokens,
        )
        kv_tokens = self.capacity.kv_tokens
        if runtime.decoder is not None:  # whole pages, and always enough for the longest request
            least = pages_for(self.capacity.max_context)
            kv_tokens = max(kv_tokens // PAGE_TOKENS, least) * PAGE_TOKENS
        self.runner = make_runner(runtime, kv_tokens)
        self.memory = make_memory(
            self.runner, kv_tokens, self.counters, prefix_caching=config.enable_prefix_caching
        )
        capacity = Capacity(self.capacity.max_context, kv_tokens)
        self.speculator = make_speculator(
            config.speculative_config, runtime, draft, capacity, self.counters
        )
        self.scheduler = Scheduler(
            max_sequences=config.max_sequences,
            prefill_chunk=config.prefill_chunk,
            memory=self.memory,
            policy=policy,
            counters=self.counters,
            propose=no_guesses if self.speculator is None else self.speculator.propose,
        )
        self.metrics = watch(self)
        self.worker = Worker(
            self,
            self.scheduler,
            self.runner,
            self.memory,
            self.metrics,
            self._begin,
            self.speculator,
        )
        self._eos = runtime.eos_ids
        self._vocab = int(runtime.model.config.get_text_config().vocab_size)
        self.outbox = Outbox()
        self.flush = self.outbox.flush
        self.grammars = GrammarCompiler(runtime.tokenizer, self._vocab)
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
        """Raise `RequestError` if the request can never run, whatever its grammar is."""
        if not request.prompt_ids:
            raise RequestError("prompt: is empty", param="prompt")
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= self._vocab:
            raise RequestError(
                f"prompt: token ids must lie between 0 and {self._vocab - 1}", param="prompt"
            )
        named = request.sampling.token_ids
        if named and not 0 <= min(named) <= max(named) < self._vocab:
            raise RequestError(
                f"logit_bias, stop_token_ids: token ids must lie between 0 and {self._vocab - 1}",
                param="logit_bias" if request.sampling.logit_bias else "stop_token_ids",
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
        request = self.grammars.attach(request)
        transcript = self.transcript(request)

        def told(event: Event) -> None:
            if (written := transcript(event)) is not None:
                sink(written)

        self.enqueue(request, told)

    def transcript(self, request: Request) -> Transcript:
        """What adds the text to the events that `enqueue` gives."""
        return Transcript(self.runtime.tokenizer, request, partial(self.cancel, request.id))

    def enqueue(self, request: Request, sink: Sink) -> None:
        """`submit` for a request that passed `check` and has its grammar: takes no time.

        Events come without their text, but for those of requests with stop strings.
        """
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
        for request in requests:
            self.check(request)
        return EventStream(self, [self.grammars.attach(request) for request in requests])

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
                    if not self.step():  # nobody may start yet, or all are cancelled
                        with self._wake:
                            self._wake.wait(IDLE_SECONDS)
                except Exception:
                    # Not one sequence's fault (those are caught closer): without knowing whose
                    # state is sound, all fail and the next request starts clean.
                    logger.exception("engine step failed")
                    self._fail_all(internal_error())
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
            if not sequence.done:  # one that came while all were failed has had its end
                self.scheduler.add(sequence)
        if abort is not None:
            self._fail_all(Failed(abort, shutdown=True))
        for request_id in cancelled:
            if found := self._live.get(request_id):
                self._cancel(found)
        return not stopping

    def step(self) -> bool:
        """One turn: a token for every decoding sequence and some prompt, in one pass; False if
        nobody could run."""
        return self.worker.step(time.monotonic())

    def wanted(self, sequence: Sequence) -> bool:
        """It is neither over nor cancelled."""
        return not sequence.done and sequence.request.id not in self._cancelled

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a request as it was asked to."""
        event = Finished(
            reason,
            sequence.answer.rest() if sequence.answer else "",
            prompt_tokens=sequence.prompt_read,
            completion_tokens=sequence.output_tokens,
            cached_tokens=sequence.cached_tokens,
        )
        self._end(sequence, event, reason)

    def _cancel(self, sequence: Sequence) -> None:
        try:
            self.finish(sequence, "cancelled")
        except Exception:  # its text cannot be finished
            logger.exception("request %s failed", sequence.request.id)
            self.fail(sequence, internal_error())

    def fail(self, sequence: Sequence, event: Failed) -> None:
        """End a request that cannot be finished; nothing it computed is used again."""
        self._end(sequence, event, "error")

    def _fail_all(self, event: Failed) -> None:
        outcome = "aborted" if event.shutdown else "error"
        with contextlib.ExitStack() as ends:  # each of them, whatever another one raises
            for sequence in reversed(list(self._live.values())):
                ends.callback(self._end, sequence, event, outcome)

    def _end(self, sequence: Sequence, event: Finished | Failed, outcome: str) -> None:
        """The only place where a sequence ends: free everything, then say so, once."""
        if sequence.done:
            return
        sequence.done = True
        sequence.answer = None
        with contextlib.ExitStack() as steps:  # the last first; each, whatever another one raises
            steps.callback(self._say, sequence, event)  # somebody waits for it
            steps.callback(lambda: self.metrics.requests.labels(outcome).inc())
            if self.speculator is not None:
                steps.callback(self.speculator.forget, sequence)
            steps.callback(self.scheduler.remove, sequence, sound=outcome != "error")

    def _say(self, sequence: Sequence, event: Finished | Failed) -> None:
        with self._wake:
            # Under the lock, so that `drain` returns only after the last event went out.
            self._live.pop(sequence.request.id, None)
            # Or it would stop the next request of that name.
            self._cancelled.discard(sequence.request.id)
            self._wake.notify_all()
            self.emit(sequence, event)
            self.flush()

    def emit(self, sequence: Sequence, event: Event) -> None:
        """Pass an event on to whoever submitted the request."""
        try:
            sequence.sink(event)
        except Exception:
            # It gets its end and no more. Loops that have closed show in the outbox.
            logger.warning("request %s: nobody takes its events", sequence.request.id)
            self.cancel(sequence.request.id)

    def _begin(self, sequence: Sequence) -> Answer:
        request, runtime = sequence.request, self.runtime
        end_ids, grammar = request.sampling.end_ids(self._eos), request.grammar
        constraint = None if grammar is None else grammar.constraint(end_ids)
        return Answer(request, runtime.tokenizer, end_ids, self._vocab, runtime.device, constraint)
