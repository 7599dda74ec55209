"""quantkit's server beside others on one machine: the same prompts, in turn, over HTTP.

    python -m benchmarks.vs_servers MODEL --ckpt CKPT --text held_out.txt \\
        --llama-server BUILD/bin/llama-server --gguf m-Q4_0.gguf \\
        --vllm-python ENV/bin/python --vllm-model CKPT \\
        --transformers-python ENV/bin/python \\
        --concurrency 1 4 8 16 --rounds 5 --threads 2 -o results.json

MODEL is the original: its tokenizer cuts the text into prompts, which are sent as token ids. CKPT
is served by ``quantkit serve``. Each peer is optional, and ``--server NAME=URL`` takes one that
runs already, if it takes prompts of token ids and answers of a fixed length. ``transformers
serve`` runs MODEL; it takes text alone, so that every prompt is then one whose text is read as the
same tokens. All of them answer greedily, past the end of text, and a server that reads or writes
another number of tokens than was asked ends the benchmark.

All servers stand in memory, started with equal numbers of threads and slots; only the one whose
turn it is runs, the others are stopped (SIGSTOP). In a round each of them is asked the same prompts
at each concurrency (a closed loop), one server right after the other, and every other round runs
backwards. Each figure is the median over rounds, a ratio the median of the ratios within rounds.
Nobody guesses tokens unless told to: greedy answers that go past the end of text repeat themselves.

With ``--vllm-search`` vLLM is started in every way of `vllm_configs.CONFIGS` first, alone, and
loaded for a short time; the one with the highest geometric mean of tokens a second over all
concurrencies is measured, in both phases. ``--vllm-config NAME='VARIABLE=x --flag y'`` adds a way
or, alone, is the only one.

Two phases, each with servers of its own:

    off   prompts have nothing in common, and prefix caches are switched off
    on    three quarters of a prompt are shared by those of its row, and prefix caches are on
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import hardware
from benchmarks.servers import (
    READY_SECONDS,
    llama_version,
    schemes_of,
    start_llama,
    start_vllm,
)
from benchmarks.systems import gguf_types, named
from benchmarks.transformers_serve import ARGUMENTS, body_of, start_transformers, survives, version
from benchmarks.vllm_configs import CONFIGS, Config, Trial, best, read_config
from quantkit.engines.artifact import read_artifact
from quantkit.engines.process import EngineProcess
from quantkit.errors import QuantkitError
from quantkit.evals.endpoint import EndpointConfig, connect
from quantkit.loadtest.answer import Answer
from quantkit.loadtest.ask import Ask
from quantkit.loadtest.client import Body, Client
from quantkit.loadtest.drive import closed_loop
from quantkit.loadtest.row import Row, make_row
from quantkit.loadtest.server import serving
from quantkit.loadtest.tiers import LoadTier, Slo

SHARED = 0.75
EVERYBODY = LoadTier("all", 1.0, Slo())
PHASES = ("off", "on")

#: Column → how a row's figure is read.
COLUMNS: dict[str, Callable[[Row], float]] = {
    "tok/s": lambda row: row.total.output_tokens_per_second,
    "TTFT ms": lambda row: 1e3 * row.total.ttft.p50,
    "TPOT ms": lambda row: 1e3 * row.total.tpot.p50,
}


@dataclass
class Peer:
    """A server under test; ``rows`` by phase and concurrency, one a round.

    ``schemes`` are those of its weights, "" where nobody can tell; ``config`` names the way that it
    was started in, where there are several; ``body`` is what it is sent, where that is its own.
    """

    name: str
    url: str
    process: EngineProcess | None
    model: str = ""
    schemes: str = ""
    version: str = ""
    config: str = ""
    body: Body | None = None
    rows: dict[tuple[str, int], list[Row]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Of its model, without the folder that it lies in."""
        return Path(self.model).name

    def wake(self, awake: bool) -> None:
        if self.process is not None:
            self.process.signal(signal.SIGCONT if awake else signal.SIGSTOP)


