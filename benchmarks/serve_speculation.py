"""What guesses and shared beginnings save on this machine.

    python -m benchmarks.serve_speculation CKPT [--draft CKPT] [--rounds 5] [--threads 1]
        [--clock wall|cpu] [--prompts N] [--new-tokens N] [--only edit|extract|chat|prefix]
        [-o FILE] [--json]

Four comparisons, each interleaved round by round, ratios of medians:

    edit         a text repeated, and repeated with some words changed: with guesses against
                 without. The answers are forced, because a small model does not copy: each token's
                 logit is raised before it is chosen. Passes, guesses and everything else are as
                 they are.
    extract      answers of JSON whose values are clauses of the prompt; forced, too.
    chat         what the model itself says to short questions, with guesses against without;
                 greedy, and sampled at temperature 0.8.
    prefix       time to the first token behind 1,024 tokens that were read before, against the
                 same prompt read for the first time.

Answers with and without guesses are compared token by token before anything is timed. With
``--clock cpu``, all is timed, and guesses are judged, in seconds of the engine's thread: for
machines where other processes run, with one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from quantkit.evals.evaluate import cpu_model
from quantkit.machine import machine_facts
from quantkit.models.load import load_runtime
from quantkit.models.runtime import Runtime
from quantkit.serve.engine import Engine, EngineConfig
from quantkit.serve.events import Event, Failed, Finished, TokenEvent
from quantkit.serve.request import Request, SamplingParams, Sequence
from quantkit.serve.speculation import SpeculativeConfig

PARAGRAPHS = [
    "The harbour office opens at six on weekdays and at eight on Saturdays. Boats longer than nine "
    "metres pay a deposit of forty crowns, which is returned when the berth is left clean. Water "
    "and electricity are included, laundry is not. Dogs are welcome on the piers but not in the "
    "kitchen of the club house, and nobody may swim between the red buoys.",
    "In the second test the pump ran for eleven hours without a fault. The temperature of the "
    "bearing rose to sixty-one degrees and stayed there, well below the limit of seventy-five. "
    "After the test we found a fine grey dust on the filter, which is graphite by all we know. "
    "We recommend to change the seal of the second stage before the third test begins.",
    "Our library lends books for four weeks. A loan can be extended twice, unless another reader "
    "has asked for the book. Children under twelve need the signature of a parent. Maps and "
    "newspapers are read in the house. Whoever loses a book pays for a new copy and a fee of five "
    "crowns, and whoever finds a lost one is given a coffee in the hall.",
]
EDITS = [("The", "This"), ("and", "as well as"), ("forty", "fifty"), ("four", "six")]
#: Key → the clause of the paragraph that is its value, for each paragraph.
EXTRACTS = [
    {
        "opening_hours": "opens at six on weekdays and at eight on Saturdays",
        "deposit": "Boats longer than nine metres pay a deposit of forty crowns",
        "refund": "returned when the berth is left clean",
        "included": "Water and electricity are included, laundry is not",
        "forbidden": "nobody may swim between the red buoys",
    },
    {
        "duration": "the pump ran for eleven hours without a fault",
        "temperature": "rose to sixty-one degrees and stayed there",
        "limit": "well below the limit of seventy-five",
        "finding": "a fine grey dust on the filter, which is graphite by all we know",
        "advice": "change the seal of the second stage before the third test begins",
    },
    {
        "period": "lends books for four weeks",
        "extension": "A loan can be extended twice, unless another reader has asked for the book",
        "children": "Children under twelve need the signature of a parent",
        "not_lent": "Maps and newspapers are read in the house",
        "loss": "pays for a new copy and a fee of five crowns",
    },
]
QUESTIONS = [
    "What is the capital of Norway, and what is it known for?",
    "Write a short poem about a lighthouse.",
    "Explain to a child why the sky is blue.",
    "Give me three ideas for a vegetarian dinner.",
    "How does a bicycle stay upright?",
    "Write an e-mail that asks a landlord to repair a heater.",
    "What should I look at when I buy a used car?",
    "Tell me about the history of paper.",
]


Clock = Callable[[], float]


@dataclass(frozen=True)
class Setting:
    """What is measured, and how thoroughly."""

    runtime: Runtime
    draft: Runtime | None
    rounds: int
    clock: Clock
    prompts: int
    new_tokens: int


@dataclass
class Sink:
    """A request's events with their times."""

    clock: Clock
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    over: bool = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, Failed):
            raise SystemExit(f"a request failed: {event.message}")
        if isinstance(event, TokenEvent):
            self.tokens.append(event.token_id)
            self.times.append(self.clock())
        self.over = isinstance(event, Finished)


