"""Rows of a load test, one after the other: fixed rates, a sweep, numbers of clients, a trace."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.loadtest.answer import Answer
from quantkit.loadtest.ask import Ask
from quantkit.loadtest.client import Client
from quantkit.loadtest.draw import Shape, draw_asks
from quantkit.loadtest.drive import closed_loop, open_loop
from quantkit.loadtest.row import Row, make_row
from quantkit.loadtest.tiers import LoadTier
from quantkit.progress import Reporter, silent_reporter

#: Sent for a row where nobody says how many.
REQUESTS = 32

#: A sweep that has not broken the server by then ends.
MAX_SWEEP_ROWS = 16

#: Sends the asks of a row through a client.
Drive = Callable[..., Coroutine[Any, Any, list[Answer]]]

Rows = Generator[Row, None, None]
#: Yields one row, and returns it.
Measured = Generator[Row, None, Row]


@dataclass(frozen=True)
class Session:
    """How rows are measured.

    A row is made while the server answers: where every request that warms up fails, or one that
    follows a row with failures, the next step of the iterator raises a `QuantkitError`.

    Attributes:
        connect: makes a client of the server; each row has its own.
        tiers: who sends.
        warm_up: requests ahead of each row that do not count.
        seed: of everything that is drawn.
        price_per_hour: of the machine that serves, for the cost of a token.
        reporter: shown the progress of each row.
    """

    connect: Callable[[], Client]
    tiers: Sequence[LoadTier]
    warm_up: int = 2
    seed: int = 0
    price_per_hour: float | None = None
    reporter: Reporter = silent_reporter

    def poisson(self, shape: Shape, requests: int, rates: Sequence[float]) -> Rows:
        """An open loop at each rate, in requests a second."""
        for rate in rates:
            yield from self._poisson(shape, requests, rate)

    def sweep(
        self, shape: Shape, requests: int, first: float, growth: float, attainment: float
    ) -> Rows:
        """Open loops at rising rates, until fewer than ``attainment`` of the requests are met."""
        for step in range(MAX_SWEEP_ROWS):
            row = yield from self._poisson(shape, requests, first * growth**step)
            if row.total.attainment < attainment:
                return

    def closed(self, shape: Shape, requests: int | None, clients: Sequence[int]) -> Rows:
        """A closed loop with each number of clients.

        Args:
            shape: of each request.
            requests: that all clients send together, no fewer than there are clients; by default
                `REQUESTS`, and two a client at least.
            clients: numbers of clients.
        """
        for count in clients:
            name = f"{count} clients"
            many = max(REQUESTS, 2 * count) if requests is None else requests
            asks = draw_asks(shape, self.tiers, many, f"{self.seed} {name}", None)
            drive = partial(closed_loop, asks=asks, concurrency=count)
            yield from self._measure("closed", count, drive, shape, name)

    def trace(self, asks: Sequence[Ask], shape: Shape) -> Rows:
        """A recorded trace; ``shape`` is that of the requests that warm up."""
        span = asks[-1].at or 1.0  # all at once: as many as came
        drive = partial(open_loop, asks=asks)
        yield from self._measure("trace", len(asks) / span, drive, shape, "trace")

    def _poisson(self, shape: Shape, requests: int, rate: float) -> Measured:
        name = f"poisson {rate:g}"
        asks = draw_asks(shape, self.tiers, requests, f"{self.seed} {name}", rate)
        return (
            yield from self._measure("poisson", rate, partial(open_loop, asks=asks), shape, name)
        )

    def _measure(self, kind: str, load: float, drive: Drive, shape: Shape, name: str) -> Measured:
        """Yield a row and return it, once the server is known to have outlived it."""

        async def run() -> list[Answer]:
            async with self.connect() as client:
                await self._warm(client, shape, name)
                with self.reporter(name) as progress:
                    return await drive(client, progress=progress)

        row = make_row(kind, load, asyncio.run(run()), self.tiers, self.price_per_hour)
        yield row
        if row.total.failed:
            asyncio.run(self._check_alive(shape, name))
        return row

    async def _warm(self, client: Client, shape: Shape, name: str) -> None:
        asks = draw_asks(shape, self.tiers, self.warm_up, f"{self.seed} {name} warm", None)
        answers = await closed_loop(client, asks, max(1, self.warm_up))
        if answers and all(answer.fate == "failed" for answer in answers):
            raise QuantkitError(
                f"{name}: no request that warms up was answered: {answers[0].reason}",
                remedy="see whether the server still runs",
            )

    async def _check_alive(self, shape: Shape, name: str) -> None:
        """Misses of a server under load are a measurement, those of one that is gone are not."""
        asks = draw_asks(shape, self.tiers, 1, f"{self.seed} {name} alive", None)
        async with self.connect() as client:
            [answer] = await closed_loop(client, asks, 1)
        if answer.fate == "failed":
            raise QuantkitError(
                f"{name}: requests failed, and so does one after them: {answer.reason}",
                remedy="see whether the server still runs; this row does not count",
            )


def sustained_rate(rows: Sequence[Row], attainment: float) -> float | None:
    """The highest rate of a sweep before the first that broke; None if the first did."""
    held = list(itertools.takewhile(lambda row: row.total.attainment >= attainment, rows))
    return held[-1].load if held else None