class Prompts:
    """Windows of a text, each used once: nothing that was sent before is in a cache.

    Args:
        model: folder of the tokenizer.
        text: the file.
        as_text: prompts survive being sent as text; tokens are skipped for it.
    """

    def __init__(self, model: Path, text: Path, as_text: bool = False) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.ids: list[int] = self.tokenizer.encode(text.read_text(encoding="utf-8"), verbose=False)
        self.as_text = as_text
        self.used = 0

    def take(self, tokens: int) -> tuple[int, ...]:
        """The next ``tokens`` of the text."""
        if self.used + tokens > len(self.ids):
            raise SystemExit(
                f"the text has {len(self.ids)} tokens, too few for all prompts; give more text, or "
                "fewer --rounds or --requests"
            )
        self.used += tokens
        return tuple(self.ids[self.used - tokens : self.used])

    def row(self, phase: str, count: int, prompt_tokens: int, output_tokens: int) -> list[Ask]:
        """The asks of one row."""
        shared = int(SHARED * prompt_tokens) if phase == "on" else 0
        begin = self.take(shared)
        return [
            Ask(None, EVERYBODY.name, self._prompt(begin, prompt_tokens - shared), output_tokens)
            for _ in range(count)
        ]

    def _prompt(self, begin: tuple[int, ...], tokens: int) -> tuple[int, ...]:
        while True:
            ids = begin + self.take(tokens)
            if not self.as_text or survives(self.tokenizer, ids):
                return ids
            self.used += 1 - tokens


@contextlib.contextmanager
def start_all(
    args: argparse.Namespace, phase: str, way: Config, prompts: Prompts
) -> Iterator[list[Peer]]:
    """Every server of a phase, stopped (SIGSTOP) but ready."""
    cached, slots = phase == "on", max(args.concurrency)
    context = args.prompt_tokens + args.output_tokens
    with contextlib.ExitStack() as stack:
        peers: list[Peer] = []

        def add(name: str, process: EngineProcess, **about: Any) -> None:
            print(f"{name} is ready", file=sys.stderr, flush=True)
            peers.append(Peer(name, process.url, process, **about))
            peers[-1].wake(False)
            # Stopped, it would not hear that it has to end.
            stack.callback(peers[-1].wake, True)

        if args.ckpt:
            given = ["--threads", str(args.threads), "--max-sequences", str(slots)]
            given += ["--speculative-tokens", str(args.speculative_tokens)]
            given += ["--kv-cache-dtype", args.kv_cache_dtype]
            given += [] if cached else ["--no-prefix-caching"]
            process = stack.enter_context(serving(str(args.ckpt), given))
            add("quantkit", process, schemes=schemes_of(read_artifact(str(args.ckpt))))
        if args.llama_server:
            process = stack.enter_context(start_llama(args, cached, slots, context))
            about = {"schemes": gguf_types(args.gguf), "version": llama_version(args.llama_server)}
            add("llama-server", process, **about)
        if args.vllm_python:
            artifact = read_artifact(str(args.vllm_model or args.ckpt))
            process = stack.enter_context(start_vllm(args, artifact, cached, slots, way))
            add("vllm", process, schemes=schemes_of(artifact), config=way.name)
        if args.transformers_python:
            python, way_name = args.transformers_python, args.transformers
            process, model = stack.enter_context(
                start_transformers(
                    python, args.model, ARGUMENTS[way_name], args.threads, READY_SECONDS
                )
            )
            about = {"model": model, "schemes": schemes_of(read_artifact(str(args.model)))}
            about |= {"version": version(python), "config": way_name}
            add("transformers", process, **about, body=body_of(prompts.tokenizer))
        peers += [Peer(name, url, None) for name, url in args.server]
        for peer in peers:
            if peer.model:
                continue
            peer.wake(True)
            found = connect(EndpointConfig(peer.url))
            peer.model, peer.version = Path(found.model).name, peer.version or found.server
            peer.wake(False)
        yield peers


def measure(peer: Peer, asks: Sequence[Ask], concurrency: int) -> Row:
    """One row of one server; what is not answered in full ends the benchmark.

    Raises:
        QuantkitError: with the server's name.
    """

    async def run() -> list[Answer]:
        async with Client(peer.url, peer.model, timeout=READY_SECONDS, body=peer.body) as client:
            return await closed_loop(client, asks, concurrency)

    peer.wake(True)
    try:
        answers = asyncio.run(run())
    finally:
        peer.wake(False)
    for answer in answers:
        if answer.fate != "done":
            raise QuantkitError(f"{peer.name}: a request was {answer.fate}: {answer.reason}")
    return make_row("closed", concurrency, answers, [EVERYBODY])