@dataclass(frozen=True)
class Run:
    """Answers of an engine to some requests, one after the other or side by side."""

    tokens: list[list[int]]
    seconds: float
    ttft: list[float]


def run(engine: Engine, requests: list[Request], together: int) -> Run:
    """Without a thread, so that nothing but the steps is timed; decoding alone counts in
    ``seconds``."""
    clock = engine.worker.clock
    sinks = []
    seconds, ttft = 0.0, []
    for start in range(0, len(requests), together):
        group = [Sink(clock) for _ in requests[start : start + together]]
        begun = clock()
        for request, sink in zip(requests[start : start + together], group, strict=True):
            engine.submit(request, sink)
        while not all(sink.over for sink in group):
            engine._take_orders()
            engine.step()
        seconds += clock() - max(sink.times[0] for sink in group)
        ttft += [sink.times[0] - begun for sink in group]
        sinks += group
    return Run([sink.tokens for sink in sinks], seconds, ttft)


def open_engine(setting: Setting, *, guesses: bool) -> Engine:
    how = SpeculativeConfig() if guesses else None
    config = EngineConfig(max_context=2048, speculative_config=how)
    engine = Engine(setting.runtime, config, draft=setting.draft if guesses else None)
    engine._accepting = True
    engine.worker.clock = setting.clock
    if engine.speculator is not None:
        engine.speculator.clock = setting.clock
        if engine.speculator.model is not None:
            engine.speculator.model.clock = setting.clock
    return engine


def force(engine: Engine, answers: dict[str, list[int]]) -> None:
    """Make an engine say given tokens, by raising their logits."""
    begin = engine.worker.begin

    def forced(sequence: Sequence):
        answer, wanted = begin(sequence), iter(answers[sequence.request.id.partition("/")[0]])
        choose = answer.choose

        def chosen(row: torch.Tensor) -> TokenEvent:
            row[next(wanted)] += 1000.0
            return choose(row)

        answer.choose = chosen  # type: ignore[method-assign]
        answer.greedy = False  # not by logits that it never saw
        return answer

    engine.worker.begin = forced


def chat(runtime: Runtime, text: str) -> tuple[int, ...]:
    return tuple(
        runtime.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
    )


def compare(
    engines: tuple[Engine, Engine],
    make: Callable[[str], list[Request]],
    rounds: int,
    together: int,
) -> dict[str, float]:
    """Seconds of decoding without guesses over those with, and what became of the guesses."""
    plain, guessed = (run(engine, make(f"/w{i}"), together) for i, engine in enumerate(engines))
    if plain.tokens != guessed.tokens:
        raise SystemExit("answers differ with guesses")
    seconds: tuple[list[float], list[float]] = ([], [])
    counters = engines[1].counters
    before = (counters.drafts, counters.draft_tokens, counters.accepted_tokens)
    for number in range(rounds):
        for side in (0, 1) if number % 2 else (1, 0):
            seconds[side].append(run(engines[side], make(f"/{number}"), together).seconds)
    after = (counters.drafts, counters.draft_tokens, counters.accepted_tokens)
    drafts, proposed, accepted = (b - a for a, b in zip(before, after, strict=True))
    ratios = sorted(a / b for a, b in zip(*seconds, strict=True))
    tokens = sum(map(len, plain.tokens))
    return {
        "speedup": round(median(seconds[0]) / median(seconds[1]), 3),
        "lowest": round(ratios[0], 3),
        "highest": round(ratios[-1], 3),
        "tok_s_without": round(tokens / median(seconds[0]), 1),
        "tok_s_with": round(tokens / median(seconds[1]), 1),
        "accepted_length": round(1 + accepted / drafts, 2) if drafts else 1.0,
        "accepted_share": round(accepted / proposed, 3) if proposed else 0.0,
        "guessed_share_of_tokens": round(proposed / (rounds * tokens), 3),
    }


#: Name → task, text and answer.
Quotes = dict[str, tuple[str, str, str]]


def edits() -> Quotes:
    """Every paragraph as it is, and with some words changed."""
    found: Quotes = {}
    for i, paragraph in enumerate(PARAGRAPHS):
        edited = paragraph
        for old, new in EDITS:
            edited = edited.replace(f" {old} ", f" {new} ")
        found[f"copy{i}"] = ("Repeat this text word for word.", paragraph, paragraph)
        found[f"edit{i}"] = ("Correct this text where needed.", paragraph, edited)
    return found


