"""Sends asks on time: open loop by their own clock, closed loop by a number of clients."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from quantkit.loadtest.answer import Answer
from quantkit.loadtest.ask import Ask
from quantkit.loadtest.client import Client
from quantkit.progress import Progress, silent

T = TypeVar("T")


async def open_loop(
    client: Client, asks: Sequence[Ask], progress: Progress = silent, label: str = ""
) -> list[Answer]:
    """Send each ask when it is due, however many are under way; returns when all are over.

    Raises:
        QuantkitError: see `Client.send`; the others are cancelled.
    """
    client.restart()
    over = 0

    async def one(ask: Ask) -> Answer:
        nonlocal over
        assert ask.at is not None, "an ask of an open loop has its time"
        await asyncio.sleep(max(0.0, ask.at - client.now))
        answer = await client.send(ask, ask.at)
        over += 1
        progress(over, len(asks), label)
        return answer

    return await _all(one(ask) for ask in asks)


async def closed_loop(
    client: Client,
    asks: Sequence[Ask],
    concurrency: int,
    progress: Progress = silent,
    label: str = "",
) -> list[Answer]:
    """Keep ``concurrency`` asks under way until all are over, in their order.

    Raises:
        QuantkitError: see `Client.send`; the others are cancelled.
    """
    client.restart()
    left = iter(asks)
    answers: list[Answer] = []

    async def worker() -> None:
        for ask in left:
            answers.append(await client.send(ask, client.now))
            progress(len(answers), len(asks), label)

    await _all(worker() for _ in range(concurrency))
    return answers


async def _all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Await all; the first error, or an interrupt, cancels the rest."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
