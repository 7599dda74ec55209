"""Latencies of two models side by side: the same prompts, in turn, through the server's engine.

A machine's speed drifts with its clock, its temperature and its other processes, by more than a
latency gate allows. So both models stand in memory, and each group of prompts is answered by one
right after the other; who begins changes every time. All answers have the same length, whatever
the models would say. The first round warms up and is not counted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError, UsageError
from quantkit.models.paged import pages_for
from quantkit.ops.page_store import PAGE_TOKENS
from quantkit.progress import Progress, silent
from quantkit.serve.engine import Engine, EngineConfig
from quantkit.serve.events import Event, Failed, Finished, TokenEvent
from quantkit.serve.request import Request, SamplingParams
from quantkit.timings import Timings

if TYPE_CHECKING:
    from quantkit.models.runtime import Runtime

#: A group that takes longer has hung.
TIMEOUT_SECONDS = 600.0

#: Token ids by prompt id.
Prompts = Mapping[str, Sequence[int]]


def measure_pair(
    candidate: Runtime,
    baseline: Runtime,
    prompts: tuple[Prompts, Prompts],
    *,
    new_tokens: int,
    concurrency: int,
    repeats: int,
    host: Mapping[str, Any],
    progress: Progress = silent,
) -> tuple[Timings, Timings]:
    """Time both models on the same prompts, interleaved.

    Args:
        candidate, baseline: the models, both in memory.
        prompts: the same prompts as each model's tokenizer reads them.
        new_tokens: length of every answer, at least 2: TPOT is over all but the first.
        concurrency: requests that arrive together and are answered side by side.
        repeats: rounds that count; one more goes ahead of them.
        host: what `quantkit.timings.HOST_KEYS` names, of this machine.
        progress: told of finished groups.

    Returns:
        Seconds of the candidate and of the baseline.

    Raises:
        UsageError: fewer than 2 new tokens, or prompts that do not fill groups of ``concurrency``.
        QuantkitError: a request failed.
    """
    names = list(prompts[0])
    if list(prompts[1]) != names:
        raise ValueError("both models must get the same prompts")
    if new_tokens < 2:
        raise UsageError(
            f"{new_tokens} new tokens leave no time per output token to measure",
            remedy="ask for 2 or more",
        )
    if not names or len(names) % concurrency:
        raise UsageError(
            f"{len(names)} prompts are no whole number of groups of {concurrency}, so that fewer "
            "requests would be in flight at the end",
            remedy=f"give {max(1, round(len(names) / concurrency)) * concurrency} prompts",
        )
    groups = [names[i : i + concurrency] for i in range(0, len(names), concurrency)]
    ttft: list[dict[str, list[float]]] = [{name: [] for name in names} for _ in prompts]
    tpot: list[dict[str, list[float]]] = [{name: [] for name in names} for _ in prompts]
    engines: list[Engine] = []
    try:
        for runtime, ids in zip((candidate, baseline), prompts, strict=True):
            config = _config(runtime, ids, new_tokens, concurrency)
            engines.append(Engine(runtime, config).start())
        for repeat in range(repeats + 1):
            for number, group in enumerate(groups):
                order = (0, 1) if (repeat + number) % 2 == 0 else (1, 0)
                for side in order:
                    asked = {name: prompts[side][name] for name in group}
                    for name, clock in _answer(engines[side], asked, new_tokens).items():
                        if repeat:
                            ttft[side][name].append(clock.ttft)
                            tpot[side][name].append(clock.tpot)
                progress(repeat * len(groups) + number + 1, (repeats + 1) * len(groups), "latency")
    finally:
        for engine in engines:
            engine.stop()
    ours, theirs = (
        Timings(host, concurrency, _frozen(ttft[side]), _frozen(tpot[side])) for side in (0, 1)
    )
    return ours, theirs


@dataclass
class _Clock:
    """The sink of one request: when its tokens came."""

    submitted: float = field(default_factory=time.perf_counter)
    tokens: list[float] = field(default_factory=list)
    failure: str | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        if isinstance(event, TokenEvent):
            self.tokens.append(time.perf_counter())
        elif isinstance(event, Failed):
            self.failure = event.message
        if isinstance(event, Finished | Failed):
            self.over.set()

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.submitted

    @property
    def tpot(self) -> float:
        return (self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1)


def _answer(engine: Engine, prompts: Prompts, new_tokens: int) -> dict[str, _Clock]:
    """Submit all prompts at once and wait for their answers."""
    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    requests = [Request(name, tuple(ids), sampling) for name, ids in prompts.items()]
    clocks = {}
    for request in requests:
        clocks[request.id] = _Clock()
        engine.submit(request, clocks[request.id])
    for name, clock in clocks.items():
        if not clock.over.wait(TIMEOUT_SECONDS):
            raise QuantkitError(f"prompt {name!r} was not answered in {TIMEOUT_SECONDS:.0f} s")
        if clock.failure is not None:
            raise QuantkitError(f"prompt {name!r}: {clock.failure}")
        if len(clock.tokens) != new_tokens:
            raise QuantkitError(
                f"prompt {name!r} got {len(clock.tokens)} tokens where {new_tokens} were asked"
            )
    return clocks


def _config(runtime: Runtime, prompts: Prompts, new_tokens: int, concurrency: int) -> EngineConfig:
    """Room for a whole group at once, in whole pages: a request that waits is not in flight.

    No prefix is shared: the prompts are the same in every round, and must be read in every round.
    """
    longest = max(map(len, prompts.values())) + new_tokens
    trained = int(runtime.model.config.get_text_config().max_position_embeddings)
    if longest > trained:
        raise UsageError(
            f"{longest} tokens of prompt and answer are more than the model's context of {trained}",
            remedy="lower --prompt-tokens or --new-tokens",
        )
    context = min(pages_for(longest) * PAGE_TOKENS, trained)
    return EngineConfig(max_sequences=concurrency, max_context=context, enable_prefix_caching=False)


def _frozen(times: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, ...]]:
    return {name: tuple(seconds) for name, seconds in times.items()}
