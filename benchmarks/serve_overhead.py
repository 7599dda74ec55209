"""What HTTP costs: `quantkit serve` beside `quantkit bench decode`, the same prompts and lengths.

    python -m benchmarks.serve_overhead CKPT [--batch 1 8] [--rounds 5] [--threads N] [-o FILE]
        [--stream-interval 1] [--limit 0.08]

Both are child processes with equal numbers of threads, and take turns: the server is stopped
(SIGSTOP) while the other runs, and every other round runs backwards. ``bench decode`` reads
``--batch`` prompts and decodes them side by side in the server's own loop. The server gets the same
prompts at once, as token ids, and streams answers of the same length, with neither prefix cache nor
guesses. Each turn warms up and takes the median of ``--repeats``. Two figures a turn:

    whole   seconds from the first byte of the requests to the last one of the answers, against
            reading all prompts and decoding all tokens
    step    seconds a decode step: between the first and the last token of the answer that began
            last, because all others are decoding by then

An overhead is the server's figure over the other one, less 1; over rounds, the median of the ratios
within rounds. The client, as cheap as can be, is this process, and the kernel's part of receiving
happens where the server sends: with as many threads as cores, both are in the overhead. With
``--limit``, exit code 1 where an overhead is above it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import signal
import socket
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoConfig

from benchmarks.command import run
from benchmarks.machine import hardware
from quantkit.engines.process import EngineProcess
from quantkit.loadtest.server import serving
from quantkit.serve.measure import random_prompts

FIGURES = ("whole", "step")

#: Bytes of an answer that the client is woken for.
GATHERED = 1 << 20


@dataclass(frozen=True)
class Turn:
    """Seconds of one turn of one side: see the figures above."""

    whole: float
    step: float


@dataclass(frozen=True)
class Round:
    """One turn of each, on as many prompts."""

    batch: int
    bench: Turn
    served: Turn

    def overhead(self, figure: str) -> float:
        """0.05 is 5 % longer over HTTP."""
        return getattr(self.served, figure) / getattr(self.bench, figure) - 1


def time_bench(options: argparse.Namespace, batch: int) -> tuple[Turn, dict[str, Any]]:
    """A turn of ``quantkit bench decode``, and what it says of itself.

    Raises:
        SystemExit: it fails, or measured something else.
    """
    asked = {
        "prompt_tokens": options.prompt_tokens,
        # An answer's first token comes out of its prompt's pass.
        "new_tokens": options.output_tokens - 1,
        "batch": batch,
        "repeats": options.repeats,
        "threads": options.threads,
    }
    command = [sys.executable, "-m", "quantkit.cli.main", "bench", "decode", options.checkpoint]
    for name, value in asked.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    said = json.loads(run([*command, "--json"]))
    if wrong := {name: said.get(name) for name in asked if said.get(name) != asked[name]}:
        raise SystemExit(f"bench decode: asked for {asked}, measured {wrong}")
    reading = batch * options.prompt_tokens / said["prefill_tok_s"]
    step = batch / said["decode_tok_s"]
    return Turn(reading + (options.output_tokens - 1) * step, step), said


@contextlib.contextmanager
def start_server(options: argparse.Namespace) -> Iterator[EngineProcess]:
    """``quantkit serve``, ready but stopped (SIGSTOP)."""
    given = ["--threads", str(options.threads), "--max-sequences", str(max(options.batch))]
    given += ["--no-prefix-caching", "--speculative-tokens", "0"]
    given += ["--stream-interval", str(options.stream_interval)]
    with serving(options.checkpoint, given) as process:
        process.signal(signal.SIGSTOP)
        try:
            yield process
        finally:
            process.signal(signal.SIGCONT)  # stopped, it would not hear that it has to end


def time_served(process: EngineProcess, prompts: Sequence[Sequence[int]], tokens: int) -> Turn:
    """One repeat over HTTP; the server runs."""

    async def together() -> list[list[float]]:
        return await asyncio.gather(*(stream(process.url, ids, tokens) for ids in prompts))

    begun = time.perf_counter()
    arrivals = asyncio.run(together())
    last_begun = max(arrivals, key=lambda times: times[0])
    return Turn(
        max(times[-1] for times in arrivals) - begun,
        (last_begun[-1] - last_begun[0]) / (tokens - 1),
    )


class Listener(asyncio.Protocol):
    """Sends a request, and keeps what comes with the time that it came.

    Behind the first token it lets the kernel gather what comes, and is woken by a megabyte or the
    answer's end, which is the last token's time. Being woken for each of them is 22 us a token on
    the cores that are measured, and reading lines as they come twice that.
    """

    def __init__(self, request: bytes) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.over = asyncio.get_running_loop().create_future()
        self._request = request
        self._gathers = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._socket = transport.get_extra_info("socket")
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._gathers and b"data: " in data:
            self._gathers = True
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, GATHERED)
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set_result(None)

    def lines(self) -> list[tuple[float, bytes]]:
        """Of the answer, each with the time that its end came."""
        found, begun = [], b""
        for when, piece in self.pieces:
            *whole, begun = (begun + piece).split(b"\n")
            found += [(when, line) for line in whole]
        return [*found, (math.inf, begun)] if begun else found


async def stream(url: str, prompt: Sequence[int], tokens: int) -> list[float]:
    """Ask for a streamed answer and say when each of its tokens came. What was read is looked at
    when all of it is there.

    Raises:
        SystemExit: an answer that is none, or of another number of tokens.
    """
    address = httpx.URL(url)
    body = json.dumps(
        {
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            # Names each token, also where its text is not complete yet.
            "return_token_ids": True,
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {address.host}:{address.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    _, listener = await loop.create_connection(
        lambda: Listener(head.encode() + body), address.host, address.port
    )
    await listener.over
    lines = listener.lines()
    ended = any(text.startswith(b"data: [DONE]") for _, text in lines)
    status = lines[0][1] if lines else b""
    if b" 200 " not in status or not ended:
        told = b"".join(text for _, text in lines[-3:])
        raise SystemExit(f"the server says {status.decode().strip()!r}: {told[-300:].decode()!r}")
    times = [when for when, text in lines for _ in token_ids(text)]
    if len(times) != tokens:
        raise SystemExit(f"an answer of {len(times)} tokens where {tokens} were asked for")
    return times


def token_ids(line: bytes) -> list[int]:
    """Of the tokens that a line of the stream names.

    Raises:
        SystemExit: it is an error.
    """
    if not line.startswith(b"data: {"):  # the end, or how the answer is framed
        return []
    event = json.loads(line.removeprefix(b"data: "))
    if "error" in event:
        raise SystemExit(f"the server fails: {event['error']}")
    return [i for choice in event["choices"] for i in choice.get("token_ids") or ()]


def take_turn(process: EngineProcess, prompts: Sequence[Sequence[int]], options: Any) -> Turn:
    """A turn of the server: woken, warmed up, measured, stopped again."""
    process.signal(signal.SIGCONT)
    try:
        time_served(process, [ids[:8] for ids in prompts], 3)
        repeats = [
            time_served(process, prompts, options.output_tokens) for _ in range(options.repeats)
        ]
    finally:
        process.signal(signal.SIGSTOP)
    return Turn(*(statistics.median(getattr(t, name) for t in repeats) for name in FIGURES))


def measure(options: argparse.Namespace) -> tuple[list[Round], dict[str, Any]]:
    """All rounds, and what ``bench decode`` said of the model."""
    config = AutoConfig.from_pretrained(options.checkpoint).get_text_config()
    rounds: list[Round] = []
    about: dict[str, Any] = {}
    with start_server(options) as process:
        for number in range(options.rounds):
            for batch in options.batch:
                prompts = random_prompts(config.vocab_size, batch, options.prompt_tokens)
                if number % 2:
                    served = take_turn(process, prompts, options)
                    bench, about = time_bench(options, batch)
                else:
                    bench, about = time_bench(options, batch)
                    served = take_turn(process, prompts, options)
                rounds.append(Round(batch, bench, served))
                told = ", ".join(f"{name} {rounds[-1].overhead(name):+.1%}" for name in FIGURES)
                print(f"round {number + 1} x{batch}: {told}", file=sys.stderr, flush=True)
    return rounds, about


def overheads(rounds: Sequence[Round], batch: int) -> dict[str, float]:
    """Medians over the rounds of so many prompts."""
    mine = [one for one in rounds if one.batch == batch]
    return {name: statistics.median(one.overhead(name) for one in mine) for name in FIGURES}


def table(rounds: Sequence[Round], options: argparse.Namespace) -> list[str]:
    """A line a batch: tokens a second of both sides, and the overheads."""
    lines = [f"{'':>4}{'bench tok/s':>14}{'served tok/s':>14}{'whole':>9}{'step':>9}"]
    for batch in options.batch:
        mine = [one for one in rounds if one.batch == batch]
        tokens = batch * options.output_tokens
        speeds = [
            statistics.median(tokens / side.whole for side in sides)
            for sides in ([one.bench for one in mine], [one.served for one in mine])
        ]
        found = overheads(rounds, batch)
        lines.append(
            f"{f'x{batch}':>4}"
            + "".join(f"{speed:14.1f}" for speed in speeds)
            + "".join(f"{found[name]:+9.1%}" for name in FIGURES)
        )
    return lines


def document(
    rounds: Sequence[Round], about: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Everything that was measured, round by round."""
    settings = ("prompt_tokens", "output_tokens", "batch", "rounds", "repeats", "threads")
    settings += ("stream_interval", "limit")
    return {
        "hardware": hardware(options.threads),
        "checkpoint": Path(options.checkpoint).name,
        "kernels": about["kernels"],
        "settings": {name: getattr(options, name) for name in settings},
        "rounds": [asdict(one) for one in rounds],
        "overheads": {str(batch): overheads(rounds, batch) for batch in options.batch},
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a folder")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="prompts at once")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="in each turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--stream-interval", type=int, default=1, help="the server's")
    parser.add_argument("--limit", type=float, help="overhead that is too much, such as 0.08")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(argv)
    if options.output_tokens < 3:
        parser.error("--output-tokens: bench decodes all but the first, and a step needs 2")
    for name in ("prompt_tokens", "rounds", "repeats", "threads", "stream_interval"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: {getattr(options, name)} is too few")
    if min(options.batch) < 1 or len(set(options.batch)) < len(options.batch):
        parser.error(f"--batch {options.batch}: numbers from 1 on, each once")
    return options


def main() -> None:
    options = parse()
    rounds, about = measure(options)
    found = document(rounds, about, options)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['checkpoint']} ({found['kernels']}), {found['hardware'].get('cpu', '')}")
    print(
        f"{options.prompt_tokens} prompt tokens, {options.output_tokens} new ones, "
        f"{options.rounds} rounds, {options.threads} threads, "
        f"--stream-interval {options.stream_interval}; overheads are medians"
    )
    print("\n".join(table(rounds, options)))
    if options.limit is not None:
        worst = max(value for one in found["overheads"].values() for value in one.values())
        if not worst <= options.limit:
            sys.exit(f"{worst:.1%} is more than {options.limit:.1%}")


if __name__ == "__main__":
    main()