def search_vllm(args: argparse.Namespace, phase: str, prompts: Prompts) -> list[Trial]:
    """Start vLLM in each way, alone, and load it for a short time: two requests a client."""
    artifact = read_artifact(str(args.vllm_model or args.ckpt))
    lengths, most = (args.prompt_tokens, args.output_tokens), max(args.concurrency)
    warm_up = prompts.row(phase, most, *lengths)
    rows = {n: prompts.row(phase, 2 * n, *lengths) for n in args.concurrency}
    trials = []
    for way in args.vllm_ways:
        trial = Trial(way)
        trials.append(trial)
        try:
            with start_vllm(args, artifact, phase == "on", most, way) as process:
                peer = Peer("vllm", process.url, process)
                try:
                    peer.model = connect(EndpointConfig(peer.url)).model
                    measure(peer, warm_up, most)
                    for n, asks in rows.items():
                        trial.speeds[n] = COLUMNS["tok/s"](measure(peer, asks, n))
                finally:
                    peer.wake(True)  # stopped, it would not hear that it has to end
        except QuantkitError as error:
            trial.failure = str(error)
        told = trial.failure or ", ".join(f"x{n} {v:.1f}" for n, v in trial.speeds.items())
        print(f"vllm {way.name}: {told}", file=sys.stderr, flush=True)
    return trials


def choose_vllm(args: argparse.Namespace, prompts: Prompts) -> tuple[Config, list[Trial]]:
    """The way in which vLLM is measured, and what was tried to find it."""
    if len(args.vllm_ways) == 1:
        return args.vllm_ways[0], []
    trials = search_vllm(args, args.phase[0], prompts)
    return best(trials), trials


def measure_phase(
    args: argparse.Namespace, phase: str, prompts: Prompts, way: Config
) -> list[Peer]:
    """All rounds of a phase; one row a server ahead of them warms up and does not count."""
    with start_all(args, phase, way, prompts) as peers:
        if not peers:
            raise SystemExit("there is no server to measure: give --ckpt and peers")
        for peer in peers:
            most = max(args.concurrency)
            measure(peer, prompts.row(phase, most, args.prompt_tokens, args.output_tokens), most)
        for number in range(args.rounds):
            order = peers[::-1] if number % 2 else peers
            for concurrency in args.concurrency:
                count = max(args.requests, 2 * concurrency)
                asks = prompts.row(phase, count, args.prompt_tokens, args.output_tokens)
                for peer in order:
                    row = measure(peer, asks, concurrency)
                    peer.rows.setdefault((phase, concurrency), []).append(row)
                    print(
                        f"{phase} round {number + 1} {peer.name} x{concurrency}: "
                        f"{COLUMNS['tok/s'](row):.1f} tok/s",
                        file=sys.stderr,
                        flush=True,
                    )
        return peers


def figure(peer: Peer, phase: str, concurrency: int, column: str) -> float:
    """Median over rounds."""
    return statistics.median(map(COLUMNS[column], peer.rows[phase, concurrency]))


def ratio(ours: Peer, theirs: Peer, phase: str, concurrency: int, column: str) -> float | None:
    """Median over rounds of our figure over theirs in the same round; None if theirs is always 0:
    answers that come in one piece have no time per token."""
    pairs = zip(ours.rows[phase, concurrency], theirs.rows[phase, concurrency], strict=True)
    read = COLUMNS[column]
    found = [read(a) / read(b) for a, b in pairs if read(b)]
    return statistics.median(found) if found else None


def table(peers: Sequence[Peer], phase: str, concurrency: Sequence[int]) -> list[str]:
    """A line a server and its ratio to the first; a block of columns each concurrency."""
    width = max(len(peer.name) for peer in peers) + 8
    head = "".join(f"{f'x{n} {column}':>14}" for n in concurrency for column in COLUMNS)
    lines = [f"{f'prefix cache {phase}':{width + 4}}" + head]
    first = peers[0]
    for peer in peers:
        cells = [figure(peer, phase, n, column) for n in concurrency for column in COLUMNS]
        lines.append(f"{peer.name:{width + 4}}" + "".join(f"{value:14.1f}" for value in cells))
        if peer is not first:
            over = [ratio(first, peer, phase, n, column) for n in concurrency for column in COLUMNS]
            name = f"  {first.name} over it"
            cells_over = ["-" if value is None else f"{value:.2f}x" for value in over]
            lines.append(f"{name:{width + 4}}" + "".join(f"{cell:>14}" for cell in cells_over))
    return lines