def extracts() -> Quotes:
    """Clauses of every paragraph, by key."""
    return {
        f"extract{i}": (
            f"Give these as JSON, in the words of the text: {', '.join(wanted)}.",
            paragraph,
            json.dumps(wanted, indent=1),
        )
        for i, (paragraph, wanted) in enumerate(zip(PARAGRAPHS, EXTRACTS, strict=True))
    }


def measure_quotes(setting: Setting, quotes: Quotes, together: int) -> dict[str, float]:
    runtime = setting.runtime
    chosen = dict(list(quotes.items())[: setting.prompts])
    prompts = {name: chat(runtime, f"{task}\n\n{text}") for name, (task, text, _) in chosen.items()}
    answers = {name: runtime.tokenizer.encode(said) for name, (_, _, said) in chosen.items()}
    engines = (open_engine(setting, guesses=False), open_engine(setting, guesses=True))
    for engine in engines:
        force(engine, answers)

    def make(suffix: str) -> list[Request]:
        return [
            Request(
                name + suffix,
                ids,
                SamplingParams(temperature=0.0, max_tokens=len(answers[name]), ignore_eos=True),
            )
            for name, ids in prompts.items()
        ]

    return compare(engines, make, setting.rounds, together)


def measure_chat(setting: Setting, together: int, temperature: float) -> dict[str, float]:
    prompts = [chat(setting.runtime, question) for question in QUESTIONS[: setting.prompts]]
    engines = (open_engine(setting, guesses=False), open_engine(setting, guesses=True))

    def make(suffix: str) -> list[Request]:
        sampling = [
            SamplingParams(
                temperature=temperature, top_p=0.95, seed=i, max_tokens=setting.new_tokens
            )
            for i in range(len(prompts))
        ]
        return [
            Request(f"{i}{suffix}", ids, params)
            for i, (ids, params) in enumerate(zip(prompts, sampling, strict=True))
        ]

    return compare(engines, make, setting.rounds, together)


def measure_prefix(setting: Setting) -> dict[str, float]:
    engine = open_engine(setting, guesses=False)
    words = setting.runtime.tokenizer.encode(" ".join(PARAGRAPHS))
    sampling = SamplingParams(temperature=0.0, max_tokens=1)
    cold: list[float] = []
    warm: list[float] = []
    for number in range(setting.rounds + 1):
        shared = (words * 10)[number : number + 1024]
        for kind, times in (("cold", cold), ("warm", warm)):
            question = words[7 * number : 7 * number + 24]
            ids = (*shared, *(question if kind == "cold" else reversed(question)))
            [seconds] = run(engine, [Request(f"{kind}{number}", ids, sampling)], 1).ttft
            if number:  # the first round warms up
                times.append(seconds)
    return {
        "speedup": round(median(cold) / median(warm), 2),
        "cold_ms": round(1000 * median(cold), 1),
        "warm_ms": round(1000 * median(warm), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--draft")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--prompts", type=int, default=8, help="at most, of each comparison")
    parser.add_argument("--new-tokens", type=int, default=160, help="of an answer in chat")
    parser.add_argument("--only", choices=("edit", "extract", "chat", "prefix"))
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runtime = load_runtime(options.checkpoint)
    draft = load_runtime(options.draft) if options.draft else None
    clock = time.thread_time if options.clock == "cpu" else time.perf_counter
    rounds = options.rounds
    setting = Setting(runtime, draft, rounds, clock, options.prompts, options.new_tokens)
    parts: dict[str, Callable[[], object]] = {
        "edit": lambda: {n: measure_quotes(setting, edits(), n) for n in (1, 6)},
        "extract": lambda: {n: measure_quotes(setting, extracts(), n) for n in (1, 3)},
        "chat": lambda: {
            f"{n} at {t}": measure_chat(setting, n, t) for n, t in ((1, 0.0), (1, 0.8), (8, 0.0))
        },
        "prefix": lambda: measure_prefix(setting),
    }
    found: dict[str, object] = {
        "model": runtime.name,
        "draft": draft.name if draft else None,
        "kernels": runtime.fingerprint["kernels"],
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), **machine_facts()},
        "threads": options.threads,
        "rounds": rounds,
        "clock": options.clock,
    }
    for name, part in parts.items():
        if options.only in (None, name):
            found[name] = part()
            if not options.json:
                print(name, json.dumps(found[name], indent=1), flush=True)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    if options.json:
        print(json.dumps(found))
    else:
        print(
            {
                key: found[key]
                for key in ("model", "draft", "kernels", "machine", "threads", "clock")
            }
        )


if __name__ == "__main__":
    main()
