"""Rows of a load test, one after the other: fixed rates, a sweep, numbers of clients, a trace."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from quantkit.errors import UsageError
from quantkit.loadtest.answer import Answer
from quantkit.loadtest.ask import Ask
from quantkit.loadtest.client import Client
from quantkit.loadtest.draw import Shape, draw_asks
from quantkit.loadtest.drive import closed_loop, open_loop
from quantkit.loadtest.row import Row, make_row
from quantkit.loadtest.tiers import LoadTier
from quantkit.progress import Reporter, silent_reporter

#: A sweep that has not broken the server by then ends.
MAX_SWEEP_ROWS = 16


@dataclass(frozen=True)
class Session:
    """How rows are measured.

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

    def poisson(self, shape: Shape, requests: int, rates: Sequence[float]) -> Iterator[Row]:
        """An open loop at each rate, in requests a second."""
        for rate in rates:
            name = f"poisson {rate:g}"
            asks = draw_asks(shape, self.tiers, requests, f"{self.seed} {name}", rate)
            yield self._open("poisson", rate, asks, shape, name)

    def sweep(
        self, shape: Shape, requests: int, first: float, growth: float, attainment: float
    ) -> Iterator[Row]:
        """Open loops at rising rates, until fewer than ``attainment`` of the requests are met.

        Raises:
            UsageError: no tier promises anything, so that nothing could be missed.
        """
        if not any(tier.slo.promises for tier in self.tiers):
            raise UsageError(
                "a sweep rises until promises are broken, and there are none",
                remedy="give --slo-ttft or --slo-tpot, or --tiers with them",
            )
        for step in range(MAX_SWEEP_ROWS):
            [row] = self.poisson(shape, requests, [first * growth**step])
            yield row
            if row.total.attainment < attainment:
                return

    def closed(self, shape: Shape, requests: int, clients: Sequence[int]) -> Iterator[Row]:
        """A closed loop with each number of clients, which have ``requests`` to send in all."""
        for count in clients:
            name = f"{count} clients"
            asks = draw_asks(shape, self.tiers, requests, f"{self.seed} {name}", None)

            async def run(
                asks: list[Ask] = asks, count: int = count, name: str = name
            ) -> list[Answer]:
                async with self.connect() as client:
                    await self._warm(client, shape, name)
                    with self.reporter(name) as progress:
                        return await closed_loop(client, asks, count, progress)

            answers = asyncio.run(run())
            yield make_row("closed", count, answers, self.tiers, self.price_per_hour)

    def trace(self, asks: Sequence[Ask], shape: Shape) -> Iterator[Row]:
        """A recorded trace; ``shape`` is that of the requests that warm up."""
        span = asks[-1].at or 1.0  # all at once: as many as came
        yield self._open("trace", len(asks) / span, asks, shape, "trace")

    def _open(self, kind: str, load: float, asks: Sequence[Ask], shape: Shape, name: str) -> Row:
        async def run() -> list[Answer]:
            async with self.connect() as client:
                await self._warm(client, shape, name)
                with self.reporter(name) as progress:
                    return await open_loop(client, asks, progress)

        return make_row(kind, load, asyncio.run(run()), self.tiers, self.price_per_hour)

    async def _warm(self, client: Client, shape: Shape, name: str) -> None:
        asks = draw_asks(shape, self.tiers, self.warm_up, f"{self.seed} {name} warm", None)
        await closed_loop(client, asks, max(1, self.warm_up))


def sustained_rate(rows: Sequence[Row], attainment: float) -> float | None:
    """The highest rate of a sweep before the first that broke; None if the first did."""
    held = list(itertools.takewhile(lambda row: row.total.attainment >= attainment, rows))
    return held[-1].load if held else None
