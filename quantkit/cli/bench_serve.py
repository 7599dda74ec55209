"""``quantkit bench serve``: latency, throughput and goodput of a server under load."""

from __future__ import annotations

import contextlib
import math
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli import endpoint as elsewhere
from quantkit.cli.options import check_finite, refuse
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from quantkit.evals.endpoint import Endpoint
    from quantkit.loadtest.row import Row
    from quantkit.loadtest.tiers import LoadTier

LOAD, WORK, GOAL = "What is sent when", "What is asked", "What is promised"

CLIENTS = "1,2,4,8,16"


def command(
    context: typer.Context,
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="[CKPT]",
            help="Start its server and measure that; with --endpoint, only its vocabulary is read.",
        ),
    ] = None,
    serve_arg: Annotated[
        list[str] | None,
        typer.Option(
            "--serve-arg",
            metavar="ARG",
            help="Of the server that is started: --serve-arg=--no-prefix-caching. Repeatable.",
        ),
    ] = None,
    endpoint: elsewhere.EndpointOption = None,
    endpoint_model: elsewhere.EndpointModelOption = None,
    endpoint_key_file: elsewhere.EndpointKeyOption = None,
    endpoint_timeout: elsewhere.EndpointTimeoutOption = 300.0,
    vocab_size: Annotated[
        int | None,
        typer.Option("--vocab-size", min=1, help="Token ids lie below it. Default: CKPT's."),
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(
            "--concurrency",
            metavar="N,N",
            help=f"Closed loop: so many clients, each with one request under way. Default: "
            f"{CLIENTS}.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            "--rate",
            metavar="R,R",
            help="Open loop: Poisson arrivals a second.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    sweep: Annotated[
        float | None,
        typer.Option(
            "--sweep",
            min=1e-6,
            max=1e6,
            metavar="R",
            help="Open loop at rising rates from R on, until promises break.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    growth: Annotated[
        float,
        typer.Option(
            "--growth",
            min=1.01,
            max=100.0,
            help="From a rate of the sweep to the next.",
            rich_help_panel=LOAD,
        ),
    ] = 1.5,
    attainment: Annotated[
        float,
        typer.Option(
            "--attainment",
            min=0.0,
            max=1.0,
            help="The sweep ends below this share of met requests.",
            rich_help_panel=LOAD,
        ),
    ] = 0.9,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="Replay timestamps, lengths and shared prefixes of a Mooncake trace (JSONL).",
            rich_help_panel=LOAD,
        ),
    ] = None,
    length_scale: Annotated[
        float,
        typer.Option(
            "--length-scale",
            min=1e-6,
            max=1000.0,
            help="Multiply the trace's lengths by it.",
            rich_help_panel=LOAD,
        ),
    ] = 1.0,
    speed: Annotated[
        float,
        typer.Option(
            "--speed", min=1e-6, help="Replay so many times as fast.", rich_help_panel=LOAD
        ),
    ] = 1.0,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests",
            min=1,
            help="Requests of a row. Default: 32, and two a client at least, or the whole trace.",
            rich_help_panel=WORK,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=1, rich_help_panel=WORK)
    ] = 128,
    output_tokens: Annotated[
        int, typer.Option("--output-tokens", min=1, rich_help_panel=WORK)
    ] = 64,
    shared_tokens: Annotated[
        int,
        typer.Option(
            "--shared-tokens",
            min=0,
            help="Of each prompt, tokens that are the same in all prompts of a row.",
            rich_help_panel=WORK,
        ),
    ] = 0,
    warm_up: Annotated[
        int,
        typer.Option("--warm-up", min=0, help="Requests ahead of each row.", rich_help_panel=WORK),
    ] = 2,
    seed: Annotated[int, typer.Option("--seed", rich_help_panel=WORK)] = 0,
    tiers: Annotated[
        Path | None,
        typer.Option(
            "--tiers",
            metavar="FILE",
            help="Shares, keys and promises of several kinds of clients (YAML, docs/serving.md).",
            rich_help_panel=GOAL,
        ),
    ] = None,
    slo_ttft: Annotated[
        float | None,
        typer.Option("--slo-ttft", min=0, help="Seconds to the first token.", rich_help_panel=GOAL),
    ] = None,
    slo_tpot: Annotated[
        float | None,
        typer.Option("--slo-tpot", min=0, help="Seconds per token after it.", rich_help_panel=GOAL),
    ] = None,
    slo_e2e: Annotated[
        float | None,
        typer.Option("--slo-e2e", min=0, help="Seconds to the last token.", rich_help_panel=GOAL),
    ] = None,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            "--price-per-hour",
            min=0,
            help="Of the serving machine: gives the cost of a million tokens that met their SLO.",
            rich_help_panel=GOAL,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the rows as JSON.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Load a server and measure it: TTFT, TPOT, ITL, E2E, throughput, goodput under its SLO.

    Prompts are fixed token ids, answers have fixed lengths; where the server counts otherwise the
    run ends. Times count from when a request was due. Shed and failed requests are misses.
    """
    from quantkit.cli.load_record import record
    from quantkit.cli.progress import reporter
    from quantkit.evals.endpoint import EndpointConfig, connect
    from quantkit.loadtest.client import Client
    from quantkit.loadtest.draw import Shape
    from quantkit.loadtest.session import REQUESTS, Session
    from quantkit.results import check_writable

    check_finite(context)
    ways = {"--concurrency": concurrency, "--rate": rate, "--sweep": sweep, "--trace": trace}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other", remedy="measure one by one")
    if sweep is None:
        refuse(context, ("growth", "attainment"), "belongs to a sweep", "add --sweep RATE")
    if trace is None:
        refuse(context, ("length_scale", "speed"), "belongs to a trace", "add --trace FILE")
    else:
        lengths = ("prompt_tokens", "output_tokens", "shared_tokens")
        refuse(context, lengths, "the trace has its own", "scale them with --length-scale")
    if endpoint is not None:
        refuse(context, ("serve_arg",), "belongs to a server that is started", "drop --endpoint")
    if tiers is not None:
        slos = ("slo_ttft", "slo_tpot", "slo_e2e", "endpoint_key_file")
        refuse(context, slos, "the file of tiers has its own", "write it there")
    if shared_tokens > prompt_tokens:
        raise UsageError(f"--shared-tokens {shared_tokens} is above --prompt-tokens")
    if output is not None:
        check_writable(output)
    classes = _tiers(tiers, slo_ttft, slo_tpot, slo_e2e, endpoint_key_file)
    if sweep is not None and not any(tier.slo.promises for tier in classes):
        raise UsageError(
            "a sweep rises until promises are broken, and there are none",
            remedy="give --slo-ttft or --slo-tpot, or --tiers with them",
        )
    clients = [int(n) for n in _numbers(concurrency, "--concurrency", CLIENTS, whole=True)]
    if not given or concurrency is not None:
        _check_clients(requests, clients)
    rates = _numbers(rate, "--rate", "1")
    if checkpoint is None and endpoint is None:
        raise UsageError(
            "there is nothing to measure", remedy="name a CKPT to serve, or an --endpoint"
        )
    ids = vocab_size or _vocabulary(checkpoint)
    shape = Shape(prompt_tokens, output_tokens, ids, shared_tokens)
    asks = None
    if trace is not None:
        from quantkit.loadtest.trace import read_trace, replay

        asks = replay(
            read_trace(trace, requests),
            classes,
            vocab_size=ids,
            seed=str(seed),
            scale=length_scale,
            speed=speed,
        )
        longest = max(asks, key=lambda ask: len(ask.prompt_ids) + ask.output_tokens)
        shape = Shape(len(longest.prompt_ids), longest.output_tokens, ids)
    with _target(checkpoint, endpoint, serve_arg or []) as url:
        some_key = next((tier.key for tier in classes if tier.key), None)
        found = connect(EndpointConfig(url, endpoint_model, some_key))
        _check_length(found, shape.prompt_tokens, shape.output_tokens)
        keys = {tier.name: tier.key for tier in classes if tier.key is not None}
        session = Session(
            partial(Client, found.config.base, found.model, keys, endpoint_timeout),
            classes,
            warm_up,
            seed,
            price_per_hour,
            reporter,
        )
        many = REQUESTS if requests is None else requests
        rows: Iterator[Row]
        if asks is not None:
            rows = session.trace(asks, shape)
        elif sweep is not None:
            rows = session.sweep(shape, many, sweep, growth, attainment)
        elif rate is not None:
            rows = session.poisson(shape, many, rates)
        else:
            rows = session.closed(shape, requests, clients)
        about = {
            **_about(found),
            "seed": seed,
            "warm_up": warm_up,
            "price_per_hour": price_per_hour,
            "tiers": {
                tier.name: {"share": tier.share, "slo": asdict(tier.slo)} for tier in classes
            },
            "load": given[0].removeprefix("--") if given else "concurrency",
            "shape": asdict(shape),
            "trace": None
            if trace is None
            else {"file": trace.name, "length_scale": length_scale, "speed": speed},
        }
        record(rows, about, output, as_json, attainment if sweep is not None else None)


def _tiers(
    path: Path | None,
    ttft: float | None,
    tpot: float | None,
    e2e: float | None,
    key_file: Path | None,
) -> tuple[LoadTier, ...]:
    from quantkit.evals.endpoint import read_key
    from quantkit.loadtest.tiers import DEFAULT, LoadTier, Slo, read_tiers

    if path is not None:
        return read_tiers(path)
    key = None if key_file is None else read_key(key_file)
    return (LoadTier(DEFAULT, 1.0, Slo(ttft, tpot, e2e), key),)


def _numbers(given: str | None, option: str, default: str, *, whole: bool = False) -> list[float]:
    """``1,2,4``: all above 0."""
    text = default if given is None else given
    try:
        found = [float(int(part)) if whole else float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < number < math.inf for number in found):
        what = "whole numbers" if whole else "numbers"
        raise UsageError(f"{option} {text!r}: {what} above 0, with commas between", remedy="1,2,4")
    return found


def _check_clients(requests: int | None, clients: list[int]) -> None:
    if requests is not None and requests < max(clients):
        raise UsageError(
            f"--requests {requests}: {max(clients)} clients have one under way each",
            remedy=f"give {max(clients)} or more, or fewer clients",
        )


def _vocabulary(checkpoint: str | None) -> int:
    if checkpoint is None:
        raise UsageError(
            "prompts are token ids, and nobody says how many there are",
            remedy="give --vocab-size, or CKPT beside --endpoint",
        )
    from quantkit.models.tokenizer import load_tokenizer

    return len(load_tokenizer(checkpoint)[0])


def _check_length(found: Endpoint, prompt_tokens: int, output_tokens: int) -> None:
    longest, limit = prompt_tokens + output_tokens, found.max_length
    if limit is not None and longest > limit:
        raise UsageError(
            f"{longest} tokens of prompt and answer are more than the server's context of {limit}",
            remedy="lower --prompt-tokens, --output-tokens or --length-scale",
        )


@contextlib.contextmanager
def _target(checkpoint: str | None, endpoint: str | None, arguments: list[str]) -> Iterator[str]:
    """The address of the server: the one that is there, or one that is started."""
    if endpoint is not None:
        yield endpoint
        return
    from quantkit.loadtest.server import serving

    assert checkpoint is not None
    typer.echo(f"starting quantkit serve {checkpoint}", err=True)
    with serving(checkpoint, arguments) as process:
        yield process.url


def _about(found: Endpoint) -> dict[str, Any]:
    """Which system this is, and where the load came from."""
    from quantkit.ops.measure import cpu_name

    return {
        "server": found.server,
        "model": found.model,
        "fingerprint": dict(found.fingerprint),
        "client": {"machine": platform.machine(), "cpu": cpu_name(), "cpus": os.cpu_count()},
    }