def document(
    args: argparse.Namespace, phases: dict[str, list[Peer]], trials: Sequence[Trial] = ()
) -> dict[str, Any]:
    """Everything that was measured, round by round, and every way that vLLM was tried in."""
    settings = (
        "prompt_tokens",
        "output_tokens",
        "concurrency",
        "rounds",
        "requests",
        "threads",
        "kv_cache_dtype",
    )
    return {
        "hardware": hardware(args.threads),
        "settings": {name: getattr(args, name) for name in settings} | {"text": args.text.name},
        "vllm_search": [asdict(trial) for trial in trials],
        "phases": {
            phase: [
                {
                    "name": peer.name,
                    "model": peer.title,
                    "schemes": peer.schemes,
                    "version": peer.version,
                    "config": peer.config,
                    "rows": [
                        {"concurrency": n, "rounds": [asdict(row) for row in rows]}
                        for (_, n), rows in peer.rows.items()
                    ],
                    "ratios": {
                        str(n): {c: ratio(peers[0], peer, phase, n, c) for c in COLUMNS}
                        for n in args.concurrency
                    },
                }
                for peer in peers
            ]
            for phase, peers in phases.items()
        },
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the original: its tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="prompts are cut from it")
    parser.add_argument("--ckpt", type=Path, help="served by quantkit")
    parser.add_argument(
        "--speculative-tokens", type=int, default=0, help="that quantkit may guess a step"
    )
    parser.add_argument(
        "--kv-cache-dtype",
        default="auto",
        help="of quantkit's keys and values: its KL is told by `quantkit eval --kv-cache-dtype`",
    )
    parser.add_argument("--llama-server", type=Path, metavar="PATH")
    parser.add_argument("--gguf", type=Path, help="served by llama-server")
    parser.add_argument("--vllm-python", metavar="PATH", help="of the environment with vLLM")
    parser.add_argument("--vllm-model", type=Path, help="served by vLLM; by default --ckpt")
    parser.add_argument("--vllm-arg", action="append", default=[], metavar="ARG")
    parser.add_argument(
        "--vllm-search", action="store_true", help="try ways to start it, measure the fastest"
    )
    parser.add_argument(
        "--vllm-config", type=named, action="append", default=[], metavar="NAME=SETTINGS"
    )
    parser.add_argument("--vllm-cache-gb", type=int, default=2, help="its keys and values")
    parser.add_argument(
        "--transformers-python", metavar="PATH", help="of an environment with transformers[serving]"
    )
    parser.add_argument(
        "--transformers",
        choices=ARGUMENTS,
        default="continuous batching",
        help="how it runs requests",
    )
    parser.add_argument("--server", type=named, action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--phase", choices=PHASES, action="append", help="by default both")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=8, help="of a row, and two a client")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args(argv)
    if bool(args.llama_server) != bool(args.gguf):
        parser.error("--llama-server and --gguf belong together")
    if args.output_tokens < 2:
        parser.error("--output-tokens: a time per token needs 2")
    if args.vllm_python and not (args.vllm_model or args.ckpt):
        parser.error("--vllm-python: nothing to serve; give --vllm-model")
    if (args.vllm_search or args.vllm_config) and not args.vllm_python:
        parser.error("--vllm-search and --vllm-config are of --vllm-python")
    args.phase = args.phase or list(PHASES)
    ways = (CONFIGS if args.vllm_search else {}) | dict(args.vllm_config)
    try:
        args.vllm_ways = [read_config(n, text, args.threads) for n, text in ways.items()]
    except ValueError as error:
        parser.error(f"--vllm-config: {error}")
    args.vllm_ways = args.vllm_ways or [Config()]
    return args


def main() -> None:
    args = parse()
    prompts = Prompts(args.model, args.text, as_text=bool(args.transformers_python))
    phases: dict[str, list[Peer]] = {}
    try:
        way, trials = choose_vllm(args, prompts)
        for phase in args.phase:
            phases[phase] = measure_phase(args, phase, prompts, way)
            if args.output:
                found = document(args, phases, trials)
                args.output.write_text(json.dumps(found, indent=1) + "\n")
    except QuantkitError as error:
        raise SystemExit(str(error)) from error
    machine = hardware(args.threads)
    flags = " ".join(machine.get("flags", ()))
    print(
        f"{machine.get('cpu', '')} family {machine.get('family')} model {machine.get('model')}, "
        f"{machine.get('cores')} cores, {args.threads} threads; {flags}"
    )
    print(
        f"{args.prompt_tokens} prompt tokens, {args.output_tokens} new ones, {args.rounds} rounds; "
        "medians, latencies of the median request"
    )
    for phase, peers in phases.items():
        for peer in peers:
            print(
                f"{peer.name}: {peer.title} ({peer.schemes or 'schemes unknown'}), {peer.version}"
                + (f", {peer.config}" if peer.config else "")
            )
        print("\n".join(table(peers, phase, args.concurrency)))


if __name__ == "__main__":
    main()
